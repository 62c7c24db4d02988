"""Steering as Triton kernels: one pass over the hidden states forward, and their backward.

T rows, D hidden size, R adapter rank, A stacked adapters. Every program owns BLOCK_T rows and walks D in pieces of
BLOCK_D; R is padded to RANK (a power of two) and contracted in pieces of BLOCK_R.

Forward, per row, in float32 after h is rounded to the stream's dtype (rows left alone count as x = 0)::

    h = residual + update                         z = (x @ down.T) * rinv + bias,  rinv = rsqrt(mean(x**2) + 1e-12)
    m = x + scale * (phi(z) @ up.T + static)      scale = alpha * sigmoid(x @ g + c)
    h' = q * m                                    q = |x| / |m|, or 1 without preserve_norm
    normalized = h' * rsqrt(mean(h'**2) + norm_eps) * norm_weight

Backward, with G the gradient of h' including what comes through the next norm, M that of m and Z that of z::

    M = q * G - m * (G . m) * |x| / |m|**3        Z = scale * (M @ up) * phi'(z)
    dh = M + x * (G . m) / (|x| |m|) + rinv * (Z @ down) - x * rinv**2 / D * (Z . (z - bias)) + S * g
    S = (M . push) * alpha * sigmoid'             dup = (scale * M).T @ phi(z),  ddown = (rinv * Z).T @ x

x times the gradient of the normalized row equals Z . (z - bias) / rinv, which saves a pass over D.
"""

import torch
import triton

from dive_fast.ops.steer.inputs import SteerInputs
from dive_fast.ops.steer.triton_backward import steer_bwd_kernel
from dive_fast.ops.steer.triton_forward import steer_fwd_kernel
from dive_fast.ops.steer.triton_parameters import ALPHA, GATE, over_rows
from dive_fast.ops.steer.triton_parts import blocks_for


def steer_forward(inputs: SteerInputs):
    """h' [T, D], its RMSNorm [T, D] or None, and the pre-activation z [T, R] in float32 or None."""
    inputs = inputs.for_kernels()
    residual, update, down, up, norm_weight = inputs.residual, inputs.update, inputs.down, inputs.up, inputs.norm_weight
    rows, hidden_size = residual.shape
    rank = inputs.rank
    steered = torch.empty(rows, hidden_size, dtype=residual.dtype, device=residual.device)
    normalized = None if norm_weight is None else torch.empty_like(steered)
    pre_activation = torch.empty(rows, rank, dtype=torch.float32, device=residual.device) if rank else None
    if rows == 0:
        return steered, normalized, pre_activation
    blocks = blocks_for(rows, hidden_size, rank, residual.dtype, mixed=inputs.adapter_index is not None)
    with torch.cuda.device_of(residual):
        steer_fwd_kernel[(triton.cdiv(rows, blocks.BLOCK_T),)](
            *inputs.tensors,
            steered,
            normalized,
            pre_activation,
            rows,
            hidden_size,
            rank,
            inputs.norm_eps,
            residual.stride(0),
            0 if update is None else update.stride(0),
            *(down.stride() if rank else (0, 0, 0)),
            *(up.stride() if rank else (0, 0, 0)),
            HAS_UPDATE=update is not None,
            HAS_BIAS=inputs.bias is not None,
            HAS_STATIC=inputs.static is not None,
            HAS_GATE=inputs.gate_direction is not None,
            HAS_MASK=inputs.mask is not None,
            HAS_INDEX=inputs.adapter_index is not None,
            HAS_NORM=norm_weight is not None,
            ROUND_BEFORE_WEIGHT=norm_weight is not None and norm_weight.dtype == residual.dtype,
            ACTIVATION=inputs.activation,
            NORMALIZE_INPUT=inputs.normalize_input,
            PRESERVE_NORM=inputs.preserve_norm,
            **blocks._asdict(),
        )
    return steered, normalized, pre_activation


