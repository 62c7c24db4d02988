"""`dive_fast.train` end to end on a tiny random model: loss, teacher, accumulation, resume, bad input."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from functools import partial
from pathlib import Path

import peft
import pytest
import torch
import torch.nn.functional as F
from transformers import TrainingArguments

import dive_fast
from dive_fast import checkpoints, ops
from dive_fast.data.collator import ReportCollator
from dive_fast.data.encoding import ReportEncoder
from dive_fast.data.record import Record
from dive_fast.errors import InputError
from dive_fast.models.tiny import tiny_llama, tiny_tokenizer

FINDINGS = (
    "no pleural effusion",
    "left pleural effusion",
    "the lungs are clear",
    "mild cardiomegaly",
    "no pneumothorax",
)
RECORDS = [
    Record(f"r{i}", f"Indication: case {i % 7}. Tags: {i % 3}.", f"{FINDINGS[i % 5]}. {FINDINGS[(i * 3 + 1) % 5]}.")
    for i in range(24)
]
SHORT = {
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "disable_tqdm": True,
    "save_strategy": "no",
}
PLAIN = dive_fast.Supervision(pathology_weight=0, eos_weight=0)


def run(tmp_path, model=None, records=RECORDS, args=None, **options):
    options.setdefault("processor", tiny_tokenizer())
    options.setdefault("steering", dive_fast.DiveConfig(r=4))
    model = tiny_llama() if model is None else model
    return dive_fast.train(model, records, tmp_path / "run", args=SHORT | (args or {}), **options)


def losses(result):
    return [entry["loss"] for entry in result.history if "loss" in entry]


def adapter_bytes(folder: Path) -> bytes:
    return (Path(folder) / "adapter_model.safetensors").read_bytes()


def test_training_writes_an_adapter_that_load_reads_back(tmp_path):
    result = run(tmp_path, eval_dataset=RECORDS[:5], args={"max_steps": 30})
    assert sum(losses(result)[-3:]) < sum(losses(result)[:3]), "the loss does not go down"
    assert result.metrics["eval_perplexity"] == pytest.approx(torch.tensor(result.metrics["eval_loss"]).exp().item())
    loaded = dive_fast.load(tiny_llama(), result.adapter_dir)
    prompt = tiny_tokenizer()("Indication: case 1.", return_tensors="pt")
    assert torch.equal(loaded(**prompt).logits, result.model(**prompt).logits)
    pickles = [p for p in (tmp_path / "run").rglob("*") if p.suffix in (".bin", ".pt", ".pkl", ".pth")]
    assert not pickles


def test_transformers_own_arguments_train_alike(tmp_path):
    options = SHORT | {"learning_rate": 3e-3}
    arguments = TrainingArguments(output_dir=str(tmp_path / "elsewhere"), report_to="none", use_cpu=True, **options)
    plain = dive_fast.train(
        tiny_llama(),
        RECORDS,
        tmp_path / "plain",
        processor=tiny_tokenizer(),
        steering=dive_fast.DiveConfig(r=4),
        args=arguments,
    )
    assert losses(plain) == losses(run(tmp_path, args=options)) and not (tmp_path / "elsewhere").exists()


def test_only_the_adapter_trains(tmp_path):
    model = tiny_llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = run(tmp_path, model)
    after = result.model.unload().state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_weights_of_zero_give_plain_cross_entropy(tmp_path):
    """The first step's loss, before any update, against F.cross_entropy on the base model's own logits."""
    result = run(tmp_path, records=RECORDS[:4], supervision=PLAIN, args={"max_steps": 1})
    batch = ReportCollator(ReportEncoder(tiny_tokenizer()))(RECORDS[:4])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    positions = batch["labels"][:, 1:] != -100

    def loss(dtype):
        model = tiny_llama().to(dtype)
        with torch.no_grad():
            logits = model(**inputs).logits[:, :-1][positions]
            return F.cross_entropy(logits, batch["labels"][:, 1:][positions]).item()

    exact = loss(torch.float64)
    assert abs(losses(result)[0] - exact) <= abs(loss(torch.float32) - exact) + 1e-6


@pytest.mark.parametrize(("kl_weight", "scope"), [(0.0, "response"), (0.5, "response"), (0.0, "all")])
def test_the_fast_path_trains_like_the_references(tmp_path, monkeypatch, kl_weight, scope):
    """Fifty steps: fused ops and split batches against plain PyTorch on whole rows."""
    options = {
        "records": RECORDS,
        "steering": dive_fast.DiveConfig(r=4, scope=scope),
        "supervision": dive_fast.Supervision(pathology_weight=2.0, eos_weight=3.0, kl_weight=kl_weight),
        "teacher": dive_fast.Teacher(shots=2) if kl_weight else None,
        "args": {"max_steps": 50, "learning_rate": 1e-2},
    }
    fast = run(tmp_path / "fast", **options)
    options["args"]["prompt_cache_bytes"] = 2**24
    kept = run(tmp_path / "kept", **options)
    for op in ("linear_cross_entropy", "steer"):
        monkeypatch.setattr(ops, op, partial(getattr(ops, op), backend="reference"))
    monkeypatch.setattr(ReportCollator, "_can_split", lambda self, prompts: False)
    plain = run(tmp_path / "plain", **options)
    fast, kept, plain = (torch.tensor(losses(result), dtype=torch.float64) for result in (fast, kept, plain))
    assert len(fast) == 50 and plain[-1] < 0.8 * plain[0]
    # Rounding differs in the last bits, and fifty updates carry it on.
    torch.testing.assert_close(fast, plain, rtol=1e-4, atol=0)
    torch.testing.assert_close(kept, fast, rtol=1e-4, atol=0)


@pytest.mark.parametrize("scope", ["response", "all"])
def test_compiled_layers_train_alike(tmp_path, scope):
    """`torch_compile`: the same losses over steps whose batches differ in length."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    options = {"steering": dive_fast.DiveConfig(r=4, scope=scope), "args": {"max_steps": 6}}
    plain = run(tmp_path / "plain", **options)
    torch._dynamo.reset()
    torch._dynamo.register_backend(backend, name=f"counted_{scope}")
    options["args"] |= {"torch_compile": True, "torch_compile_backend": f"counted_{scope}"}
    compiled = run(tmp_path / "compiled", **options)
    torch._dynamo.reset()
    assert graphs
    torch.testing.assert_close(torch.tensor(losses(compiled)), torch.tensor(losses(plain)), rtol=1e-5, atol=0)


