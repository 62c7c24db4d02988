"""A prompt that is run once, and what follows it computed from its keys and values.

Where nothing steers the prompt it belongs to the frozen model: it needs no gradient, and whatever comes behind it (a
report that is trained on, the query behind a teacher's demonstrations) needs only its cache.

B batch rows, P prompt tokens (left-padded), R tokens behind them (right-padded), L layers, H key/value heads.
"""

from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from dive_fast.models.cache_argument import cache_argument
from dive_fast.models.hidden import NO_POSITIONS, HiddenStates, hidden_states, unwrapped
from dive_fast.models.spec import text_config_of

# Layers whose cache is a key and a value for every position.
_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}


@dataclass(frozen=True)
class Prefix:
    """Keys and values of prompts, without gradient.

    Attributes:
        layers: L pairs (keys, values), [B, H, P, head_dim] each.
        mask: int64 [B, P], 0 on padding.
        rope_deltas: [B, 1], how far positions behind the prompt run ahead of token counts where images have positions
            of their own (M-RoPE); None elsewhere.
    """

    layers: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    mask: torch.Tensor
    rope_deltas: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        return sum(x.numel() * x.element_size() for pair in self.layers for x in pair)

    def rows(self, index: slice) -> "Prefix":
        """The prompts of some batch rows."""
        deltas = None if self.rope_deltas is None else self.rope_deltas[index]
        return Prefix(tuple((k[index], v[index]) for k, v in self.layers), self.mask[index], deltas)

    def to(self, device: torch.device | str) -> "Prefix":
        deltas = None if self.rope_deltas is None else self.rope_deltas.to(device, non_blocking=True)
        layers = tuple(tuple(x.to(device, non_blocking=True) for x in pair) for pair in self.layers)
        return Prefix(layers, self.mask.to(device, non_blocking=True), deltas)


class _ReadOnlyLayer(DynamicLayer):
    """One layer's prompt. New keys and values go behind it for the caller and are not kept.

    So a layer that activation checkpointing runs twice sees the same cache twice.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor):
        super().__init__()
        self.dtype, self.device = keys.dtype, keys.device
        self.keys, self.values, self.is_initialized = keys, values, True

    def update(self, key_states, value_states, *args, **kwargs):
        keys, values = self.keys.to(key_states.device), self.values.to(value_states.device)
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)


def can_run_prefixes(model: nn.Module) -> bool:
    """Whether keys and values are all that a prompt leaves behind; hybrids and Mamba keep states of other kinds."""
    plain = unwrapped(model)
    kinds = getattr(text_config_of(plain), "layer_types", None) or ()
    return not getattr(plain, "_is_stateful", False) and _ATTENTION.issuperset(kinds)


@torch.no_grad()
def run_prefix(model: nn.Module, inputs: Mapping) -> Prefix:
    """Run prompts through `model` as it is (so with its adapters switched off by the caller).

    Args:
        inputs: the processor's output for left-padded prompts: input_ids [B, P], attention_mask, pixel_values, ...
    """
    mask = inputs["attention_mask"]
    cache = DynamicCache()  # without a config it keeps all positions, also of layers with a sliding window
    owner = _rope_owner(model)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    if owner is not None:
        owner.rope_deltas = None
        # With images the model lays the positions out itself.
        has_images = any(name.endswith("grid_thw") for name in inputs)
        positions = None if has_images else positions.expand(3, *positions.shape)
    plain = unwrapped(model)
    plain(
        **inputs,
        **cache_argument(plain, cache),
        position_ids=positions,
        use_cache=True,
        logits_to_keep=NO_POSITIONS,
    )
    deltas = None if owner is None or owner.rope_deltas is None else owner.rope_deltas.to(mask.device)
    return Prefix(tuple((layer.keys, layer.values) for layer in cache.layers), mask, deltas)


@torch.no_grad()
def extend_prefix(
    model: nn.Module, prefix: Prefix | None, input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> Prefix:
    """Prompts with text behind them (right-padded, unlike the prefix [B, R]), as if both had been run together.

    Args:
        prefix: of prompts without padding; None: there is nothing yet.
    """
    if prefix is None:
        layers, before, deltas = [], input_ids.new_zeros(len(input_ids), 0), None
    else:
        layers, before, deltas = prefix.layers, prefix.mask, prefix.rope_deltas
    cache = DynamicCache()
    for index, (keys, values) in enumerate(layers):
        cache.update(keys, values, index)
    positions = (before.shape[1] + torch.arange(input_ids.shape[1], device=input_ids.device)).expand_as(input_ids)
    if _rope_owner(model) is not None:
        positions = (positions if deltas is None else positions + deltas).expand(3, -1, -1)
    mask = torch.cat([before, attention_mask], dim=1)
    plain = unwrapped(model)
    plain(
        **cache_argument(plain, cache),
        input_ids=input_ids,
        attention_mask=mask,
        position_ids=positions,
        use_cache=True,
        logits_to_keep=NO_POSITIONS,
    )
    return Prefix(tuple((layer.keys, layer.values) for layer in cache.layers), mask, deltas)


def continue_prefix(
    model: nn.Module, prefix: Prefix, input_ids: torch.Tensor, attention_mask: torch.Tensor, *, layers=False, **options
) -> HiddenStates:
    """Hidden states [B, R, D] of tokens behind a prompt, as if both had been run together.

    Args:
        input_ids, attention_mask: [B, R], right-padded.
        layers: also return the residual streams.
        options: further arguments of the model's forward.
    """
    count = prefix.mask.sum(dim=1, keepdim=True)
    positions = count + torch.arange(input_ids.shape[1], device=input_ids.device)
    if _rope_owner(model) is not None:
        positions = (positions if prefix.rope_deltas is None else positions + prefix.rope_deltas).expand(3, -1, -1)
    cache = Cache(layers=[_ReadOnlyLayer(*pair) for pair in prefix.layers])
    inputs = {
        **cache_argument(unwrapped(model), cache),
        "input_ids": input_ids,
        "attention_mask": torch.cat([prefix.mask, attention_mask], dim=1),
        "position_ids": positions,
        **options,
    }
    with _cache_under_checkpointing(model):
        return hidden_states(model, inputs, layers=layers)


def _rope_owner(model: nn.Module) -> nn.Module | None:
    """The module that lays out multimodal positions, in the families that have them (Qwen-VL)."""
    inner = getattr(unwrapped(model), "model", None)
    return inner if hasattr(inner, "rope_deltas") else None


@contextmanager
def _cache_under_checkpointing(model: nn.Module):
    """Tell checkpointed layers that this cache is only read; they drop any other."""
    checkpointed = [m for m in unwrapped(model).modules() if getattr(m, "gradient_checkpointing", False)]
    for module in checkpointed:
        module._can_checkpoint_with_cache = True
    try:
        yield
    finally:
        for module in checkpointed:
            del module._can_checkpoint_with_cache
