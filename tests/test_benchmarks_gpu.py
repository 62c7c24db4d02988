"""What a GPU measures of decoding, as far as that runs here: shapes, bytes, cases, and every way to decode, small."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # benchmarks/ is no part of the installed package

from benchmarks import decode_models, decode_peers, decode_problems, test_decode, train_steps  # noqa: E402
from benchmarks.decode_problems import CHECKED_ROWS, UNSTEERED, Problem, Steering, cache_bytes, check  # noqa: E402
from dive_fast.bench.targets import TARGETS  # noqa: E402
from dive_fast.ops.linear_cross_entropy import spec  # noqa: E402

TINY = Problem("tiny", 2, torch.float32, prompt_tokens=5, new_tokens=4)


def test_shapes_are_those_of_the_named_models():
    # As their authors count: 7.25 and 7.62 billion; 4.30, of which a vision tower and its projector have 0.42.
    published = {"mistral-7b": 7_248_023_552, "qwen2.5-7b": 7_615_616_512, "gemma3-4b": 3_880_263_168}
    for name in decode_models.CONFIGS:
        model = decode_models.random_model(name, torch.bfloat16, "meta")
        assert sum(weight.numel() for weight in model.parameters()) == published[name]
        assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
        assert linear_cross_entropy_head(name) == tuple(model.get_output_embeddings().weight.T.shape)


def linear_cross_entropy_head(name: str) -> tuple[int, int]:
    """(D, V) in the loss's cases; Mistral's vocabulary was smaller in its first versions."""
    hidden_size, vocabulary = spec.HEADS[name]
    return (hidden_size, 32768 if name == "mistral-7b" else vocabulary)


@pytest.fixture
def small_mistral(monkeypatch):
    """In place of the large one, so that what a GPU would run runs here."""
    from transformers import MistralConfig

    sizes = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": None}
    monkeypatch.setitem(decode_models.CONFIGS, "mistral-7b", lambda: MistralConfig(**sizes, **heads))


def test_training_steps_in_turn_hold_the_frozen_weights_once(small_mistral):
    wanted = train_steps.Problem("mistral-7b", 2, 40)
    steps = [train_steps.Step(wanted, train_steps.IMPLEMENTATIONS[name]) for name in ("plain hooks", "PEFT LoRA q, v")]
    steps.append(train_steps.Step(wanted, train_steps.IMPLEMENTATIONS["dive_fast scope response"]))
    addresses = [
        {weight.data_ptr() for weight in step.model.parameters() if not weight.requires_grad} for step in steps[1:]
    ]
    assert addresses[0] and addresses[0] == addresses[1]
    first, *others = (float(step()[0]) for step in steps)
    assert others == pytest.approx([first] * 2, rel=1e-4)


@pytest.mark.parametrize("different", [False, True])
def test_large_models_are_checked_and_decoded_alike(small_mistral, different):
    """transformers, its static cache and the engine, on the code that a GPU takes with 7 billion weights."""

    rows = CHECKED_ROWS if different else CHECKED_ROWS + 1
    problem = Problem("mistral-7b", rows, torch.float32 if different else torch.bfloat16, 9, 4)
    steering = Steering("lowrank", 4, different=True) if different else UNSTEERED
    for make in (decode_peers.Native, decode_peers.Transformers):
        check(make(problem, steering), False, problem, steering)
    if not different:
        ways = (decode_peers.StaticTransformers, decode_peers.Transformers)
        static, dynamic = (make(problem, UNSTEERED) for make in ways)
        for _ in range(2):  # the cache serves every round
            static.prepare()
            dynamic.prepare()
            assert static() == dynamic()


def test_a_window_bounds_what_a_step_reads():
    problem = Problem("gemma3-4b", 8, prompt_tokens=1500, new_tokens=3, device="meta")
    # 34 layers, every sixth without a window of 1024; keys and values, 4 heads of 256 numbers of 2 bytes.
    assert cache_bytes(problem, 2) == 8 * 2 * 4 * 256 * 2 * (29 * 1024 + 5 * 1501)


def test_a_copy_moves_as_many_bytes_as_a_run_reads(monkeypatch):
    monkeypatch.setattr(decode_problems, "COPY_BYTES", 1000)
    copied = []

    class Recorded(torch.Tensor):
        def copy_(self, source):
            copied.append(self.nbytes + source.nbytes)

    limit = decode_problems.CopyLimit(TINY, 1250)
    limit.target = limit.target.as_subclass(Recorded)
    limit()
    assert sum(copied) == 4 * 1250 and max(copied) == 2000


def test_a_model_that_the_engine_refuses_is_skipped_in_its_words():
    assert decode_peers.OURS.missing(TINY, UNSTEERED) is None
    elsewhere = decode_peers.OURS.missing(Problem("tiny", 2, device="meta"), UNSTEERED)
    assert elsewhere == "engine='native' refuses: the decoder lies on meta; it runs on CPUs and CUDA devices"


def test_the_gpu_scale_asks_for_everything_that_is_promised():
    cases = test_decode.decode_cases("gpu")
    ids = [test_decode.case_id(*case) for case in cases]
    assert len(set(ids)) == len(ids)
    for model in ("mistral-7b", "qwen2.5-7b", "gemma3-4b"):
        for rows in (1, 8, 32):
            start = f"{model}-bfloat16-B{rows}-"
            for what in ("dive_fast-unsteered", "dive_fast-lowrank-r64", "transformers-unsteered"):
                assert start + what in ids
            assert f"{start}transformers_static_compiled-unsteered" in ids
        assert f"{model}-bfloat16-B8-dive_fast-lowrank-r64-different" in ids
    assert all(problem.device == "cuda" and problem.prompt_tokens == 1024 for problem, _, _ in cases)
    peers = test_decode.ratio_peers(cases[0][0], cases[0][1])
    assert list(peers) == ["transformers", "transformers static compiled"]


def test_targets_on_a_gpu_name_the_problems_and_peers_that_are_compared():
    named = {
        (t.where["problem"], t.figure[1]) for t in TARGETS if t.figure[0] == "ratios" and "cuda" in t.where.values()
    }
    compared = {
        (str(problem), peer)
        for problem, ours in test_decode.ratio_cases("gpu")
        for peer in test_decode.ratio_peers(problem, ours)
    }
    assert named == compared
