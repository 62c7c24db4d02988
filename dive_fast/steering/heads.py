"""Steering of attention heads, as MimIC does (CVPR 2025, arXiv 2504.08851, section 3.2).

With demonstrations D in the context, attention of a query q is a mixture of the attention over the query's own context
and that over the demonstrations, the latter with the share mu = Z1 / (Z1 + Z2), Z1 and Z2 the softmax normalisers of
the two. The demonstrations' contribution becomes a learned vector per head, v_h, and log Z1 a learned linear function
of the query, w_h . q + b_h; Z2 is the model's own normaliser, causal and padding-masked.

B batch rows, T queries, S keys, H heads.
"""

import copy
import sys

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dive_fast.errors import InputError
from dive_fast.ops.precision import own_precision
from dive_fast.steering.positions import STEERING_KWARG

HEADS_ATTENTION = "dive_heads"


def check_attention(implementation: str) -> None:
    """Raise InputError unless that attention is given a mask to normalise over, as "sdpa" and "eager" are."""
    if implementation not in ("sdpa", "eager"):
        raise InputError(
            f"kind: 'heads' needs attn_implementation='sdpa' or 'eager', the model uses {implementation!r}; "
            "call model.set_attn_implementation('sdpa')"
        )


@own_precision
def demonstration_share(query, key, attention_mask, scaling, head_query, head_bias) -> torch.Tensor:
    """mu [B, T, H] in float32 = sigmoid(log Z1 - log Z2).

    Args:
        query: [B, H, T, head_dim], after rope.
        key: [B, H_kv, S, head_dim], after rope, cached keys included.
        attention_mask: [B, 1, T, S] bool (True attends) or additive float; None: causal for T > 1, all for T = 1.
        scaling: factor on q . k inside the softmax.
        head_query, head_bias: w [H, head_dim], b [H].
    """
    query, key = query.float(), key.float()
    rows, heads, length, head_dim = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    grouped = query.reshape(rows, kv_heads, heads // kv_heads, length, head_dim)
    scores = torch.einsum("bgntd,bgsd->bgnts", grouped, key).reshape(rows, heads, length, keys) * scaling
    if attention_mask is None:
        if length > 1:  # the causal mask that attention functions leave implicit, aligned to the first key
            allowed = torch.ones(length, keys, dtype=torch.bool, device=query.device).tril()
            scores = scores.masked_fill(~allowed, -torch.inf)
    elif attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask[..., :keys], -torch.inf)
    else:
        scores = scores + attention_mask[..., :keys].float()
    log_z2 = scores.logsumexp(dim=-1)
    log_z1 = torch.einsum("bhtd,hd->bht", query, head_query.float()) + head_bias.float()[:, None]
    # A fully masked query (padding) has log Z2 = -inf; its share is never used, only its gradient must stay finite.
    log_z2 = log_z2.clamp_min(torch.finfo(torch.float32).min)
    return torch.sigmoid(log_z1 - log_z2).transpose(1, 2)


def heads_attention(module, query, key, value, attention_mask, **kwargs):
    """The model's own attention function, and behind it the push of the heads.

    Installed per attention module in place of the configured function, to which it hands everything on.
    """
    call = kwargs.pop(STEERING_KWARG, None)
    steering, config = module.dive_heads_host
    implementation = config._attn_implementation
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    output, weights = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)(
        module, query, key, value, attention_mask, **kwargs
    )
    if call is None:
        return output, weights
    return steering.push_heads(output, query, key, attention_mask, kwargs["scaling"], call), weights


AttentionInterface.register(HEADS_ATTENTION, heads_attention)


def install_heads_hook(attention: nn.Module, steering) -> list:
    """Route one attention module through `heads_attention`; returns handles whose `remove()` undoes it."""
    original = attention.config
    routed = copy.copy(original)
    routed._attn_implementation_internal = HEADS_ATTENTION
    attention.config = routed
    attention.dive_heads_host = (steering, original)  # a tuple, so that no submodule is registered
    return [_Restore(attention, original)]


class _Restore:
    def __init__(self, attention: nn.Module, config):
        self.attention, self.config = attention, config

    def remove(self) -> None:
        self.attention.config = self.config
        del self.attention.dive_heads_host
