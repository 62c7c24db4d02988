"""Adapters of PEFT's own as baselines: the same trainer, loss, teacher and data order as for steering."""

import peft
import pytest
import torch
import torch.nn.functional as F

import dive_fast
from dive_fast.adapters import trainable_parameters
from dive_fast.data.collator import ReportCollator
from dive_fast.data.encoding import ReportEncoder
from dive_fast.errors import InputError
from dive_fast.likelihood import report_nll
from dive_fast.models.fingerprint import model_fingerprint
from dive_fast.models.tiny import tiny_llama, tiny_tokenizer
from dive_fast.supervision.teacher import TeacherRunner, without_steering
from tests.training_runs import PLAIN, RECORDS, adapter_bytes, losses, run


def lora(**options) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **options})


def randomized(model, seed: int = 3):
    """Give every trainable parameter a value that matters: LoRA starts as a no-op."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def test_the_first_loss_of_lora_is_the_base_models_plain_loss(tmp_path):
    result = run(tmp_path, records=RECORDS[:4], steering=lora(), supervision=PLAIN, args={"max_steps": 1})
    batch = ReportCollator(ReportEncoder(tiny_tokenizer()))(RECORDS[:4])
    positions = batch["labels"][:, 1:] != -100

    def loss(dtype):
        with torch.no_grad():
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
            logits = tiny_llama().to(dtype)(**inputs).logits[:, :-1][positions]
            return F.cross_entropy(logits, batch["labels"][:, 1:][positions]).item()

    exact = loss(torch.float64)
    assert abs(losses(result)[0] - exact) <= abs(loss(torch.float32) - exact) + 1e-6


def test_loras_gradient_equals_float64(tmp_path):
    """One SGD step at learning rate 1 moves the matrices by minus the gradient of the weighted loss."""
    args = {"max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    supervision = dive_fast.Supervision(pathology_weight=2.0, eos_weight=3.0)
    adapted = randomized(peft.get_peft_model(tiny_llama(), lora()))
    start = {name: p.detach().clone() for name, p in adapted.named_parameters() if p.requires_grad}
    result = run(tmp_path, adapted, RECORDS[:4], args, steering=None, supervision=supervision)
    moved = {name: start[name] - p.detach() for name, p in result.model.named_parameters() if name in start}

    def gradient(dtype):
        twin = randomized(peft.get_peft_model(tiny_llama().to(dtype), lora()).to(dtype))
        batch = ReportCollator(ReportEncoder(tiny_tokenizer()), supervision.weigher())(RECORDS[:4])
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        logits = twin(**inputs).logits[:, :-1]
        targets, weights = batch["labels"][:, 1:], batch["target_weights"][:, :-1].to(dtype)
        each = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), reduction="none")
        ((each * weights.reshape(-1)).sum() / weights.sum()).backward()
        return {name: p.grad.double() for name, p in twin.named_parameters() if name in start}

    exact, single = gradient(torch.float64), gradient(torch.float32)
    assert moved.keys() == exact.keys() and len(exact) == 8
    for name in exact:
        allowed = (single[name] - exact[name]).abs().max() + 1e-6
        assert (moved[name].double() - exact[name]).abs().max() <= allowed, name


def test_lora_trains_saves_loads_and_generates(tmp_path):
    result = run(tmp_path, steering=lora(), eval_dataset=RECORDS[:4], args={"max_steps": 12, "learning_rate": 0.02})
    assert sum(losses(result)[-3:]) < sum(losses(result)[:3])
    assert result.metrics["seconds_per_step"] > 0
    trained = trainable_parameters(result.model)
    # Two layers: A and B of q (64 -> 64) and of v (64 -> 32), at rank 4.
    assert trained == 2 * (4 * (64 + 64) + 4 * (64 + 32))
    loaded = dive_fast.load(tiny_llama(), result.adapter_dir)
    encoder = ReportEncoder(tiny_tokenizer())
    assert report_nll(loaded, RECORDS[:4], encoder) == report_nll(result.model, RECORDS[:4], encoder)
    assert report_nll(loaded, RECORDS[:4], encoder, steered=False) == report_nll(tiny_llama(), RECORDS[:4], encoder)
    prompts = [record.prompt for record in RECORDS[:3]]
    options = {"processor": tiny_tokenizer(), "max_new_tokens": 8}
    output = dive_fast.generate(loaded, prompts, **options)
    assert output.stats["engine"] == "transformers" and "another PEFT method" in output.stats["not_native"]
    plain = dive_fast.generate(tiny_llama(), prompts, engine="transformers", **options)
    assert output.texts != plain.texts
    with pytest.raises(InputError, match="engine: 'native' cannot run this: .*another PEFT method"):
        dive_fast.generate(loaded, prompts, engine="native", **options)


def test_reports_are_written_while_lora_trains(tmp_path):
    args = {"eval_strategy": "steps", "eval_steps": 2, "eval_reports": 2, "eval_max_new_tokens": 6}
    result = run(tmp_path, steering=lora(), eval_dataset=RECORDS[:3], args=args)
    plain = run(tmp_path / "plain", steering=lora())
    assert "eval_rouge_l" in result.metrics and losses(result) == losses(plain)


def test_a_resumed_lora_is_the_uninterrupted_one_to_the_bit(tmp_path):
    args = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "learning_rate": 0.01}
    options = {"steering": lora(lora_dropout=0.1), "args": args, "teacher": dive_fast.Teacher(shots=2)}
    whole = adapter_bytes(run(tmp_path / "whole", **options).adapter_dir)
    folder = run(tmp_path / "cut", **options).adapter_dir
    for name in ("adapter_model.safetensors", "checkpoint-6/dive_manifest.json"):
        (folder / name).unlink()
    assert adapter_bytes(run(tmp_path / "cut", **options, resume=True).adapter_dir) == whole
    with pytest.raises(InputError, match="other settings .steering.r: 4 there, 2 now; steering.target_modules: "):
        run(
            tmp_path / "cut",
            **{**options, "steering": lora(r=2, target_modules=["q_proj"], lora_dropout=0.1)},
            resume=True,
        )


def test_the_teacher_of_a_lora_is_the_frozen_model(tmp_path):
    """Its targets and its place in the cache do not depend on what is adapted, nor does asking change the adapter."""
    encoder, teacher = ReportEncoder(tiny_tokenizer()), dive_fast.Teacher(shots=2, cache_dir=str(tmp_path))
    pool = teacher.demonstration_pool(RECORDS)
    models = {
        "base": tiny_llama(),
        "lora": randomized(peft.get_peft_model(tiny_llama(), lora(modules_to_save=["gate_proj"]))),
        "steered": randomized(peft.get_peft_model(tiny_llama(), dive_fast.DiveConfig(r=4))),
    }
    before = [name for name, p in models["lora"].named_parameters() if p.requires_grad]
    found = {}
    for name, model in models.items():
        runner = TeacherRunner(model, encoder, pool)
        found[name] = runner.targets(RECORDS[0]).statistics
        inside = model if name == "base" else model.get_base_model()
        assert model_fingerprint(inside) == model_fingerprint(models["base"])
    for name in ("lora", "steered"):
        assert all(torch.equal(a, b) for a, b in zip(found[name], found["base"], strict=True))
    assert [name for name, p in models["lora"].named_parameters() if p.requires_grad] == before
    prompt = tiny_tokenizer()("Indication: case 1.", return_tensors="pt")
    with without_steering(models["lora"]):
        assert torch.equal(models["lora"](**prompt).logits, models["base"](**prompt).logits)
    assert not torch.equal(models["lora"](**prompt).logits, models["base"](**prompt).logits)


def test_one_teacher_cache_serves_every_adapter(tmp_path):
    """The same first loss, since all start as no-ops; the second and third run find what the first computed."""
    teacher, passes = dive_fast.Teacher(shots=2, cache_dir=str(tmp_path / "cache")), []
    first = {}
    for name, steering in {"steered": dive_fast.DiveConfig(r=4), "lora": lora(), "again": lora(r=2)}.items():
        with pytest.MonkeyPatch.context() as patch:
            real = TeacherRunner._compute
            patch.setattr(TeacherRunner, "_compute", lambda *a: passes.append(name) or real(*a))  # noqa: B023
            result = run(
                tmp_path / name, records=RECORDS[:4], steering=steering, teacher=teacher, args={"max_steps": 1}
            )
        first[name] = losses(result)[0]
    assert passes == ["steered"] * 4
    assert first["lora"] == pytest.approx(first["steered"], rel=1e-6) and first["again"] == first["lora"]


def test_every_adapter_meets_the_same_records_in_the_same_order(tmp_path, monkeypatch):
    seen, real = [], ReportCollator.__call__
    monkeypatch.setattr(
        ReportCollator, "__call__", lambda self, rows: seen.append([r.id for r in rows]) or real(self, rows)
    )
    orders = []
    for name, steering in {
        "a": dive_fast.DiveConfig(r=4),
        "b": dive_fast.DiveConfig(kind="fixed"),
        "c": lora(),
    }.items():
        run(tmp_path / name, steering=steering, args={"max_steps": 7, "seed": 5, "data_seed": 5})
        orders.append(list(seen))
        seen.clear()
    assert len(orders[0]) >= 7 and orders[0] == orders[1] == orders[2]
    assert orders[0][0] != orders[0][6], "the second epoch is shuffled anew"


@pytest.mark.parametrize(
    "config, message",
    [
        (peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "PROMPT_TUNING puts tokens of its own"),
        (peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10), "ADALORA changes its ranks"),
        (lora(bias="all"), "bias='all' trains the frozen model's own biases"),
        (lora(target_modules=["lm_head"]), "adapts the head"),
        (lora(modules_to_save=["lm_head"]), "adapts the head"),
        (lora(target_modules=["query"]), "PEFT refuses this LORA configuration .*query"),
        (lora(r=0), "PEFT refuses this LORA configuration .*r"),
    ],
)
def test_adapters_that_the_loss_cannot_serve_are_refused(tmp_path, config, message):
    model = tiny_llama()
    with pytest.raises(InputError, match=f"steering: .*{message}"):
        run(tmp_path, model, steering=config)
    assert not (tmp_path / "run").exists()
    assert not any("lora" in name for name in model.state_dict()) or config.r == 0


def test_load_refuses_adapters_of_the_prompt(tmp_path):
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    peft.get_peft_model(tiny_llama(), config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="holds a PROMPT_TUNING adapter, which puts tokens in front of the prompt"):
        dive_fast.load(tiny_llama(), tmp_path)
