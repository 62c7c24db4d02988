"""Decoding with 8-bit weights, against the matrices that they stand for."""

import copy

import pytest
import torch

import dive_fast
from dive_fast.decode.int8 import int8_matrix
from dive_fast.decode.native import NativeDecoder
from dive_fast.errors import InputError
from tests.engine_checks import (
    close,
    step_logits,
    whole_logits,
)
from tests.tiny_models import (
    text_batch,
    tiny_model,
)


def rounded_to_int8(model):
    """The model with every matrix of its decoder and the head as int8 with a scale per row stands for it."""
    model = copy.deepcopy(model)
    head = model.get_output_embeddings()
    if head.weight is model.get_input_embeddings().weight:
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            rows = module.weight.detach().double()
            scales = rows.abs().amax(dim=1, keepdim=True) / 127
            module.weight.data = ((rows / scales).round() * scales).to(module.weight.dtype)
    return model


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
def test_int8_weights_are_the_rounded_matrices(family):
    model, batch = tiny_model(family), text_batch()
    batch = {k: v[:, -1:] for k, v in batch.items()}  # no prefill, which keeps the model's own matrices
    forced = torch.randint(3, 60, (3, 20), generator=torch.Generator().manual_seed(16))
    ours = step_logits(model, batch, forced, weights="int8")
    close(ours, whole_logits(rounded_to_int8(model), batch, forced))
    assert (ours - step_logits(model, batch, forced)).abs().max() > 1e-4


def test_int8_matrices_are_made_once_and_again_when_the_weights_change():
    model, batch = tiny_model("llama"), text_batch()
    plans = [NativeDecoder(model, weights="int8").plan.values for _ in range(2)]
    addresses = [[layer["down"][0] for layer in plan["layers"]] for plan in plans]
    assert addresses[0] == addresses[1]
    before = dive_fast.generate(model, batch, max_new_tokens=20, weights="int8")
    assert before.stats["engine"] == "native" and before.stats["weights"] == "int8"
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for one, other in zip(model.parameters(), tiny_model("llama", seed=99).parameters(), strict=True):
            one.copy_(other)
    after = dive_fast.generate(model, batch, max_new_tokens=20, weights="int8")
    assert [s.tolist() for s in after.sequences] != [s.tolist() for s in before.sequences]
    again = dive_fast.generate(changed, batch, max_new_tokens=20, weights="int8")
    assert [s.tolist() for s in again.sequences] == [s.tolist() for s in before.sequences]


def test_writes_past_the_version_counter_are_seen_too():
    model = tiny_model("llama")
    for place in ((0, 0), (-1, -1)):
        before = int8_matrix(model.model.layers[0].mlp.up_proj.weight)
        model.model.layers[0].mlp.up_proj.weight.data[place] += 1.0
        after = int8_matrix(model.model.layers[0].mlp.up_proj.weight)
        assert not torch.equal(before.values[place[0]], after.values[place[0]])
        assert int8_matrix(model.model.layers[0].mlp.up_proj.weight) is after


@pytest.mark.parametrize("write", [lambda w: w.flip(0), lambda w: -w, lambda w: w.roll(16, dims=1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_writes_that_leave_the_sum_of_all_words_are_seen_too(write, dtype):
    weight = torch.nn.Parameter(torch.randn(64, 64, dtype=dtype))
    before = int8_matrix(weight)
    weight.data.copy_(write(weight.data.clone()))
    after = int8_matrix(weight)
    assert after is not before
    torch.testing.assert_close(after.scales, weight.detach().float().abs().amax(dim=1) / 127)


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"weights": "int4"}, "weights: expected None or 'int8', got 'int4'"),
        ({"weights": "int8", "engine": "transformers"}, "weights: 'int8' needs the native engine"),
    ],
)
def test_weights_that_do_not_exist_are_refused(options, reason):
    with pytest.raises(InputError, match=reason):
        dive_fast.generate(tiny_model("llama"), text_batch(1), max_new_tokens=2, **options)
    with pytest.raises(InputError, match="weights: 'int8' needs the native engine, which cannot run this: .*float64"):
        dive_fast.generate(tiny_model("llama").double(), text_batch(1), max_new_tokens=2, weights="int8")