@pytest.mark.parametrize("option", ["selective_checkpointing", "gradient_checkpointing"])
def test_checkpointing_trains_alike(tmp_path, option):
    """The same losses, and layers that do run again in the backward pass."""
    plain = run(tmp_path / "plain")
    model, counts = tiny_llama(), []
    model.model.layers[0].mlp.register_forward_hook(lambda m, args, output: counts.append(torch.is_grad_enabled()))
    checkpointed = run(tmp_path / option, model, args={option: True})
    assert losses(checkpointed) == pytest.approx(losses(plain), rel=1e-5)
    assert sum(counts) == 2 * SHORT["max_steps"]
    with pytest.raises(InputError, match="selective_checkpointing: not together"):
        run(tmp_path / "both", args={"selective_checkpointing": True, "gradient_checkpointing": True})


def test_the_supervised_gradient_equals_float64(tmp_path):
    """One SGD step at learning rate 1 moves the adapter by minus its gradient."""
    args = {"max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    supervision = dive_fast.Supervision(pathology_weight=2.0, eos_weight=3.0)
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    torch.manual_seed(42)
    steered = peft.get_peft_model(model, dive_fast.DiveConfig(r=4))
    with torch.no_grad():
        for name, parameter in steered.named_parameters():
            if "dive_" in name:
                parameter.normal_(std=0.1)
    start = {n: p.detach().clone() for n, p in steered.named_parameters() if "dive_" in n}
    result = run(tmp_path, steered, RECORDS[:4], args, steering=None, supervision=supervision)
    moved = {n: start[n] - p.detach() for n, p in result.model.named_parameters() if n in start}

    def gradient(dtype):
        twin = peft.get_peft_model(tiny_llama().to(dtype), dive_fast.DiveConfig(r=4)).to(dtype)
        with torch.no_grad():
            for name, parameter in twin.named_parameters():
                if "dive_" in name:
                    parameter.copy_(start[name])
        batch = ReportCollator(ReportEncoder(tokenizer), supervision.weigher())(RECORDS[:4])
        logits = twin(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]
        ).logits[:, :-1]
        targets, weights = batch["labels"][:, 1:], batch["target_weights"][:, :-1].to(dtype)
        each = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), reduction="none")
        ((each * weights.reshape(-1)).sum() / weights.sum()).backward()
        return {n: p.grad.double() for n, p in twin.named_parameters() if "dive_" in n}

    exact, single = gradient(torch.float64), gradient(torch.float32)
    for name in exact:
        allowed = (single[name] - exact[name]).abs().max() + 1e-6
        assert (moved[name].double() - exact[name]).abs().max() <= allowed, name


