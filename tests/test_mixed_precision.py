"""Autocast: what the layers around the steering do in bfloat16, and what ours do not."""

from dataclasses import replace

import peft
import pytest
import torch

import dive_fast
from dive_fast import ops
from dive_fast.models.tiny import tiny_llama, tiny_tokenizer
from dive_fast.steering.heads import demonstration_share
from tests.tiny_models import tiny_model
from tests.training_runs import RECORDS, losses, run

KINDS = {
    "lowrank": dive_fast.DiveConfig(r=4),
    "lowrank, all positions": dive_fast.DiveConfig(r=4, scope="all"),
    "lowrank, attention": dive_fast.DiveConfig(r=4, site="attention"),
    "gated": dive_fast.DiveConfig(kind="gated"),
    "reft": dive_fast.DiveConfig(kind="reft", r=4),
    "fixed": dive_fast.DiveConfig(kind="fixed"),
    "heads": dive_fast.DiveConfig(kind="heads"),
}
NO_PUSH_AT_FIRST = [name for name in KINDS if name not in ("fixed", "heads")]


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


def of_ops(backend) -> dict:
    """Name -> a call of an op whose products an autocast would narrow."""
    hidden, weight = torch.randn(9, 32), torch.randn(64, 32)
    targets, down, up = torch.arange(9), torch.randn(4, 32), torch.randn(32, 4)
    q, k = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8)
    calls = {
        "loss": lambda: ops.linear_cross_entropy(hidden, weight, targets, backend=backend),
        "by name": lambda: ops.linear_cross_entropy(targets=targets, weight=weight, hidden=hidden, backend=backend),
        "steer": lambda: ops.steer(hidden, hidden, down=down, up=up, backend=backend),
    }
    if backend == "reference":
        calls["statistics"] = lambda: ops.teacher_statistics(hidden, weight, top_k=4).tail_mean_weight
        calls["share"] = lambda: demonstration_share(q, k, None, 0.35, torch.randn(4, 8), torch.zeros(4))
    return calls


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_an_op_computes_as_documented(backend):
    for name, call in of_ops(backend).items():
        torch.manual_seed(1)
        expected = call()
        torch.manual_seed(1)
        with autocast():
            found = call()
        assert found.dtype == torch.float32 and torch.equal(found, expected), name


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3", "idefics3"])
@pytest.mark.parametrize("kind", NO_PUSH_AT_FIRST)
def test_a_fresh_adapter_changes_nothing(family, kind):
    model, tokens = tiny_model(family).eval(), torch.arange(5, 25).view(2, 10)
    with torch.no_grad(), autocast():
        expected = model(tokens).logits
    steered = peft.get_peft_model(model, replace(KINDS[kind])).eval()
    with torch.no_grad(), autocast():
        assert torch.equal(steered(tokens, response_positions=tokens > 9).logits, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_trains(tmp_path, kind):
    full = losses(run(tmp_path / "full", steering=replace(KINDS[kind])))
    result = run(tmp_path / "mixed", steering=replace(KINDS[kind]), args={"bf16": True, "use_cpu": True})
    assert losses(result) == pytest.approx(full, rel=5e-3) and losses(result) != full
    adapter = [p for p in result.model.parameters() if p.requires_grad]
    assert all(p.dtype == torch.float32 for p in adapter)


@pytest.mark.parametrize("args", [{"bf16": True}, {"gradient_checkpointing": True}, {"selective_checkpointing": True}])
def test_a_trained_model_is_left_as_a_loaded_one(tmp_path, args):
    result = run(tmp_path, args={"use_cpu": True, **args})
    loaded = dive_fast.load(tiny_llama(), result.adapter_dir)
    outputs = [
        dive_fast.generate(model, RECORDS[:3], processor=tiny_tokenizer(), max_new_tokens=8)
        for model in (result.model, loaded)
    ]
    assert [output.stats["engine"] for output in outputs] == ["native", "native"]
    assert outputs[0].texts == outputs[1].texts
