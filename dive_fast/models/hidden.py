"""Hidden states of a forward pass, without the logits nobody needs.

B batch rows, T tokens, D hidden size, L layers.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from dive_fast.models.spec import decoder_of

NO_POSITIONS = slice(0, 0)
"""For a model's `logits_to_keep`: none. For a single position per row torch would copy the head for every row; and an
empty tensor of positions would have to lie where the states do, which of a model over several devices nobody knows."""


@dataclass
class HiddenStates:
    """`final` [B, T, D]: what the head multiplies; `layers`: the L residual streams [B, T, D], if asked for."""

    final: torch.Tensor | None = None
    layers: list[torch.Tensor] = field(default_factory=list)


def hidden_states(model: nn.Module, inputs: Mapping, *, layers: bool = False) -> HiddenStates:
    """Run `model` on a processor's output and return the decoder's hidden states, with gradient where enabled.

    The model is called as a whole, through whatever wraps it (PEFT, data parallelism), so that vision towers and
    gradient hooks do their work; its own head gets no position.
    """
    decoder = decoder_of(unwrapped(model))
    states = HiddenStates()
    handles = [decoder.register_forward_hook(lambda m, a, output: setattr(states, "final", output[0]))]
    if layers:
        # Registered behind the steering hooks, so these are the steered states.
        handles += [
            layer.register_forward_hook(
                lambda m, a, output: states.layers.append(output[0] if isinstance(output, tuple) else output)
            )
            for layer in decoder.layers
        ]
    try:
        model(**inputs, use_cache=False, logits_to_keep=NO_POSITIONS)
    finally:
        for handle in handles:
            handle.remove()
    head = unwrapped(model).get_output_embeddings()
    if head is not None:  # the last of the devices that a model may lie on
        states.final = states.final.to(head.weight.device)
    return states


def unwrapped(model: nn.Module) -> nn.Module:
    """The transformers model inside DistributedDataParallel, a compiled module and PEFT."""
    while not hasattr(model, "get_decoder") and hasattr(model, "module"):
        model = model.module
    return model.get_base_model() if hasattr(model, "get_base_model") else model