def test_accumulation_does_not_change_a_step(tmp_path):
    whole = run(tmp_path / "a", args={"per_device_train_batch_size": 8}, teacher=dive_fast.Teacher(shots=2))
    parts = run(
        tmp_path / "b",
        args={"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        teacher=dive_fast.Teacher(shots=2),
    )
    torch.testing.assert_close(torch.tensor(losses(parts)), torch.tensor(losses(whole)), atol=2e-5, rtol=1e-5)


REPORTS = {"eval_reports": 3, "eval_max_new_tokens": 12}


def test_evaluations_write_and_score_reports(tmp_path, caplog):
    """At every evaluation, without a trace in the training; the scores are those of `generate` and `evaluate`."""
    args = {"max_steps": 6, "eval_strategy": "steps", "eval_steps": 2}
    silent = run(tmp_path / "silent", eval_dataset=RECORDS[:5], args=args)
    caplog.set_level("INFO", logger="dive_fast.eval_reports")
    best = {"save_strategy": "steps", "save_steps": 2, "metric_for_best_model": "rouge_l"}
    result = run(tmp_path, eval_dataset=RECORDS[:5], args=args | REPORTS | best)
    assert losses(result) == losses(silent)
    written = [entry for entry in result.history if "eval_rouge_l" in entry]
    assert [entry["step"] for entry in written] == [2, 4, 6, 6]
    assert all(0 <= entry[f"eval_{name}"] <= 1 for entry in written for name in ("decisive_f1", "terminated"))
    assert "written by the engine native" in caplog.text
    best_step = max(written[:3], key=lambda entry: entry["eval_rouge_l"])["step"]
    state = json.loads((tmp_path / "run" / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"].endswith(f"checkpoint-{best_step}")

    out = dive_fast.generate(result.model, RECORDS[:3], processor=tiny_tokenizer(), max_new_tokens=12)
    references = [record.report for record in RECORDS[:3]]
    scores = dive_fast.evaluate(out.texts, references, finish_reasons=out.finish_reasons, bootstrap=0)
    assert result.metrics["eval_rouge_l"] == scores["rouge_l"]
    assert result.metrics["eval_decisive_f1"] == scores["decisive_f1"]
    assert result.metrics["eval_terminated"] == scores["eos_rate"]


@pytest.mark.parametrize("option", ["gradient_checkpointing", "selective_checkpointing"])
def test_reports_are_written_between_checkpointed_steps(tmp_path, option):
    args = {option: True, "eval_strategy": "steps", "eval_steps": 1}
    result = run(tmp_path, eval_dataset=RECORDS[:2], args=args | REPORTS)
    plain = run(tmp_path / "plain", eval_dataset=RECORDS[:2], args=args | {option: False})
    assert losses(result) == pytest.approx(losses(plain), rel=1e-5)
    assert sum("eval_rouge_l" in entry for entry in result.history) == 5


@pytest.mark.parametrize(
    "args, options, message",
    [
        ({"eval_reports": 2}, {}, "eval_reports: .* give an eval_dataset"),
        ({"eval_reports": -1}, {}, "eval_reports: expected"),
        ({"eval_reports": 2.5}, {}, "eval_reports: expected a whole number"),
        ({"eval_reports": 1, "eval_max_new_tokens": 0}, {}, "eval_max_new_tokens: expected"),
        ({"eval_reports": 1, "eval_max_new_tokens": 2040}, {"eval_dataset": RECORDS[:1]}, "record 'r0' has .* lower"),
    ],
)
def test_reports_that_cannot_be_written_are_refused_at_once(tmp_path, args, options, message):
    with pytest.raises(InputError, match=message):
        run(tmp_path, args=args, **options)
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()


WORKER = textwrap.dedent(
    """
    import sys; sys.path.insert(0, {tests!r})
    import test_train
    from pathlib import Path
    test_train.run(Path(sys.argv[1]), args={{"per_device_train_batch_size": int(sys.argv[2])}} | test_train.REPORTS,
                   teacher=test_train.dive_fast.Teacher(shots=2), eval_dataset=test_train.RECORDS[:5])
    """
)


def worker_script(tmp_path) -> Path:
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(tests=str(Path(__file__).parent)))
    return script


def losses_stored(folder: Path):
    history = json.loads((folder / "run" / "dive_result.json").read_text())["history"]
    return torch.tensor([entry["loss"] for entry in history if "loss" in entry])


def scores_stored(folder: Path):
    metrics = json.loads((folder / "run" / "dive_result.json").read_text())["metrics"]
    return [metrics[f"eval_{name}"] for name in ("rouge_l", "decisive_f1", "terminated")]


def test_two_processes_give_the_loss_trace_of_one(tmp_path):
    script = worker_script(tmp_path)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    one = subprocess.run([sys.executable, script, tmp_path / "one", "4"], capture_output=True, text=True)
    assert one.returncode == 0, one.stderr[-2000:]
    two = subprocess.run([*torchrun, script, tmp_path / "two", "2"], capture_output=True, text=True)
    assert two.returncode == 0, two.stderr[-2000:]
    torch.testing.assert_close(losses_stored(tmp_path / "two"), losses_stored(tmp_path / "one"), atol=2e-5, rtol=1e-5)
    assert scores_stored(tmp_path / "two") == scores_stored(tmp_path / "one")


KILLED = textwrap.dedent(
    """
    import sys; sys.path.insert(0, {tests!r})
    import test_train
    from pathlib import Path
    args = {{"max_steps": 40, "save_strategy": "steps", "save_steps": 3, "per_device_train_batch_size": 4}}
    test_train.run(Path(sys.argv[1]), args=args, resume=True, teacher=test_train.dive_fast.Teacher(shots=2))
    """
)


def test_kill_and_resume_gives_the_uninterrupted_adapter_to_the_bit(tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(KILLED.format(tests=str(Path(__file__).parent)))
    kills = 0
    for step in (7, 22):
        process = subprocess.Popen(
            [sys.executable, script, tmp_path / "cut"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            reached = [int(p.name.split("-")[1]) for p in checkpoints.checkpoints(tmp_path / "cut" / "run")]
            if max(reached, default=0) >= step:
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.01)
        process.wait()
    assert kills == 2
    assert not (tmp_path / "cut" / "run" / "adapter_model.safetensors").exists()
    for folder in ("cut", "whole"):
        subprocess.run([sys.executable, script, tmp_path / folder], check=True, capture_output=True)
    assert adapter_bytes(tmp_path / "cut" / "run") == adapter_bytes(tmp_path / "whole" / "run")


def test_a_run_cut_off_after_its_last_step_takes_no_step_more(tmp_path):
    args = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    result = run(tmp_path, args=args)
    before = adapter_bytes(result.adapter_dir)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (result.adapter_dir / name).unlink()
    again = run(tmp_path, args=args, resume=True)
    assert adapter_bytes(again.adapter_dir) == before


def test_ctrl_c_saves_and_says_where(tmp_path):
    script = tmp_path / "interrupted.py"
    script.write_text(
        KILLED.format(tests=str(Path(__file__).parent))
        .replace('"save_steps": 3', '"save_steps": 1000')
        .replace('"max_steps": 40', '"max_steps": 4000')
        .replace("test_train.run(", "print('READY', flush=True); test_train.run(")
    )
    process = subprocess.Popen(
        [sys.executable, script, tmp_path / "cut"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for line in process.stdout:
        if "'loss'" in line:
            break
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    saved = checkpoints.newest_complete(tmp_path / "cut" / "run")
    assert process.returncode != 0 and saved is not None
    assert f"interrupted; saved to {saved}" in errors


def test_a_checkpoint_cut_short_is_passed_over(tmp_path):
    args = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 3}
    run(tmp_path, args=args)
    folder = tmp_path / "run"
    assert checkpoints.newest_complete(folder).name == "checkpoint-6"
    file = folder / "checkpoint-6" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    assert checkpoints.newest_complete(folder).name == "checkpoint-4"
    (folder / "checkpoint-4" / checkpoints.MANIFEST).unlink()
    assert checkpoints.newest_complete(folder).name == "checkpoint-2"
    with pytest.raises(InputError, match="cut short"):
        dive_fast.load(tiny_llama(), folder / "checkpoint-6")


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    from dive_fast import trainer

    real = trainer.checkpoints.write_manifest

    def full(folder):
        if folder.name == "checkpoint-4":
            raise OSError(28, "No space left on device")
        real(folder)

    monkeypatch.setattr(trainer.checkpoints, "write_manifest", full)
    with pytest.raises(InputError, match=r"No space left.*last whole checkpoint is .*checkpoint-2"):
        run(tmp_path, args={"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 1})
    assert [p.name for p in checkpoints.checkpoints(tmp_path / "run")] == ["checkpoint-2"]
    assert checkpoints.is_complete(tmp_path / "run" / "checkpoint-2")


def test_a_loss_that_is_not_finite_stops_and_names_the_batch(tmp_path):
    model = tiny_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[:] = float("nan")
    with pytest.raises(InputError, match="loss became nan at step 1 on records r"):
        run(tmp_path, model)


def test_layer_alignment_pulls_towards_the_teacher(tmp_path):
    from dive_fast.supervision.teacher import TeacherRunner

    supervision = dive_fast.Supervision(pathology_weight=0, eos_weight=0, kl_weight=0, align_weight=100.0)
    teacher = dive_fast.Teacher(shots=2)
    base = losses(run(tmp_path / "p", records=RECORDS[:4], supervision=PLAIN, args={"max_steps": 1}))[0]
    found = losses(
        run(tmp_path / "a", records=RECORDS[:4], supervision=supervision, teacher=teacher, args={"max_steps": 1})
    )[0]
    model, encoder = tiny_llama(), ReportEncoder(tiny_tokenizer())
    runner = TeacherRunner(model, encoder, teacher.demonstration_pool(RECORDS[:4]), layers=True)
    distances = []
    for record in RECORDS[:4]:
        target = runner.targets(record).layers
        ids = encoder.response(record.report).ids
        states = runner._response_states(encoder.prompts([record]), ids, layers=True)
        distances.append((torch.stack(states.layers) - target).detach().double().square().mean(dim=(0, 2)))
    expected = base + 100.0 * torch.cat(distances).mean().item()
    assert found == pytest.approx(expected, rel=1e-4)


def test_the_kl_term_is_the_divergence_from_the_teacher(tmp_path):
    """First-step loss = cross-entropy + 0.5 * mean KL, against softmaxes of both models' own logits in float64."""
    supervision = dive_fast.Supervision(pathology_weight=0, eos_weight=0, kl_weight=0.5)
    teacher = dive_fast.Teacher(shots=2)
    found = losses(
        run(
            tmp_path,
            records=RECORDS[:6],
            supervision=supervision,
            teacher=teacher,
            args={"max_steps": 1, "per_device_train_batch_size": 6},
        )
    )[0]
    model, encoder = tiny_llama().double(), ReportEncoder(tiny_tokenizer())
    pool, nll, kl = teacher.demonstration_pool(RECORDS[:6]), [], []

    def log_probabilities(prompt, ids):
        row = torch.cat([prompt["input_ids"][0], torch.tensor(ids)])[None]
        return torch.log_softmax(model(input_ids=row).logits[0, -len(ids) - 1 : -1], dim=-1)

    with torch.no_grad():
        for record in RECORDS[:6]:
            ids = encoder.response(record.report).ids
            student = log_probabilities(encoder.prompts([record]), ids)
            teaching = log_probabilities(encoder.prompts([record], [pool.for_record(record)]), ids)
            nll.append(-student[range(len(ids)), ids])
            kl.append((teaching.exp() * (teaching - student)).sum(dim=-1))
    expected = torch.cat(nll).mean() + 0.5 * torch.cat(kl).mean()
    assert found == pytest.approx(expected.item(), rel=1e-5)


def test_disagreement_weighs_the_tokens_teacher_and_zero_shot_differ_on(tmp_path):
    supervision = dive_fast.Supervision(tagger="disagreement", pathology_weight=3.0, eos_weight=1.0, kl_weight=0.0)
    whole = run(
        tmp_path / "a",
        supervision=supervision,
        teacher=dive_fast.Teacher(shots=2),
        args={"per_device_train_batch_size": 8},
    )
    parts = run(
        tmp_path / "b",
        supervision=supervision,
        teacher=dive_fast.Teacher(shots=2),
        args={"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    )
    torch.testing.assert_close(torch.tensor(losses(parts)), torch.tensor(losses(whole)), atol=2e-5, rtol=1e-5)
    plain = run(tmp_path / "c", supervision=PLAIN, args={"per_device_train_batch_size": 8})
    assert losses(plain)[0] != losses(whole)[0]


@pytest.mark.parametrize("kind", ["fixed", "gated", "reft", "heads"])
def test_every_kind_trains(tmp_path, kind):
    result = run(tmp_path, steering=dive_fast.DiveConfig(kind=kind, r=4), args={"max_steps": 25, "learning_rate": 0.02})
    assert sum(losses(result)[-4:]) < sum(losses(result)[:4])


def test_checkpointed_bfloat16_training_runs(tmp_path):
    result = run(tmp_path, tiny_llama().to(torch.bfloat16), args={"gradient_checkpointing": True})
    assert all(torch.isfinite(torch.tensor(losses(result))))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"records": []}, "at least one record"),
        ({"records": [Record("a", "p", " ")]}, "a"),
        ({"records": [{"prompt": "p", "text": "t"}]}, "report"),
        ({"processor": None}, "processor:"),
        ({"steering": {"r": 4}}, "steering: expected a dive_fast.DiveConfig or another peft.PeftConfig, got dict"),
        ({"supervision": {"eos_weight": 4}}, "supervision: expected a dive_fast.Supervision"),
        ({"teacher": {"shots": 2}}, "teacher: expected a dive_fast.Teacher"),
        ({"args": {"per_device_train_batch_size": 1.5}}, "per_device_train_batch_size: expected a whole number"),
        ({"args": {"max_stepz": 3}}, "did you mean 'max_steps'"),
        ({"args": {"learning_rate": "fast"}}, "args:"),
        ({"supervision": dive_fast.Supervision(tagger="disagreement")}, "disagreement"),
        ({"teacher": dive_fast.Teacher(shots=24)}, "shots"),
        ({"records": [Record("long", "word " * 3000, "r"), *RECORDS]}, "long"),
        ({"records": [Record("longer", "p", "word " * 3000), *RECORDS], "args": {"max_steps": 20}}, "longer"),
    ],
)
def test_bad_input_is_refused_by_name(tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        run(tmp_path, **change)
    assert not list((tmp_path / "run").glob("adapter*"))


def test_an_output_folder_of_another_run_is_refused(tmp_path):
    args = {"save_strategy": "steps", "save_steps": 2}
    run(tmp_path, args=args)
    with pytest.raises(InputError, match="holds another run"):
        run(tmp_path, args=args)
    with pytest.raises(InputError, match=r"other settings \(steering\.r, training\.learning_rate\)"):
        run(tmp_path, steering=dive_fast.DiveConfig(r=2), args=args | {"learning_rate": 0.1}, resume=True)


def test_load_refuses_what_is_no_adapter(tmp_path):
    with pytest.raises(InputError, match="adapter_config.json is missing"):
        dive_fast.load(tiny_llama(), tmp_path)
    run(tmp_path)
    with pytest.raises(InputError, match="hidden_size=64, this one has 32"):
        dive_fast.load(tiny_llama(hidden_size=32), tmp_path / "run")


@pytest.mark.parametrize("name", ["pathology_weight", "eos_weight", "kl_weight", "align_weight"])
def test_negative_weights_are_refused(name):
    with pytest.raises(InputError, match=f"{name}: expected a number >= 0, got -1"):
        dive_fast.Supervision(**{name: -1})


@pytest.mark.parametrize(
    "name, value",
    [
        ("learning_rate", -1),
        ("learning_rate", float("inf")),
        ("weight_decay", -1),
        ("max_grad_norm", -1),
        ("adam_beta1", 1.0),
        ("seed", -1),
        ("seed", 2**32),
        ("per_device_train_batch_size", 0),
        ("gradient_accumulation_steps", 0),
        ("save_total_limit", -1),
        ("save_steps", 0),
        ("num_train_epochs", 0),
        ("max_steps", 0),
        ("max_steps", -5),
    ],
)
def test_training_arguments_out_of_range_are_refused(tmp_path, name, value):
    with pytest.raises(InputError, match=f"args: {name}: expected"):
        run(tmp_path, args={name: value})
    assert not (tmp_path / "run").exists()


def test_a_refused_run_leaves_no_folder(tmp_path):
    model = tiny_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[:] = float("nan")
    with pytest.raises(InputError, match="loss became nan"):
        run(tmp_path, model)
    assert not (tmp_path / "run").exists()


def test_a_batch_may_mix_records_with_and_without_images():
    from dive_fast.data.films import generated_films
    from dive_fast.likelihood import report_nll
    from dive_fast.models.smol_llava import build_smol_llava

    model, processor = build_smol_llava()
    films = generated_films(4)
    records = [films[0], Record("text", "Indication: cough.", "no effusion."), *films[1:3]]
    encoder = ReportEncoder(processor)
    mixed, _ = report_nll(model, records, encoder, batch_size=4)
    alone, _ = report_nll(model, records, encoder, batch_size=1)
    assert mixed == pytest.approx(alone, rel=1e-4)
    blind, _ = report_nll(model, [Record("blind", films[0].prompt, films[0].report)], encoder)
    assert abs(blind[0] - mixed[0]) > 1e-3, "the image changes nothing"


def test_resume_says_which_checkpoint_it_passes_over(tmp_path, caplog):
    args = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = adapter_bytes(run(tmp_path, args=args).adapter_dir)
    (tmp_path / "run" / "checkpoint-4" / checkpoints.MANIFEST).unlink()
    assert adapter_bytes(run(tmp_path, args=args, resume=True).adapter_dir) == whole
    assert "checkpoint-4 is cut short" in caplog.text and "checkpoint-2" not in caplog.text


@pytest.mark.parametrize("step", ["save_adapter", "write_json"])
def test_a_full_disk_at_the_end_names_the_checkpoint(tmp_path, monkeypatch, step):
    def full(target, *rest):
        raise OSError(28, "No space left on device")

    args = {"save_strategy": "steps", "save_steps": 2}
    run(tmp_path / "a", args=args)
    monkeypatch.setattr(checkpoints, step, full)
    kept = "" if step == "write_json" else r".*checkpoint-4 is whole"
    with pytest.raises(InputError, match=rf"output_dir: .*No space left{kept}.*free disk space"):
        run(tmp_path / "b", args=args)
    assert (tmp_path / "b" / "run").exists() == (step == "save_adapter")
    assert not list((tmp_path / "b").rglob("run/adapter_model*"))


def test_a_second_ctrl_c_names_the_last_checkpoint_and_leaves_no_half(tmp_path, monkeypatch):
    real = checkpoints.write_manifest

    def interrupted(folder):
        if folder.name == "checkpoint-4":
            raise KeyboardInterrupt
        real(folder)

    monkeypatch.setattr(checkpoints, "write_manifest", interrupted)
    with pytest.raises(KeyboardInterrupt, match="saved to .*checkpoint-2") as stop:
        run(tmp_path, args={"save_strategy": "steps", "save_steps": 2})
    assert stop.value.saved_to == tmp_path / "run" / "checkpoint-2"
    assert [p.name for p in checkpoints.checkpoints(tmp_path / "run")] == ["checkpoint-2"]


@pytest.mark.parametrize(
    "file, change, message",
    [
        ("adapter_config.json", lambda text: text.replace('"r": 4', '"r": 8'), "does not fit.*size mismatch"),
        ("adapter_config.json", lambda text: text[:40], "cannot be read.*copy it again"),
        ("adapter_config.json", lambda text: "[1]", "cannot be read"),
        ("adapter_model.safetensors", lambda text: "", "cut short"),
    ],
)
def test_load_refuses_a_damaged_adapter(tmp_path, file, change, message):
    peft.get_peft_model(tiny_llama(), dive_fast.DiveConfig(r=4)).save_pretrained(tmp_path)
    path = tmp_path / file
    path.write_text(change(path.read_text(encoding="latin-1")))
    with pytest.raises(InputError, match=message):
        dive_fast.load(tiny_llama(), tmp_path)