def steer_backward(inputs: SteerInputs, pre_activation, grad_steered, grad_normalized, wanted):
    """Gradients by name, in the shapes of the (stacks of one) inputs: parameters in float32, "residual" in its dtype.

    Args:
        pre_activation: what the forward pass returned.
        grad_steered, grad_normalized: [T, D]; either may be None.
        wanted: names among residual (update's is the same), down, up, bias, static, alpha, gate_direction,
            gate_offset, norm_weight. What is not named is not computed.
    """
    rows, hidden_size = inputs.residual.shape
    if rows == 0 or (grad_steered is None and grad_normalized is None):
        zeros = {name: torch.zeros_like(getattr(inputs, name), dtype=torch.float32) for name in wanted - {"residual"}}
        return zeros | ({"residual": torch.zeros_like(inputs.residual)} if "residual" in wanted else {})
    inputs = inputs.for_kernels()
    residual, update, down, up, rank = inputs.residual, inputs.update, inputs.down, inputs.up, inputs.rank
    has_norm = grad_normalized is not None
    # An expanded upstream gradient (that of a sum) has no unit inner stride.
    grad_steered, grad_normalized = (
        x if x is None or x.stride(-1) == 1 else x.contiguous() for x in (grad_steered, grad_normalized)
    )
    needs_moved = has_norm or inputs.preserve_norm

    def scratch(*shape, when=True):
        return torch.empty(shape, dtype=torch.float32, device=residual.device) if when else None

    grad_residual = torch.empty_like(residual, memory_format=torch.contiguous_format) if "residual" in wanted else None
    # Where neither norm comes after the push, the gradient of m is grad_steered as it stands.
    grad_moved = scratch(rows, hidden_size, when=needs_moved)
    want_pre = bool(rank) and not wanted.isdisjoint({"residual", "down", "bias"})
    grad_pre = scratch(rows, rank, when=want_pre)
    # Decoders are frozen, so hardly anyone asks for this one: a [T, D] product and its sum, not a kernel of its own.
    grad_weighted = scratch(rows, hidden_size, when=has_norm and "norm_weight" in wanted)
    row_values = scratch(4, rows)
    blocks = blocks_for(rows, hidden_size, rank, residual.dtype, backward=True)
    with torch.cuda.device_of(residual):
        steer_bwd_kernel[(triton.cdiv(rows, blocks.BLOCK_T),)](
            grad_steered,
            grad_normalized,
            residual,
            update,
            pre_activation,
            down,
            up,
            inputs.bias,
            inputs.static,
            inputs.alpha,
            inputs.gate_direction,
            inputs.gate_offset,
            inputs.mask,
            inputs.norm_weight,
            grad_residual,
            grad_moved,
            grad_pre,
            grad_weighted,
            row_values,
            rows,
            hidden_size,
            rank,
            inputs.norm_eps,
            0 if grad_steered is None else grad_steered.stride(0),
            grad_normalized.stride(0) if has_norm else 0,
            residual.stride(0),
            0 if update is None else update.stride(0),
            *(down.stride()[1:] if rank else (0, 0)),
            *(up.stride()[1:] if rank else (0, 0)),
            HAS_GRAD_STEERED=grad_steered is not None,
            HAS_UPDATE=update is not None,
            HAS_BIAS=inputs.bias is not None,
            HAS_STATIC=inputs.static is not None,
            HAS_GATE=inputs.gate_direction is not None,
            HAS_MASK=inputs.mask is not None,
            HAS_NORM=has_norm,
            ACTIVATION=inputs.activation,
            NORMALIZE_INPUT=inputs.normalize_input,
            PRESERVE_NORM=inputs.preserve_norm,
            WANT_RESIDUAL="residual" in wanted,
            WANT_PRE=want_pre,
            WANT_SCALE=_wants_scale(wanted, inputs.gate_direction),
            WANT_WEIGHT=grad_weighted is not None,
            **blocks._asdict(),
        )
        moved = grad_moved if needs_moved else grad_steered
        gradients = over_rows(inputs, pre_activation, moved, grad_pre, row_values, wanted)
    if "residual" in wanted:
        gradients["residual"] = grad_residual
    if "bias" in wanted:
        gradients["bias"] = grad_pre.sum(0, keepdim=True) if rank else scratch(1, 0)
    if "alpha" in wanted:
        gradients["alpha"] = row_values[ALPHA.value].sum(0, keepdim=True)
    if "gate_offset" in wanted:
        gradients["gate_offset"] = row_values[GATE.value].sum(0, keepdim=True)
    if "norm_weight" in wanted:
        zeros = torch.zeros_like(inputs.norm_weight, dtype=torch.float32)
        gradients["norm_weight"] = grad_weighted.sum(0) if has_norm else zeros
    return gradients


def _wants_scale(wanted, gate_direction) -> bool:
    if gate_direction is None:
        return "alpha" in wanted
    return not wanted.isdisjoint({"alpha", "gate_direction", "gate_offset", "residual"})
