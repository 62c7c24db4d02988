"""The benchmark suite runs at smoke scale, skips what is missing with a reason, and times nothing that is wrong."""

import json
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks/ is no part of the installed package

from benchmarks import loss_peers  # noqa: E402
from benchmarks.loss_problems import TOLERANCES, Problem, errors, prepare, step  # noqa: E402
from dive_fast import cli  # noqa: E402
from dive_fast.bench.group_tables import GROUPS  # noqa: E402
from dive_fast.ops.linear_cross_entropy import spec  # noqa: E402
from tests.benchmark_runs import ROOT, SUITE_SECONDS, run, run_suite  # noqa: E402

pytestmark = pytest.mark.timeout(SUITE_SECONDS + 60)
KINDS = {
    "mean": {"options": {"reduction": "mean"}, "weighted": False},
    "weighted": {"options": {"reduction": "mean"}},
    "none": {"options": {"reduction": "none"}},
    "kl": {"options": {"reduction": "mean", "kl_weight": 0.5}, "teacher": "statistics"},
    "kl_none": {"options": {"reduction": "none", "kl_weight": 0.5}, "teacher": "hidden"},
}


def problem(kind: str, dtype: torch.dtype) -> Problem:
    return Problem(spec.Case(kind, 24, 16, 72, dtype, ignored=0.4, **KINDS[kind]), "cpu")


class Smoke(NamedTuple):
    """The whole suite at smoke scale, run once by its command."""

    output: str
    content: dict
    path: Path

    def of(self, group: str) -> list[dict]:
        """Records of the group, or of those that have their problem behind its name."""
        return [r for r in self.content["records"] if r["group"] == group or r["group"].startswith(f"{group} ")]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory) -> Smoke:
    path = tmp_path_factory.mktemp("smoke") / "results.json"
    command = (sys.executable, "-m", "dive_fast.cli", "bench", "--scale", "smoke", "--output", str(path))
    # A minute on one thread; on a busy machine OpenMP's spinning threads would make many of it.
    outcome = run(*command, OMP_NUM_THREADS="1")
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    return Smoke(outcome.stdout, json.loads(path.read_text()), path)


def test_the_whole_suite_runs_at_smoke_scale(smoke):
    assert "Liger: " in smoke.output, "a skipped peer is named with its reason"
    assert "A page of them: dive-fast bench --report" in smoke.output
    assert smoke.content["machine"]["torch build"] == torch.__version__
    assert smoke.content["machine"]["threads"] and smoke.content["machine"]["load before"]
    groups = ("loss ratios", "steer-op", "train-step", "decode ratios", "decode steering", "decode kernels")
    for group in (*groups, "end-to-end training", "end-to-end reports", "evaluate", "scaling"):
        assert smoke.of(group), group
    for record in smoke.content["records"]:
        seconds = record["seconds"]
        assert seconds["rounds"] >= 2 and 0 < seconds["low"] <= seconds["median"] <= seconds["high"], record["name"]
        assert record["threads"] >= 1
    noisy = {record["name"] for record in smoke.content["records"]} & set(smoke.content["noise"]["records"])
    assert len(noisy) == len(smoke.content["noise"]["records"]) and smoke.content["noise"]["wider_than"] == 0.1


def test_the_loss_is_measured(smoke):
    found = {r["implementation"]: r for r in smoke.of("loss cpu-smoke-float32-T64-valid50%-mean")}
    assert {"dive_fast reference", "dive_fast native", "eager valid rows", "torch.compile"} <= set(found)
    for record in found.values():
        assert record["N"] == 32 and record["T"] == 64
        assert record["gflops_per_second"] == pytest.approx(record["flops"] / record["seconds"]["median"] / 1e9)


def test_what_a_user_waits_for_is_measured(smoke):
    (training,) = smoke.of("end-to-end training")
    for name, system in training["systems"].items():
        steps, seconds, losses = zip(*system["curve"], strict=True)
        assert steps == (0, 3, 6, 9, 12) and seconds[0] == 0 and list(seconds) == sorted(seconds), name
        assert losses[-1] < losses[0] and system["final_loss"] == losses[-1]
        below = [i for i, loss in enumerate(losses) if loss < training["threshold"]]
        assert system["reached"] == bool(below)
        assert (system["steps"], system["seconds"]) == ((steps[below[0]], seconds[below[0]]) if below else (None, None))
    starts = [system["curve"][0][2] for system in training["systems"].values()]
    assert max(starts) == pytest.approx(min(starts), rel=1e-4)
    assert training["systems"]["dive_fast scope all"]["reached"]
    for record in smoke.of("end-to-end reports"):
        for name, system in record["systems"].items():
            assert system["reports_per_minute"]["median"] > 0 and system["shortfall"] <= 0.1, name
        same = [record["systems"][name] for name in ("dive_fast", "transformers")]
        assert same[0]["new_tokens"] == same[1]["new_tokens"] and same[0]["ended"] == same[1]["ended"]
    assert any(record["systems"]["dive_fast"]["ended"] > 0 for record in smoke.of("end-to-end reports"))


