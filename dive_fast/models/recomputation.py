"""Activation checkpointing for a frozen backbone: keep the products, compute the rest again.

A frozen linear layer needs its weight alone for the input's gradient, so autograd keeps none of its inputs. What fills
the memory are the tensors that norms, rotary embeddings and gated activations keep for themselves: cheap to compute
again from the outputs of products and attention, which are dear.
"""

from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

_ATEN = torch.ops.aten
DEAR = {
    _ATEN.mm.default,
    _ATEN.addmm.default,
    _ATEN.bmm.default,
    _ATEN.baddbmm.default,
    _ATEN._scaled_dot_product_flash_attention.default,
    _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
    _ATEN._scaled_dot_product_efficient_attention.default,
    _ATEN._scaled_dot_product_cudnn_attention.default,
}
"""Operators whose results are kept; all others run again in the backward pass."""


def checkpoint_selectively(model: nn.Module) -> None:
    """Have the layers of a transformers model, while they are trained, keep what `DEAR` operators return and no more.

    It adds no product to a step. transformers' own activation checkpointing keeps a layer's input alone, in half that
    memory, and runs the whole layer twice.
    """
    context = partial(create_selective_checkpoint_contexts, _policy)
    # Before transformers 5.23 it went by its other name alone.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False, "context_fn": context})


def _policy(context, operator, *args, **kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in DEAR else CheckpointPolicy.PREFER_RECOMPUTE
