"""A forward pass's key/value cache among its arguments: `cache` since transformers 5.24, `past_key_values` before."""

import inspect
from collections.abc import Iterable

from torch import nn
from transformers import Cache, LlamaForCausalLM

NAMES = ("cache", "past_key_values")
"""Newest first."""


def cache_among(arguments: Iterable) -> Cache | None:
    """The cache among a call's arguments, known by its type whatever its name."""
    return next((argument for argument in arguments if isinstance(argument, Cache)), None)


def cache_argument(model: nn.Module, cache: Cache) -> dict[str, Cache]:
    """The keyword argument that hands `cache` to `model`."""
    named = inspect.signature(model.forward).parameters
    return {next((name for name in NAMES if name in named), _usual_name()): cache}


def _usual_name() -> str:
    """Of this transformers' own models, for a forward that only hands its arguments on."""
    named = inspect.signature(LlamaForCausalLM.forward).parameters
    return next(name for name in NAMES if name in named)
