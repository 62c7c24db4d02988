"""Steering on the CPU: hands the tensors to the compiled kernels (csrc/cpu/steer.h), which do everything in one pass.

T rows, D hidden size, R adapter rank, A adapters.
"""

import functools
from collections.abc import Set

import torch

from dive_fast import native
from dive_fast.ops.steer.inputs import GRADIENTS, SteerInputs

# In the order of the enumerations in csrc/cpu.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = ("silu", "identity", "relu", "gelu", "tanh")


def steer_forward(
    inputs: SteerInputs, *, isa: str | None = None, threads: int | None = None
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The formula of `dive_fast.ops.steer` for stacked adapters.

    Args:
        isa: the level to run at, one of the extension's `cpu.kernel_levels()`; None takes the best.
        threads: the most to use; None takes as many as torch does.

    Returns:
        h' [T, D]; its RMSNorm [T, D] where norm_weight is given; n @ down.T + bias [T, R] float32 where R > 0, zero in
        rows left alone.
    """
    extension = native.load().cpu
    pointers, kept = _pointers(extension, inputs)
    residual = inputs.residual
    steered = torch.empty(residual.shape, dtype=residual.dtype)
    normalized = None if inputs.norm_weight is None else torch.empty(residual.shape, dtype=residual.dtype)
    pre_activation = torch.empty(residual.shape[0], inputs.rank, dtype=torch.float32) if inputs.rank else None
    extension.steer_forward(
        inputs=pointers,
        steered=steered.data_ptr(),
        normalized=_address(normalized),
        pre_activation=_address(pre_activation),
        isa=isa or _best_isa(),
        threads=threads or torch.get_num_threads(),
    )
    return steered, normalized, pre_activation


def steer_backward(
    inputs: SteerInputs,
    pre_activation: torch.Tensor | None,
    grad_steered: torch.Tensor | None,
    grad_normalized: torch.Tensor | None,
    wanted: Set[str],
    *,
    isa: str | None = None,
    threads: int | None = None,
) -> dict[str, torch.Tensor]:
    """Gradients by name for the names in `wanted`, for one adapter (A = 1).

    Args:
        pre_activation: what the forward pass returned.
        grad_steered, grad_normalized: [T, D] of residual's dtype; None stands for zeros.
        wanted: among "residual" (which is update's gradient too), "down", "up", "bias", "static", "alpha",
            "gate_direction", "gate_offset" and "norm_weight"; only arguments that were given.

    Returns:
        "residual" in its dtype, the others in float32 and the shape of the argument. Equal for every `threads`.
    """
    extension = native.load().cpu
    pointers, kept = _pointers(extension, inputs)
    parameters = wanted - {"residual"}
    gradients = {name: torch.empty(getattr(inputs, name).shape, dtype=torch.float32) for name in parameters}
    if "residual" in wanted:
        gradients["residual"] = torch.empty(inputs.residual.shape, dtype=inputs.residual.dtype)
    grad_steered, grad_normalized = _unit_inner_stride(grad_steered), _unit_inner_stride(grad_normalized)
    addresses = {name: _address(gradients.get(name)) for name in GRADIENTS}
    addresses["static_push"] = addresses.pop("static")
    extension.steer_backward(
        inputs=pointers,
        grad_steered=_address(grad_steered),
        grad_steered_stride=0 if grad_steered is None else grad_steered.stride(0),
        grad_normalized=_address(grad_normalized),
        grad_normalized_stride=0 if grad_normalized is None else grad_normalized.stride(0),
        pre_activation=_address(pre_activation),
        isa=isa or _best_isa(),
        threads=threads or torch.get_num_threads(),
        **addresses,
    )
    return gradients


def _pointers(extension, inputs):
    """The extension's SteerInputs, and the tensors it points into, which must outlive it."""
    residual, update, down, up, bias, static, alpha, direction, offset, mask, index, norm_weight, *options = inputs
    activation, normalize_input, preserve_norm, norm_eps = options
    weights = (down, up, bias, static, alpha, direction, offset, norm_weight)
    down, up, bias, static, alpha, direction, offset, weight = (_float32(tensor) for tensor in weights)
    if inputs.rank == 0:
        down = up = bias = None
    mask, index = (tensor if tensor is None else tensor.contiguous() for tensor in (mask, index))
    pointers = extension.SteerInputs(
        rows=residual.shape[0],
        hidden_size=residual.shape[1],
        rank=inputs.rank,
        adapters=alpha.shape[0],
        dtype=DTYPES.index(residual.dtype),
        residual=residual.data_ptr(),
        residual_stride=residual.stride(0),
        update=_address(update),
        update_stride=0 if update is None else update.stride(0),
        down=_address(down),
        up=_address(up),
        bias=_address(bias),
        static_push=_address(static),
        alpha=_address(alpha),
        gate_direction=_address(direction),
        gate_offset=_address(offset),
        mask=_address(mask),
        adapter_index=_address(index),
        norm_weight=_address(weight),
        # The decoders' norms multiply in the wider dtype of the stream and the weight.
        round_before_norm_weight=norm_weight is not None
        and torch.promote_types(residual.dtype, norm_weight.dtype) == residual.dtype,
        activation=ACTIVATIONS.index(activation),
        normalize_input=normalize_input,
        preserve_norm=preserve_norm,
        norm_eps=norm_eps,
    )
    return pointers, (residual, update, down, up, bias, static, alpha, direction, offset, mask, index, weight)


@functools.cache
def _best_isa() -> str:
    return native.load().cpu.kernel_levels()[-1]


def _address(tensor) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _float32(tensor):
    # A decoding step makes hundreds of calls with adapters that are ready: two questions cost less than three no-ops.
    if tensor is None or (tensor.dtype == torch.float32 and tensor.is_contiguous()):
        return tensor
    return tensor.detach().to(torch.float32).contiguous()


def _unit_inner_stride(tensor):
    return tensor if tensor is None or tensor.stride(1) == 1 else tensor.contiguous()