def test_metrics_are_compared_before_they_are_measured(smoke):
    found = {record["metric"]: record for record in smoke.of("evaluate")}
    assert {"bleu", "rouge_l", "cider", "decisive", "bootstrap"} <= set(found)
    for name in ("bleu", "rouge_l", "cider", "bootstrap"):
        assert found[name]["difference"] <= 1e-6 and found[name]["ratios"]
        rate = found[name]["documents"] / found[name]["seconds"]["median"]
        assert found[name]["documents_per_second"] == pytest.approx(rate)


def test_costs_are_measured_at_several_sizes(smoke):
    sizes: dict[str, list[int]] = {}
    for record in smoke.of("scaling"):
        sizes.setdefault(record["axis"], []).append(record["size"])
        own = record["times"][record["implementation"]]
        assert len(own) == record["seconds"]["rounds"] and all(len(t) == len(own) for t in record["times"].values())
    assert set(sizes) == {"decode context", "decode rows", "loss rows", "loss vocabulary", "step prompt"}
    assert all(len(found) == 3 for found in sizes.values())


def test_its_results_become_a_page_and_compare_with_themselves(smoke, tmp_path, capsys):
    assert cli.main(["bench", "--report", str(smoke.path), "--output", str(tmp_path)]) == 0
    page = (tmp_path / "report.md").read_text()
    for group in GROUPS.values():
        assert f"### {group.title}\n" in page
    assert "### How costs grow\n" in page
    assert cli.main(["bench", "--compare", str(smoke.path), str(smoke.path)]) == 0
    assert "0 slower, 0 faster, " in capsys.readouterr().out


def test_the_ablation_runs_at_smoke_scale(tmp_path):
    results = tmp_path / "quality.json"
    command = (sys.executable, "-m", "pytest", "benchmarks/quality", "--scale", "smoke", "-p", "no:cacheprovider")
    outcome = run(*command, "--results", str(results))
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    systems = json.loads(results.read_text())["systems"]
    assert [system["name"] for system in systems] == ["zero_shot", "dive", "dive_no_eos", "fixed"]


def test_the_ablation_is_an_experiment():
    from dive_fast.experiment import settings as experiment

    config = experiment.load_experiment(ROOT / "benchmarks" / "quality" / "ablation.yaml")
    assert len(config.seeds) >= 3 and config.compare_with == "dive"
    chosen = {row.get("like", name) for name, row in config.systems.items()}
    assert chosen == {"zero_shot", "dive"}, "every row changes one thing of `dive`"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_the_gpu_part_says_that_it_is_skipped():
    outcome = run_suite("--scale", "gpu")
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    assert " skipped" in outcome.stdout and " passed" not in outcome.stdout and "no CUDA device" in outcome.stdout


def test_decoding_is_measured(smoke):
    assert "llama.cpp Q4_1: there is no GGUF" in smoke.output
    for record in smoke.of("decode tiny-float32-B2"):
        # The rate is the work over the median time.
        assert record["bytes"] == record["weight_bytes"] + record["adapter_bytes"] + record["cache_bytes"]
        assert record["tokens_per_second"] == pytest.approx(2 * 6 / record["seconds"]["median"])
        assert 0 < record["share_of_read_limit"]["low"] <= record["share_of_read_limit"]["high"]
        assert record["first_token_seconds"] > 0 and record["logit_error"] <= 1e-4
    assert "memory_beyond_weights_and_cache" in smoke.of("decode tiny-float32-B2")[0]
    assert set(smoke.of("decode ratios")[0]["ratios"]) >= {"transformers", "transformers float32", "reading its bytes"}
    assert "lowrank-r4-different" in {record["steering"] for record in smoke.of("decode steering")}
    for record in smoke.of("decode steering"):
        overhead, ratio = record["overhead_percent"], record["ratios"]["unsteered"]
        assert overhead["median"] == pytest.approx(100 * (ratio["median"] - 1))


def test_the_bytes_of_a_step_are_those_of_its_parts():
    from benchmarks import decode_peers
    from benchmarks.decode_problems import Steering

    tiny = decode_problem()
    ours = decode_peers.Native(tiny, Steering("lowrank", 4))
    theirs = decode_peers.Transformers(tiny, Steering("lowrank", 4))
    weights = {name: weight for name, weight in ours.model.named_parameters() if "dive_" not in name}
    # Every matrix counts once: the head is the embedding. Norms are nothing beside them, and only counted for theirs.
    assert ours.weights == sum(weight.nbytes for weight in weights.values() if weight.dim() == 2)
    assert theirs.weights == sum(weight.nbytes for weight in weights.values())
    # Two layers, down and up of rank 4 and one vector, of 64 numbers of 4 bytes.
    assert ours.adapters == 2 * (4 + 4 + 1) * 64 * 4
    # Two layers, keys and values, two heads of 16 numbers of 4 bytes; 5 to 8 positions on each of two rows.
    assert ours.cache == theirs.cache == 2 * 2 * 2 * 16 * 4 * 2 * 6.5


