"""Prompts that begin alike are run once: the same tokens and logits as without, and never another model's keys."""

import gc

import peft
import pytest
import torch

import dive_fast
from dive_fast.data.record import Record
from dive_fast.decode.native import NativeDecoder
from dive_fast.decode.prefix_cache import BLOCK
from dive_fast.errors import InputError
from dive_fast.models.tiny import tiny_llama, tiny_tokenizer
from tests.engine_checks import KINDS, REQUEST, close, mixed_model, steered, whole_logits
from tests.tiny_models import (
    FAMILIES,
    IMAGE_LENGTH,
    IMAGE_TOKEN,
    VISION_FAMILIES,
    image_inputs,
    tiny_model,
)

PLENTY = 2**30


def batch_with(shared, lengths, seed=1, rest_seed=None):
    """Left-padded prompts of these lengths, which share their first tokens."""
    generator = torch.Generator().manual_seed(seed)
    head = torch.randint(3, 60, (shared,), generator=generator)
    generator = generator if rest_seed is None else torch.Generator().manual_seed(rest_seed)
    rows = [torch.cat([head, torch.randint(3, 60, (n - shared,), generator=generator)]) for n in lengths]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side="left")
    mask = torch.arange(ids.shape[1]) >= torch.tensor([[ids.shape[1] - n] for n in lengths])
    return {"input_ids": ids, "attention_mask": mask.long()}


def logits_of(model, batch, cache, names=None, steps=4):
    """(the engine's logits for some fixed tokens, prompt tokens reused)."""
    decoder = NativeDecoder(model, names)
    rows = len(batch["input_ids"])
    forced = torch.randint(3, 60, (rows, steps), generator=torch.Generator().manual_seed(6))
    session = decoder.session(rows)
    logits = torch.zeros(rows, steps, decoder.plan.values["vocabulary"])
    requests = [
        REQUEST | {"max_new_tokens": steps, "forced": forced[row].tolist(), "forced_logits": logits[row].data_ptr()}
        for row in range(rows)
    ]
    decoder.submit(session, batch, names, requests, cache)
    session.run(on_token=None, cancelled=None, until_free=0)
    return logits, decoder.prefill.reused


def check(model, batch, cache, reused, names=None):
    """With the cache as without it, and so many tokens not run."""
    plain, _ = logits_of(model, batch, None, names)
    found, count = logits_of(model, batch, cache, names)
    close(found, plain, 1e-5)
    assert count == reused


