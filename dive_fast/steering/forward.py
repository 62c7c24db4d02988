"""One forward pass for the decoder layers of every family in `DECODER_SPECS`, steered where it adds to the stream.

A steered layer's class is replaced by a subclass of it with this forward, so that the push joins the residual add it
follows instead of making passes of its own. Everything else (attention, MLP, norms, caches, checkpointing, what other
code tells by class or name) stays the layer's own.
"""

import functools
import types

import torch
from torch import nn

from dive_fast.steering.positions import STEERING_KWARG


def _forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
    """Residual stream in, residual stream out, [B, T, D]: pre-norm decoders, and Gemma's with norms on both sides."""
    spec, steering, call = self.steering.spec, self.steering, kwargs.get(STEERING_KWARG)
    if call is not None:
        call.visits += 1
    states = getattr(self, spec.input_norm)(hidden_states)
    update, _ = getattr(self, spec.attention)(hidden_states=states, **kwargs)
    if spec.attention_output != spec.attention:
        update = getattr(self, spec.attention_output)(update)
    hidden_states = steering.add(hidden_states, update, call, site="attention")
    update = getattr(self, spec.mlp)(getattr(self, spec.mlp_norm)(hidden_states))
    if spec.mlp_output != spec.mlp:
        update = getattr(self, spec.mlp_output)(update)
    return steering.add(hidden_states, update, call, site="block")


@functools.cache
def _steered_class(cls: type) -> type:
    """A subclass under the same name; transformers wraps its forward for activation checkpointing like any other."""
    body = {"forward": _forward, "__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls)(cls.__name__, (cls,), body)


def steer_inside(layer: nn.Module) -> None:
    """Give `layer`, which has a `steering` child, the forward above; nothing happens the second time."""
    if not _is_steered(type(layer)):
        _change_class(layer, _steered_class(type(layer)))


def steer_no_more(layer: nn.Module) -> None:
    """Give `layer` its own class back."""
    if _is_steered(type(layer)):
        _change_class(layer, type(layer).__mro__[1])


def _change_class(layer: nn.Module, cls: type) -> None:
    layer.__class__ = cls
    # Where a model is spread over devices, accelerate keeps the layer's forward to call it behind its hook.
    if "_old_forward" in vars(layer):
        layer._old_forward = types.MethodType(cls.forward, layer)


def _is_steered(cls: type) -> bool:
    forward = vars(cls).get("forward")
    return forward is _forward or getattr(forward, "__wrapped__", None) is _forward