def decode_problem(dtype=torch.float32):
    from benchmarks.decode_problems import Problem as DecodeProblem

    return DecodeProblem("tiny", 2, dtype, prompt_tokens=5, new_tokens=4)


class FalseDecoding:
    """Decodes rightly, then changes a token or the logits."""

    def __init__(self, dtype, change_tokens=lambda tokens: tokens, change_logits=lambda logits: logits):
        from benchmarks import decode_peers
        from benchmarks.decode_problems import UNSTEERED

        self.right = decode_peers.Native(decode_problem(dtype), UNSTEERED)
        self.prepare, self.change_tokens, self.change_logits = self.right.prepare, change_tokens, change_logits

    def __call__(self):
        return self.change_tokens(self.right())

    def logits(self, forced):
        return self.change_logits(self.right.logits(forced))


OTHER_TOKENS = {"change_tokens": lambda tokens: [[(token + 1) % 300 for token in row] for row in tokens]}


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({}, None),
        (OTHER_TOKENS, "falls short"),
        ({"change_tokens": lambda tokens: [row[:-1] for row in tokens]}, "tokens"),
        ({"change_logits": lambda logits: logits * 1.001}, "wrong by"),
        ({"change_logits": lambda logits: logits * torch.nan}, "wrong by"),
    ],
)
def test_wrong_decoding_is_not_timed(changes, complaint):
    from benchmarks.decode_problems import UNSTEERED, check

    if complaint is None:
        check(FalseDecoding(torch.float32), False, decode_problem(), UNSTEERED)
        return
    with pytest.raises(AssertionError, match=complaint):
        check(FalseDecoding(torch.float32, **changes), False, decode_problem(), UNSTEERED)


@pytest.mark.parametrize(
    ("dtype", "approximate"), [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float32, True)]
)
def test_wrong_tokens_beside_right_logits_are_not_timed(dtype, approximate):
    """The logits are of one pass: a run whose cache is wrong takes wrong tokens, and its logits are right."""
    from benchmarks.decode_problems import UNSTEERED, check

    check(FalseDecoding(dtype), approximate, decode_problem(dtype), UNSTEERED)
    with pytest.raises(AssertionError, match="falls short"):
        check(FalseDecoding(dtype, **OTHER_TOKENS), approximate, decode_problem(dtype), UNSTEERED)


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "results").glob("*.json")), ids=lambda path: path.stem)
def test_results_hold_figures_and_no_report_texts(path):
    text = path.read_text()
    assert not any(f'"{name}"' in text for name in ("samples", "reference", "prediction", "prompt"))


def test_a_missing_peer_has_a_reason():
    missing = loss_peers.package("no_such_package", "pip install it")
    assert missing("cpu") == "no_such_package is not installed (pip install it)"
    assert "the problem lies on the cpu" in loss_peers.package("torch", "", cuda="it is for GPUs")("cpu")
    assert loss_peers.package("torch", "")("cpu") is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_peers_compute_the_same_loss(kind, dtype):
    """Weights and KL are put around a peer's op by this suite: a peer must not lose by our mistake."""
    prepared = prepare(problem(kind, dtype))
    measured = 0
    for peer in loss_peers.PEERS:
        if peer.slow_start or peer.missing("cpu") or peer.unfit(prepared.inputs):
            continue
        found = errors(step(peer.make(), prepared.inputs)(), prepared)
        assert max(found) <= TOLERANCES[dtype], f"{peer.name}: {found}"
        measured += 1
    assert measured >= 3


def test_the_true_loss_is_the_definition():
    wanted = problem("kl_none", torch.float32)
    prepared = prepare(wanted)
    inputs = prepared.inputs
    teacher = torch.zeros_like(inputs.hidden).index_copy(0, inputs.rows, inputs.taught)
    leaf = inputs.hidden.detach().double().requires_grad_()
    tensors = (leaf, inputs.weight, inputs.targets, inputs.token_weights)
    loss = spec.definition_loss(tensors, {"teacher": teacher, "kl_weight": 0.5}, torch.float64, "none")
    (gradient,) = torch.autograd.grad(loss, leaf, inputs.upstream.double())
    torch.testing.assert_close(prepared.loss, loss.detach())
    torch.testing.assert_close(prepared.gradient, gradient)


@pytest.mark.parametrize("wrong", [lambda loss: loss * 1.01, lambda loss: loss * torch.nan])
def test_a_wrong_implementation_is_not_timed(wrong):
    from benchmarks.test_loss import measured_and_checked

    wanted = problem("mean", torch.float32)
    false_peer = loss_peers.Implementation("false", lambda: None, loss_peers.anywhere)
    run = step(lambda inputs: wrong(loss_peers.eager(inputs)), prepare(wanted).inputs)
    with pytest.raises(AssertionError, match="false is wrong by"):
        measured_and_checked(run, false_peer, wanted)