LENGTHS = (70, 49, 41, 90)
SHARED = 40
WHOLE = SHARED // BLOCK * BLOCK
EVERYTHING = sum((n - 1) // BLOCK * BLOCK for n in LENGTHS)


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_share_what_they_begin_with(family):
    model, cache = tiny_model(family), dive_fast.PrefixCache(PLENTY)
    # One row runs the common blocks, the other three take them over; in the next call all of it is there.
    check(model, batch_with(SHARED, LENGTHS), cache, 3 * WHOLE)
    check(model, batch_with(SHARED, LENGTHS), cache, EVERYTHING)
    check(model, batch_with(SHARED, (44, 60), rest_seed=9), cache, 2 * WHOLE)
    check(model, batch_with(SHARED, (44, 60), seed=8), cache, WHOLE)


@pytest.mark.parametrize("length", [1, 2, BLOCK, BLOCK + 1, BLOCK + 2, 2 * BLOCK + 1])
def test_prompts_at_the_borders_of_blocks(length):
    model, cache = tiny_model("llama"), dive_fast.PrefixCache(PLENTY)
    batch = batch_with(length, (length,))
    check(model, batch, cache, 0)
    check(model, batch, cache, (length - 1) // BLOCK * BLOCK)


def test_nested_common_beginnings():
    """Two rows share three blocks, a third one shares one of them: four blocks run where rows would run six."""
    model, cache = tiny_model("llama"), dive_fast.PrefixCache(PLENTY)
    batch = batch_with(3 * BLOCK, (60, 60, 60))
    batch["input_ids"][2, BLOCK:] = torch.randint(3, 60, (60 - BLOCK,), generator=torch.Generator().manual_seed(3))
    check(model, batch, cache, 3 * BLOCK + BLOCK)


@pytest.mark.parametrize("scope", ["response", "prompt", "all"])
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_have_their_own_prefixes_unless_they_leave_the_prompt_alone(kind, scope):
    model, cache = steered(kind=kind, scope=scope), dive_fast.PrefixCache(PLENTY)
    batch = batch_with(SHARED, LENGTHS)
    own = EVERYTHING if scope == "response" else 3 * WHOLE
    with model.disable_adapter():
        check(model, batch, cache, 3 * WHOLE)
    check(model, batch, cache, own)
    check(model, batch, cache, EVERYTHING)
    forced = torch.randint(3, 60, (4, 4), generator=torch.Generator().manual_seed(6))
    close(logits_of(model, batch, cache)[0], whole_logits(model, batch, forced))
    # A step of training, and weights that are loaded.
    parameter = next(p for n, p in model.named_parameters() if "dive_" in n)
    with torch.no_grad():
        parameter.add_(0.1)
    check(model, batch, cache, own)
    model.load_state_dict({k: v * 1.5 for k, v in model.state_dict().items() if "dive_" in k}, strict=False)
    check(model, batch, cache, EVERYTHING if scope == "response" else 3 * WHOLE)


def test_rows_with_different_adapters():
    model, cache = mixed_model(), dive_fast.PrefixCache(PLENTY)
    batch = batch_with(SHARED, LENGTHS)
    names = ["default", "__base__", "vector", "wide"]  # of these only "vector" acts on the prompt
    check(model, batch, cache, 2 * WHOLE, names)
    check(model, batch, cache, EVERYTHING, names)
    names = ["vector", "default", "__base__", "vector"]
    check(model, batch, cache, sum((n - 1) // BLOCK * BLOCK for n in LENGTHS[1:3]) + 2 * WHOLE, names)


def test_other_weights_and_other_models_find_nothing():
    cache, batch = dive_fast.PrefixCache(PLENTY), batch_with(SHARED, LENGTHS)
    model = tiny_model("llama")
    check(model, batch, cache, 3 * WHOLE)
    check(tiny_model("llama"), batch, cache, 3 * WHOLE)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    check(model, batch, cache, 3 * WHOLE)
    check(model, batch, cache, EVERYTHING)
    del model
    for seed in range(3):
        gc.collect()  # another model may get the address of the one before
        check(tiny_model("llama", seed=seed), batch, cache, 3 * WHOLE)


def image_batch(family, pixels=3, start=4, rows=3):
    batch = batch_with(30, [60] * rows)
    batch["input_ids"][:, start : start + IMAGE_LENGTH] = IMAGE_TOKEN
    return batch | image_inputs(family, batch["input_ids"], seed=pixels)


@pytest.mark.parametrize("scope", [None, "all"])
@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_images_are_part_of_what_is_looked_up(family, scope):
    model = tiny_model(family) if scope is None else steered(family, scope=scope)
    cache, everything = dive_fast.PrefixCache(PLENTY), 3 * (59 // BLOCK * BLOCK)
    check(model, image_batch(family), cache, 0)
    check(model, image_batch(family), cache, everything)
    check(model, image_batch(family, pixels=4), cache, 0)
    check(model, image_batch(family), cache, everything)
    # Other text behind the same images: what is common reaches behind them.
    other = image_batch(family)
    other["input_ids"][:, 40:] = torch.randint(3, 60, (3, 20), generator=torch.Generator().manual_seed(5))
    check(model, other, cache, 3 * (40 // BLOCK * BLOCK))
    # The common part ends in front of an image: nothing of it is taken.
    late = image_batch(family, start=40)
    check(model, late, cache, 0)
    # The same text without pictures has nothing to do with it.
    text = {k: v for k, v in late.items() if k in ("input_ids", "attention_mask")}
    text["input_ids"] = text["input_ids"].where(text["input_ids"] != IMAGE_TOKEN, 7)
    check(model, text, cache, 2 * BLOCK)


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_rows_that_change_places_keep_their_images(family):
    model, cache = tiny_model(family), dive_fast.PrefixCache(PLENTY)
    batch = image_batch(family)
    check(model, batch, cache, 0)
    swapped = dict(batch)
    swapped["pixel_values"] = batch["pixel_values"].flip(0)
    check(model, swapped, cache, 0)


def test_the_longest_unused_leave_first():
    model = tiny_model("llama")
    one = dive_fast.PrefixCache(PLENTY)
    logits_of(model, batch_with(BLOCK + 1, (BLOCK + 1,)), one)
    assert len(one) == 1
    size = one.nbytes
    cache = dive_fast.PrefixCache(6 * size)
    first, second = batch_with(49, (49,), seed=1), batch_with(49, (49,), seed=2)
    check(model, first, cache, 0)
    check(model, second, cache, 0)
    assert (len(cache), cache.nbytes) == (6, 6 * size)
    check(model, first, cache, 48)
    # The third prompt takes the places of the second one, from its end on.
    check(model, batch_with(33, (33,), seed=3), cache, 0)
    assert cache.nbytes == 6 * size
    check(model, second, cache, BLOCK)
    cache.clear()
    assert (len(cache), cache.nbytes) == (0, 0)
    check(model, first, cache, 0)


def test_a_cache_too_small_for_anything_changes_nothing():
    check(tiny_model("llama"), batch_with(SHARED, LENGTHS), dive_fast.PrefixCache(1), -WHOLE)


def test_generation_from_demonstrations_runs_them_once():
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    demos = [Record(str(i), f"Indication: cough {i}. Describe the findings.", "The heart is normal.") for i in range(3)]
    prompts = [Record(str(i), f"Indication: {w}.", "") for i, w in enumerate(("fever", "pain", "a fall", "nothing"))]
    options = {"processor": tokenizer, "max_new_tokens": 12, "demonstrations": [demos] * 4, "engine": "native"}
    plain = dive_fast.generate(model, prompts, **options)
    assert "prompt_tokens_reused" not in plain.stats
    for size in (1, 4):
        cache = dive_fast.PrefixCache(max_bytes=PLENTY)
        out = dive_fast.generate(model, prompts, prefix_cache=cache, batch_size=size, **options)
        assert out.texts == plain.texts
        assert out.stats["prompt_tokens_reused"] > 0.6 * out.stats["prompt_tokens"]
        again = dive_fast.generate(model, prompts, prefix_cache=cache, batch_size=size, **options)
        assert again.texts == plain.texts
        assert again.stats["prompt_tokens_reused"] > 0.9 * out.stats["prompt_tokens"]
    beams = {"num_beams": 3, "num_return_sequences": 2}
    assert (
        dive_fast.generate(model, prompts, prefix_cache=cache, **options, **beams).texts
        == dive_fast.generate(model, prompts, **options, **beams).texts
    )


def test_adapters_with_prompt_scope_may_be_replaced():
    """A new adapter of the same name and, perhaps, at the same address."""
    model, cache = steered(scope="all"), dive_fast.PrefixCache(PLENTY)
    batch = batch_with(SHARED, LENGTHS)
    check(model, batch, cache, 3 * WHOLE)
    for _ in range(3):
        model.delete_adapter("default")
        gc.collect()
        model.add_adapter("default", dive_fast.DiveConfig(r=4, scope="all", kind="fixed"))
        model.set_adapter("default")
        check(model.eval(), batch, cache, 3 * WHOLE)
    assert isinstance(model, peft.PeftModel)


@pytest.mark.parametrize("fused", [True, False])
def test_an_optimisers_step_between_two_calls_is_seen(fused):
    """A fused one changes parameters behind torch's count of writes."""
    model, cache = steered(kind="lowrank", scope="all"), dive_fast.PrefixCache(PLENTY)
    batch = batch_with(SHARED, LENGTHS)
    logits_of(model, batch, cache)
    parameters = [p for name, p in model.named_parameters() if "dive_" in name]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    torch.optim.AdamW(parameters, lr=0.1, fused=fused).step()
    plain, _ = logits_of(model, batch, None)
    found, _ = logits_of(model, batch, cache)
    close(found, plain, 1e-5)


def test_models_made_in_inference_mode_have_prefixes_too():
    with torch.inference_mode():
        model = steered(kind="reft", scope="all")
    check(model, batch_with(SHARED, LENGTHS), dive_fast.PrefixCache(PLENTY), 3 * WHOLE)
    found = dive_fast.generate(model, batch_with(SHARED, LENGTHS), max_new_tokens=3, weights="int8")
    assert found.stats["engine"] == "native"


@pytest.mark.parametrize("value", [0, -1, 2.5, True, "big"])
def test_nonsense_is_refused(value):
    with pytest.raises(InputError, match="max_bytes: expected a whole number >= 1"):
        dive_fast.PrefixCache(value)
    with pytest.raises(InputError, match="prefix_cache: expected a dive_fast.PrefixCache"):
        dive_fast.generate(tiny_llama(), ["x"], processor=tiny_tokenizer(), prefix_cache=value)
