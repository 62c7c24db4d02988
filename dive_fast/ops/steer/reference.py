"""Steering in plain differentiable PyTorch: the oracle, and what runs in float64.

T rows (any leading shape), D hidden size, r adapter rank.
"""

import torch
import torch.nn.functional as F

from dive_fast.ops.checks import accumulation_dtype

ACTIVATIONS = {
    "silu": F.silu,
    "identity": lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "tanh": torch.tanh,
}

# Keeps rms of a zero row from dividing by zero and its gradient below 1e6; against an rms above 3e-3 float32 rounds it
# away. It is not `norm_eps`, because the steering must not change with the norm that happens to follow it.
INPUT_RMS_EPS = 1e-12


def steer(
    residual,
    update,
    *,
    down,
    up,
    bias,
    static,
    alpha,
    activation,
    gate,
    mask,
    normalize_input,
    preserve_norm,
    norm_weight,
    norm_eps,
):
    """The public function after validation."""
    h = residual.clone() if update is None else residual + update
    accumulate = accumulation_dtype(h)
    with torch.autocast(h.device.type, enabled=False):
        x = h.to(accumulate)
        if mask is not None:
            # Rows left alone may hold NaN; zeroed here, they pass neither values nor gradients to the parameters.
            x = x.masked_fill(~mask.unsqueeze(-1), 0.0)
        push = _push(x, down, up, bias, static, ACTIVATIONS[activation], normalize_input)
        steered = h
        if push is not None:
            scale = alpha.to(accumulate) if isinstance(alpha, torch.Tensor) else alpha
            if gate is not None:
                direction, offset = gate
                scale = scale * torch.sigmoid(x @ direction.to(accumulate) + offset).unsqueeze(-1)
            moved = x + scale * push
            if preserve_norm:
                moved = _with_norm_of(moved, x)
            steered = moved.to(h.dtype)
            if mask is not None:
                steered = torch.where(mask.unsqueeze(-1), steered, h)
        return steered if norm_weight is None else (steered, _rms_norm(steered, norm_weight, norm_eps, accumulate))


def steer_mixed(residual, update, *, adapter_index, mask, norm_weight, **adapter_and_options):
    """Rows of several adapters, one adapter after the other."""
    steered = residual.clone() if update is None else residual + update
    for number in range(int(adapter_index.max()) + 1 if adapter_index.numel() else 0):
        chosen = adapter_index == number
        one = {
            name: _entry(value, number, name != "alpha") if name in ("down", "up", "bias", "static", "alpha") else value
            for name, value in adapter_and_options.items()
        }
        if one["gate"] is not None:
            direction, offset = one["gate"]
            one["gate"] = (direction[number], _entry(offset, number, False))
        rows = chosen if mask is None else chosen & mask
        steered = steer(steered, None, mask=rows, norm_weight=None, **one)
    if norm_weight is None:
        return steered
    eps = adapter_and_options["norm_eps"]
    return steered, _rms_norm(steered, norm_weight, eps, accumulation_dtype(steered))


def _entry(value, number, is_stacked):
    """One adapter's part of a stacked tensor; numbers and 0-d tensors are shared by all."""
    shared = not isinstance(value, torch.Tensor) or (not is_stacked and value.dim() == 0)
    return value if shared else value[number]


def _push(x, down, up, bias, static, activation, normalize_input):
    """a @ up.T + static in x's dtype: [T, D], [D] when there is only the static part, None when there is nothing."""
    static = None if static is None else static.to(x.dtype)
    if down is None or down.shape[0] == 0:
        return static
    n = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + INPUT_RMS_EPS) if normalize_input else x
    a = activation(F.linear(n, down.to(x.dtype), None if bias is None else bias.to(x.dtype)))
    return F.linear(a, up.to(x.dtype), static)


def _with_norm_of(moved, x):
    """moved * |x| / |moved|; a row that became 0 stays 0, since it has no direction to keep."""
    norm = torch.linalg.vector_norm(moved, dim=-1, keepdim=True)
    wanted = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return moved * (wanted / torch.where(norm > 0, norm, 1.0))


def _rms_norm(steered, norm_weight, norm_eps, accumulate):
    """RMSNorm of the residual stream as stored, in the order of operations of the decoders that follow it.

    Their weight multiplies in the wider of the two dtypes: a bfloat16 weight after rounding the normalized row (Llama),
    a float32 one before (Gemma).
    """
    y = steered.to(accumulate)
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + norm_eps)
    product = torch.promote_types(steered.dtype, norm_weight.dtype)
    return (norm_weight.to(product) * y.to(product)).to(steered.dtype)
