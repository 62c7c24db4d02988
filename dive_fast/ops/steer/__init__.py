"""Steering of the residual stream by a small adapter, with the residual add before it and the RMSNorm after it.

D hidden size, r adapter rank, A adapters.
"""

from numbers import Real

import torch

from dive_fast.ops.backend import select_backend
from dive_fast.ops.checks import DTYPES, check_device, check_tensor, has_tangent, wrong
from dive_fast.ops.precision import own_precision
from dive_fast.ops.steer import library, reference

__all__ = ["steer"]


@own_precision
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
    adapter_index: torch.Tensor | None = None,
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
    rounding of h', also under autocast. An adapter with up = 0 and static = 0 is an exact no-op.

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
        adapter_index: int32, residual.shape[:-1]: rows pick among A adapters, whose tensors then are stacks (down
            [A, r, D], up [A, D, r], bias [A, r], static [A, D], alpha and c [A] or a number, g [A, D]); -1 picks none.
            For inference: adapters get no gradient this way.
        normalize_input: feed the adapter the row over its root mean square.
        preserve_norm: rescale h' to the norm of h.
        norm_weight: [D]: also return the RMSNorm that follows, `h' * rsqrt(mean(h'**2) + norm_eps) * norm_weight`.
            Gemma's norm is its weight plus one, in float32. The multiplication takes the wider dtype of residual and
            norm_weight. Every row is normalized, also where mask is False.
        norm_eps: that norm's epsilon, > 0; it does not enter n.
        backend: None (the best for the device), "native" (CPU), "triton" (CUDA) or "reference".

    Returns:
        h', or with `norm_weight` the pair (h', normalized), both of residual's dtype.

    Raises:
        InputError: an argument of the wrong shape, dtype, device or range. An adapter_index out of range is an
            IndexError on the CPU; on other devices it is not looked at.

    Sources: arXiv 2605.27194 (state-conditioned steering); preserve_norm, LIVE (NeurIPS 2024); identity activation with
        an orthonormal `up`, LoReFT (arXiv 2404.03592).
    """
    _check_stream(residual, update, mask, adapter_index, norm_weight, norm_eps)
    _check_adapter(residual, down, up, bias, static, alpha, activation, gate, adapter_index)
    options = {
        "activation": activation,
        "normalize_input": normalize_input,
        "preserve_norm": preserve_norm,
        "norm_eps": norm_eps,
    }
    adapter = {"down": down, "up": up, "bias": bias, "static": static, "alpha": alpha, "gate": gate}
    chosen = select_backend("steer", backend, residual.device, _unfit(residual, update, norm_weight, adapter))
    if chosen == "reference":
        run = reference.steer if adapter_index is None else reference.steer_mixed
        extra = {} if adapter_index is None else {"adapter_index": adapter_index}
        return run(residual, update, mask=mask, norm_weight=norm_weight, **extra, **adapter, **options)
    return _fused(residual, update, mask, adapter_index, norm_weight, adapter, chosen, options)


def _unfit(residual, update, norm_weight, adapter) -> dict[str, str]:
    """Backends that cannot take these arguments, with the reason."""
    gate = adapter["gate"] or ()
    tensors = [x for x in (residual, update, norm_weight, *adapter.values(), *gate) if isinstance(x, torch.Tensor)]
    if has_tangent(*tensors):
        return dict.fromkeys(library.BACKEND_MODULES, "it has no derivatives forward")
    if any(x.dtype == torch.float64 for x in tensors):
        return dict.fromkeys(library.BACKEND_MODULES, "it has no float64")
    if residual.shape[-1] == 0:
        return dict.fromkeys(library.BACKEND_MODULES, "there is nothing to steer")
    return {}


def _fused(residual, update, mask, adapter_index, norm_weight, adapter, backend, options):
    """Through the registered operator (library.py)."""
    hidden_size, stacked = residual.shape[-1], adapter_index is not None
    count = _adapters(adapter) if stacked else 1

    def rows(tensor):
        flat = tensor.reshape(-1, hidden_size)
        return flat if flat.stride(1) == 1 or hidden_size == 1 else flat.contiguous()

    def stack(tensor):
        return tensor if tensor is None or stacked else tensor.unsqueeze(0)

    def numbers(value):
        if isinstance(value, torch.Tensor):
            return value.reshape(-1).float().expand(count)
        return torch.full((count,), value, dtype=torch.float32, device=residual.device)

    if update is not None and residual.is_leaf and update.is_leaf and residual.requires_grad and update.requires_grad:
        # Both have one gradient, which leaves would keep and add to in place; a product's is a tensor of its own.
        update = update * 1
    direction, offset = adapter["gate"] or (None, None)
    steered, normalized, _ = torch.ops.dive_fast.steer(
        rows(residual),
        None if update is None else rows(update),
        *(stack(adapter[name]) for name in ("down", "up", "bias", "static")),
        numbers(adapter["alpha"]),
        stack(direction),
        None if offset is None else numbers(offset),
        None if mask is None else mask.reshape(-1),
        None if adapter_index is None else adapter_index.reshape(-1),
        norm_weight,
        *options.values(),
        backend,
    )
    # Nobody else has the flat results, so these are no views: what is done to a layer's output in place, and hooks on
    # it (FSDP2's), mean this tensor.
    steered = torch.ops.aten._unsafe_view(steered, residual.shape)
    if norm_weight is None:
        return steered
    return steered, torch.ops.aten._unsafe_view(normalized, residual.shape)


def _adapters(adapter) -> int:
    """A, from whichever tensor is stacked."""
    for name in ("down", "static"):
        if adapter[name] is not None:
            return adapter[name].shape[0]
    return 1


def _check_stream(residual, update, mask, adapter_index, norm_weight, norm_eps) -> None:
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
    if adapter_index is not None:
        if not isinstance(adapter_index, torch.Tensor) or adapter_index.dtype != torch.int32:
            got = getattr(adapter_index, "dtype", type(adapter_index).__name__)
            raise wrong("adapter_index", "an int32 tensor", got, "use adapter_index.int()")
        if adapter_index.shape != residual.shape[:-1]:
            expected = f"shape residual.shape[:-1] = {list(residual.shape[:-1])}"
            raise wrong("adapter_index", expected, list(adapter_index.shape), "give one value per position")
        check_device("adapter_index", adapter_index, residual.device)
    if norm_weight is not None:
        check_tensor("norm_weight", norm_weight, residual.shape[-1:], residual.device, "[D]")
    if not isinstance(norm_eps, Real) or not norm_eps > 0:
        raise wrong("norm_eps", "a number > 0", repr(norm_eps), "take it from the model's config (rms_norm_eps)")


def _check_adapter(residual, down, up, bias, static, alpha, activation, gate, adapter_index) -> None:
    hidden_size, device = residual.shape[-1], residual.device
    if (down is None) != (up is None):
        missing = "up" if up is None else "down"
        raise wrong(missing, "down and up together, or neither", "None", "for a static push alone leave both out")
    stack, letters = (), ""
    if adapter_index is not None:
        first = static if down is None else down
        stack, letters = (first.shape[:1] if isinstance(first, torch.Tensor) else (1,)), "A, "
    if down is None:
        if bias is not None:
            raise wrong("bias", "None without down", "a tensor", "for a static push use static")
    else:
        rank = down.shape[-2] if isinstance(down, torch.Tensor) and down.dim() == 2 + len(stack) else 1
        check_tensor("down", down, (*stack, rank, hidden_size), device, f"[{letters}r, D]")
        check_tensor("up", up, (*stack, hidden_size, rank), device, f"[{letters}D, r]")
        if bias is not None:
            check_tensor("bias", bias, (*stack, rank), device, f"[{letters}r]")
    if static is not None:
        check_tensor("static", static, (*stack, hidden_size), device, f"[{letters}D]")
    if activation not in reference.ACTIVATIONS:
        names = ", ".join(repr(name) for name in reference.ACTIVATIONS)
        raise wrong("activation", f"one of {names}", repr(activation), "'silu' is the default")
    _check_scalar("alpha", alpha, stack)
    if gate is not None:
        if not isinstance(gate, tuple | list) or len(gate) != 2:
            raise wrong("gate", "a pair (g [D], c)", repr(gate), "None turns the gate off")
        check_tensor("gate[0]", gate[0], (*stack, hidden_size), device, f"[{letters}D]")
        _check_scalar("gate[1]", gate[1], stack)


def _check_scalar(argument, value, stack) -> None:
    if isinstance(value, torch.Tensor):
        if value.shape not in ((), stack) or value.dtype not in DTYPES:
            got = f"{value.dtype} of shape {list(value.shape)}"
            raise wrong(argument, "a number or a floating 0-d tensor", got, f"use {argument}.squeeze()")
    elif not isinstance(value, Real):
        raise wrong(argument, "a number or a floating 0-d tensor", repr(value), "pass a float")
