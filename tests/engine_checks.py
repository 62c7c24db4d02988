"""What the tests of the decoding engine share: the engine and transformers, asked for the same logits."""

import peft
import torch

import dive_fast
from dive_fast.decode.native import NativeDecoder, Sampling
from dive_fast.models.spec import text_config_of
from tests.tiny_models import (
    IMAGE_LENGTH,
    IMAGE_TOKEN,
    VISION_FAMILIES,
    image_inputs,
    randomize_adapters,
    text_batch,
    tiny_model,
)

ROWS = range(3)


KINDS = ("lowrank", "fixed", "gated", "reft")


REQUEST = {
    "temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "seed": 0,
    "eos": [], "min_new_tokens": 0, "log_probs": False,
}  # fmt: skip
"""A greedy request of the extension, without its length."""


def decode(model, batch, steps, *, eos=(), names=None, sampling=None, max_rows=8, **options):
    """The engine's rows for a batch, as lists of tokens in the batch's order."""
    rows = range(batch["input_ids"].shape[0])
    found = NativeDecoder(model, names).run(
        [(batch, rows, names)],
        max_rows=max_rows,
        sampling=sampling or Sampling(),
        eos=eos,
        min_new_tokens=0,
        max_new_tokens=steps,
        **options,
    )
    return [found[row].tokens for row in rows]


def step_logits(model, batch, forced, names=None, weights=None, **options):
    """The engine's logits [B, N, V] when it is made to take the tokens of `forced` [B, N]."""
    decoder = NativeDecoder(model, names, weights)
    rows, steps = forced.shape
    session = decoder.session(rows, **options)
    logits = torch.zeros(rows, steps, decoder.plan.values["vocabulary"])
    requests = [
        REQUEST | {"max_new_tokens": steps, "forced": forced[row].tolist(), "forced_logits": logits[row].data_ptr()}
        for row in range(rows)
    ]
    decoder.submit(session, batch, names, requests)
    session.run(on_token=None, cancelled=None, until_free=0)
    return logits


@torch.no_grad()
def whole_logits(model, batch, forced, names=None):
    """transformers' logits [B, N, V] for the same tokens from one pass over everything, without a cache."""
    length, rows = batch["input_ids"].shape[1], forced.shape[0]
    ids = torch.cat([batch["input_ids"], forced[:, :-1]], dim=1)
    mask = torch.cat([batch["attention_mask"], torch.ones_like(forced[:, :-1])], dim=1)
    more = {k: v for k, v in batch.items() if k not in ("input_ids", "attention_mask")}
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in more:
            more[name] = torch.cat([more[name], torch.zeros_like(forced[:, :-1])], dim=1)
    if hasattr(model, "peft_config"):
        positions = torch.arange(ids.shape[1]).expand(rows, -1) >= length - 1
        more["response_positions"] = positions
        if names is not None:
            more["adapter_names"] = names
    if "image_grid_thw" not in more:
        more["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)
        if text_config_of(getattr(model, "get_base_model", lambda: model)()).model_type == "qwen2_5_vl_text":
            more["position_ids"] = more["position_ids"].expand(3, -1, -1)
    return model(input_ids=ids, attention_mask=mask, use_cache=False, **more).logits[:, length - 1 :]


def assert_greedy(tokens, model, batch, names=None, floor=1e-5):
    """Every token is the likeliest after those before it, up to near ties of the logits of one pass over all."""
    forced = torch.tensor(tokens)
    logits = whole_logits(model, batch, forced, names)
    taken = logits.gather(-1, forced[..., None]).squeeze(-1)
    short = logits.amax(dim=-1) - taken
    assert (short <= floor * logits.abs().amax(dim=-1)).all(), short.max()


def batch_of(family, images=True):
    """Three prompts of unequal length, with an image each where the family sees."""
    batch = text_batch()
    if family not in VISION_FAMILIES or not images:
        return batch
    batch["input_ids"][:, 4 : 4 + IMAGE_LENGTH] = IMAGE_TOKEN
    return batch | image_inputs(family, batch["input_ids"])


def close(ours, theirs, tolerance=1e-4):
    scale = theirs.abs().amax(dim=-1, keepdim=True)
    assert ((ours - theirs).abs() <= tolerance * scale).all(), ((ours - theirs).abs() / scale).max()


def steered(family="llama", **config):
    return randomize_adapters(peft.get_peft_model(tiny_model(family), dive_fast.DiveConfig(r=4, **config)).eval())


def mixed_model():
    model = steered(kind="lowrank", scope="response")
    model.add_adapter("vector", dive_fast.DiveConfig(kind="fixed", scope="all", site="attention"))
    model.add_adapter("wide", dive_fast.DiveConfig(kind="reft", r=7, scope="response"))
    return randomize_adapters(model)
