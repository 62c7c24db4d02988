"""Steering of the residual stream by a small adapter, with the residual add before it and the RMSNorm after it.

D hidden size, r adapter rank.
"""

from numbers import Real

import torch

from dive_fast.ops.backend import select_backend
from dive_fast.ops.checks import DTYPES, check_device, check_tensor, wrong
from dive_fast.ops.steer import reference

__all__ = ["steer"]

IMPLEMENTATIONS = {"reference": reference.steer}


def steer(
    residual: torch.Tensor,
    update: torch.Tensor | None = None,
    *,
    down: torch.Tensor | None = None,
    up: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    static: torch.Tensor | None = None,
    alpha: float | torch.Tensor = 1.0,
    activation: str = "silu",
    gate: tuple[torch.Tensor, torch.Tensor] | None = None,
    mask: torch.Tensor | None = None,
    normalize_input: bool = True,
    preserve_norm: bool = False,
    norm_weight: torch.Tensor | None = None,
    norm_eps: float = 1e-6,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Add an adapter's state-dependent vector to the residual stream.

    ::

        h  = residual + update
        n  = h * rsqrt(mean(h**2) + 1e-12)  if normalize_input else h
        a  = phi(n @ down.T + bias)                          # [..., r]
        d  = alpha * sigmoid(h @ g + c) * (a @ up.T + static)    # [..., D]; no sigmoid without a gate (g, c)
        h' = h + d
        h' = h' * |h| / |h'|                                 if preserve_norm; a row that became 0 stays 0
        where mask is False: h' = h

    `h` is rounded to residual's dtype, everything after it is float32 (float64 for a float64 residual) up to the
    rounding of h'. An adapter with up = 0 and static = 0 is an exact no-op.

    Args:
        residual: the residual stream [..., D]; float16, bfloat16, float32 or float64.
        update: what a sublayer adds to it [..., D], same dtype; None adds nothing.
        down: [r, D]; up: [D, r]; bias: [r]. Any floating dtype. Without them, or with r = 0, the push is `static`
            alone.
        static: [D].
        alpha: strength, a number or 0-d tensor.
        activation: phi, one of "silu", "identity", "relu", "gelu" (exact, by erf), "tanh".
        gate: (g [D], c: 0-d tensor or number).
        mask: bool, residual.shape[:-1]. Rows where it is False come out bit-equal to h, and whatever they hold (NaN,
            inf) reaches no other row and no gradient of the adapter.
        normalize_input: feed the adapter the row over its root mean square.
        preserve_norm: rescale h' to the norm of h.
        norm_weight: [D]: also return the RMSNorm that follows, `h' * rsqrt(mean(h'**2) + norm_eps) * norm_weight`.
            Gemma's norm is its weight plus one, in float32. The multiplication takes the wider dtype of residual and
            norm_weight. Every row is normalized, also where mask is False.
        norm_eps: that norm's epsilon, > 0; it does not enter n.
        backend: None (the best for the device) or "reference".

    Returns:
        h', or with `norm_weight` the pair (h', normalized), both of residual's dtype.

    Raises:
        InputError: an argument of the wrong shape, dtype, device or range.

    Sources: arXiv 2605.27194 (state-conditioned steering); preserve_norm, LIVE (NeurIPS 2024); identity activation with
        an orthonormal `up`, LoReFT (arXiv 2404.03592).
    """
    _check_stream(residual, update, mask, norm_weight, norm_eps)
    _check_adapter(residual, down, up, bias, static, alpha, activation, gate)
    implementation = IMPLEMENTATIONS[select_backend("steer", backend, residual.device)]
    return implementation(
        residual,
        update,
        down=down,
        up=up,
        bias=bias,
        static=static,
        alpha=alpha,
        activation=activation,
        gate=gate,
        mask=mask,
        normalize_input=normalize_input,
        preserve_norm=preserve_norm,
        norm_weight=norm_weight,
        norm_eps=norm_eps,
    )


def _check_stream(residual, update, mask, norm_weight, norm_eps) -> None:
    if not isinstance(residual, torch.Tensor) or residual.dtype not in DTYPES:
        got = getattr(residual, "dtype", type(residual).__name__)
        raise wrong("residual", "a floating tensor of 16 to 64 bits", got, "pass the decoder's hidden states")
    if residual.dim() == 0 or residual.shape[-1] == 0:
        raise wrong("residual", "shape [..., D] with D >= 1", list(residual.shape), "pass the decoder's hidden states")
    if update is not None:
        check_tensor("update", update, residual.shape, residual.device, "of residual")
        if update.dtype != residual.dtype:
            raise wrong("update", f"residual's {residual.dtype}", update.dtype, "use update.to(residual.dtype)")
    if mask is not None:
        if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
            raise wrong("mask", "a bool tensor", getattr(mask, "dtype", type(mask).__name__), "use mask.bool()")
        if mask.shape != residual.shape[:-1]:
            expected = f"shape residual.shape[:-1] = {list(residual.shape[:-1])}"
            raise wrong("mask", expected, list(mask.shape), "give one value per position")
        check_device("mask", mask, residual.device)
    if norm_weight is not None:
        check_tensor("norm_weight", norm_weight, residual.shape[-1:], residual.device, "[D]")
    if not isinstance(norm_eps, Real) or not norm_eps > 0:
        raise wrong("norm_eps", "a number > 0", repr(norm_eps), "take it from the model's config (rms_norm_eps)")


def _check_adapter(residual, down, up, bias, static, alpha, activation, gate) -> None:
    hidden_size, device = residual.shape[-1], residual.device
    if (down is None) != (up is None):
        missing = "up" if up is None else "down"
        raise wrong(missing, "down and up together, or neither", "None", "for a static push alone leave both out")
    if down is None:
        if bias is not None:
            raise wrong("bias", "None without down", "a tensor", "for a static push use static")
    else:
        rank = down.shape[0] if isinstance(down, torch.Tensor) and down.dim() == 2 else 1
        check_tensor("down", down, (rank, hidden_size), device, "[r, D]")
        check_tensor("up", up, (hidden_size, rank), device, "[D, r]")
        if bias is not None:
            check_tensor("bias", bias, (rank,), device, "[r]")
    if static is not None:
        check_tensor("static", static, (hidden_size,), device, "[D]")
    if activation not in reference.ACTIVATIONS:
        names = ", ".join(repr(name) for name in reference.ACTIVATIONS)
        raise wrong("activation", f"one of {names}", repr(activation), "'silu' is the default")
    _check_scalar("alpha", alpha)
    if gate is not None:
        if not isinstance(gate, tuple | list) or len(gate) != 2:
            raise wrong("gate", "a pair (g [D], c)", repr(gate), "None turns the gate off")
        check_tensor("gate[0]", gate[0], (hidden_size,), device, "[D]")
        _check_scalar("gate[1]", gate[1])


def _check_scalar(argument, value) -> None:
    if isinstance(value, torch.Tensor):
        if value.dim() != 0 or value.dtype not in DTYPES:
            got = f"{value.dtype} of shape {list(value.shape)}"
            raise wrong(argument, "a number or a floating 0-d tensor", got, f"use {argument}.squeeze()")
    elif not isinstance(value, Real):
        raise wrong(argument, "a number or a floating 0-d tensor", repr(value), "pass a float")
