"""Steering inside the decoding engine, against one uncached pass through the steered model."""

import copy

import peft
import pytest
import torch

import dive_fast
from dive_fast.decode.native import NativeDecoder
from dive_fast.models.spec import text_config_of
from tests.engine_checks import (
    KINDS,
    assert_greedy,
    batch_of,
    close,
    decode,
    mixed_model,
    steered,
    step_logits,
    whole_logits,
)
from tests.tiny_models import (
    FAMILIES,
    VISION_FAMILIES,
    randomize_adapters,
    text_batch,
    tiny_model,
)


@pytest.mark.parametrize("site", ["block", "attention"])
@pytest.mark.parametrize("scope", ["response", "prompt", "all"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_steered_logits_equal_those_of_one_uncached_pass(family, kind, scope, site):
    model, batch = steered(family, kind=kind, scope=scope, site=site), batch_of(family)
    forced = torch.randint(3, 60, (3, 12), generator=torch.Generator().manual_seed(6))
    ours = step_logits(model, batch, forced)
    close(ours, whole_logits(model, batch, forced))
    with model.disable_adapter():
        base = whole_logits(model, batch, forced)
    assert (ours - base).abs().max() > 1e-3


@pytest.mark.parametrize(
    "family, scope", [*((family, "all") for family in FAMILIES), ("llama", "response"), ("llama", "prompt")]
)
@pytest.mark.parametrize("kind", KINDS)
def test_200_steered_tokens_are_the_likeliest_ones(family, kind, scope):
    # Without images: among 200 random tokens are some that stand for images, which one pass over all would look for.
    model, batch = steered(family, kind=kind, scope=scope), batch_of(family, images=False)
    text_config_of(model.get_base_model()).max_position_embeddings = 512
    assert_greedy(decode(model, batch, 200), model, batch)


@pytest.mark.parametrize("activation", ["silu", "identity", "relu", "gelu", "tanh"])
@pytest.mark.parametrize("options", [{}, {"normalize_input": False}, {"preserve_norm": True, "alpha": 0.5}])
def test_every_shape_of_the_push_is_computed(activation, options):
    model, batch = steered(activation=activation, layers_to_transform=[0, 2], **options), text_batch()
    forced = torch.randint(3, 60, (3, 8), generator=torch.Generator().manual_seed(7))
    close(step_logits(model, batch, forced), whole_logits(model, batch, forced))


@pytest.mark.parametrize("family", VISION_FAMILIES)
@pytest.mark.parametrize("scope", ["response", "all"])
def test_steering_behind_images(family, scope):
    model, batch = steered(family, scope=scope), batch_of(family)
    tokens = decode(model, batch, 40)
    with torch.no_grad():
        theirs = model.generate(**batch, max_new_tokens=40, do_sample=False)[:, batch["input_ids"].shape[1] :]
    assert tokens == theirs.tolist()


@pytest.mark.parametrize("kind", ["lowrank", "gated", "reft"])
@pytest.mark.parametrize("site", ["block", "attention"])
def test_an_untrained_adapter_changes_no_bit(kind, site):
    base, batch = tiny_model("llama"), text_batch()
    forced = torch.randint(3, 60, (3, 8), generator=torch.Generator().manual_seed(8))
    before = step_logits(base, batch, forced)
    model = peft.get_peft_model(base, dive_fast.DiveConfig(kind=kind, site=site, r=4)).eval()
    assert torch.equal(step_logits(model, batch, forced), before)


def test_rows_of_one_batch_carry_different_adapters():
    model, batch = mixed_model(), text_batch(4, left_padding=(0, 2, 4, 1))
    names = ["default", "__base__", "vector", "wide"]
    forced = torch.randint(3, 60, (4, 10), generator=torch.Generator().manual_seed(9))
    ours = step_logits(model, batch, forced, names)
    close(ours, whole_logits(model, batch, forced, names))
    with model.disable_adapter():
        base = step_logits(model, batch, forced)
    assert torch.equal(ours[1], base[1])
    assert all((ours[row] - base[row]).abs().max() > 1e-3 for row in (0, 2, 3))


def test_several_active_adapters_act_in_their_order():
    model, batch = mixed_model(), text_batch()
    model.base_model.set_adapter(["wide", "default"])
    forced = torch.randint(3, 60, (3, 6), generator=torch.Generator().manual_seed(10))
    close(step_logits(model, batch, forced), whole_logits(model, batch, forced))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["lowrank", "reft"])
def test_steering_of_half_precision_models_stays_nearer_to_float64_than_transformers(kind, dtype):
    def model_of(dtype):
        model = peft.get_peft_model(tiny_model("llama", dtype), dive_fast.DiveConfig(kind=kind, r=4)).eval()
        return randomize_adapters(model)

    model, batch = model_of(dtype), text_batch()
    forced = torch.randint(3, 60, (3, 24), generator=torch.Generator().manual_seed(17))
    ours, theirs = step_logits(model, batch, forced), whole_logits(model, batch, forced).double()
    exact = whole_logits(copy.deepcopy(model).double(), batch, forced)
    assert (ours - exact).abs().mean() <= (theirs - exact).abs().mean()


def test_adapter_numbers_that_float16_cannot_hold_stay_float32():
    for factor in (1e-7, 1e6):
        model = steered(normalize_input=False)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "dive_down" in name:
                    parameter.mul_(factor)
                elif "dive_up" in name:
                    parameter.div_(factor)
        model = model.to(torch.bfloat16)
        for name, parameter in model.named_parameters():
            if "dive_" in name:
                parameter.data = parameter.data.float()
        values = NativeDecoder(model).plan.values["adapters"][0]["block"][0]
        assert values["matrices"][1] == 0
