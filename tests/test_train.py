"""What `dive_fast.train` computes, on a tiny random model: loss, teacher, accumulation, reports at evaluations."""

import json
from functools import partial
from types import SimpleNamespace

import peft
import pytest
import torch
import torch.nn.functional as F
from transformers import TrainingArguments

import dive_fast
from dive_fast import ops
from dive_fast.data.collator import ReportCollator
from dive_fast.data.encoding import ReportEncoder
from dive_fast.data.record import Record
from dive_fast.errors import InputError
from dive_fast.models.tiny import tiny_llama, tiny_tokenizer
from tests.training_runs import PLAIN, RECORDS, REPORTS, SHORT, losses, run


def test_training_writes_an_adapter_that_load_reads_back(tmp_path):
    result = run(tmp_path, eval_dataset=RECORDS[:5], args={"max_steps": 30})
    assert sum(losses(result)[-3:]) < sum(losses(result)[:3]), "the loss does not go down"
    assert result.metrics["eval_perplexity"] == pytest.approx(torch.tensor(result.metrics["eval_loss"]).exp().item())
    loaded = dive_fast.load(tiny_llama(), result.adapter_dir)
    prompt = tiny_tokenizer()("Indication: case 1.", return_tensors="pt")
    assert torch.equal(loaded(**prompt).logits, result.model(**prompt).logits)
    pickles = [p for p in (tmp_path / "run").rglob("*") if p.suffix in (".bin", ".pt", ".pkl", ".pth")]
    assert not pickles


def test_load_warns_of_other_weights(tmp_path, caplog):
    folder = run(tmp_path).adapter_dir
    other = tiny_llama()
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.mul_(1.01)
    for base in (tiny_llama(), tiny_llama().bfloat16(), tiny_llama().double(), tiny_llama().half()):
        dive_fast.load(base, folder)
    assert not caplog.records
    dive_fast.load(other, folder).unload()
    assert "was trained on another model of the same shape, whose weights or settings" in caplog.text
    caplog.clear()
    dive_fast.load(other.half(), folder).unload()  # rounded otherwise than the weights that were compared
    for content in ("{", "[]", '{"model": 1}', '{"model": {"dtype": "torch.float32"}}'):
        (folder / "dive_setup.json").write_text(content)
        dive_fast.load(other, folder).unload()
    (folder / "dive_setup.json").unlink()
    dive_fast.load(other, folder).unload()
    assert not caplog.records


@pytest.mark.parametrize("quick", [True, False, None])
def test_a_dtype_that_trains_slowly_here_is_named(tmp_path, caplog, monkeypatch, quick):
    cpu = SimpleNamespace(bf16_products_are_quick=lambda: quick)
    extension = SimpleNamespace(cpu=cpu)
    monkeypatch.setattr("dive_fast.models.backbone.native", SimpleNamespace(load=lambda: extension))
    run(tmp_path / "full", tiny_llama(), args={"max_steps": 1})
    assert not caplog.records
    run(tmp_path / "half", tiny_llama().bfloat16(), args={"max_steps": 1})
    assert ("multiplies bfloat16 more slowly than float32" in caplog.text) is (quick is False)


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
