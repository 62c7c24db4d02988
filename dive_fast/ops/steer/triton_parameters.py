"""Gradients of the steering parameters that are sums over rows, from what triton_backward.py leaves per row.

T rows, D hidden size, R adapter rank, S splits of the rows.
"""

import torch
import triton
import triton.language as tl

from dive_fast.ops.steer.triton_parts import parameter_blocks_for, phi, stream_piece

# Rows of the buffer [4, T] that `steer_bwd_kernel` fills: alpha * gate, rinv, and the gradients of alpha and of the
# gate's logit.
SCALE, INPUT_RMS, ALPHA, GATE = (tl.constexpr(i) for i in range(4))


@triton.jit(do_not_specialize=["T"])
def steer_bwd_parameters_kernel(
    grad_moved_ptr,
    residual_ptr,
    update_ptr,
    pre_ptr,
    grad_pre_ptr,
    row_ptr,
    mask_ptr,
    up_ptr,
    down_ptr,
    static_ptr,
    gate_ptr,
    T,
    D,
    R,
    split_rows,
    stride_gt,
    stride_rt,
    stride_ut,
    HAS_UPDATE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    ACTIVATION: tl.constexpr,
    WANT_UP: tl.constexpr,
    WANT_DOWN: tl.constexpr,
    WANT_STATIC: tl.constexpr,
    WANT_GATE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Partial sums over `split_rows` rows: up [S, D, R], down [S, R, D], static and gate [S, D], for S splits."""
    cols = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    ranks = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.program_id(2).to(tl.int64)
    in_cols = cols < D
    in_rank = ranks < R
    up = tl.zeros([BLOCK_D, BLOCK_R], tl.float32)
    down = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    static = tl.zeros([BLOCK_D], tl.float32)
    gate = tl.zeros([BLOCK_D], tl.float32)
    first = split * split_rows
    for start in range(0, split_rows, BLOCK_T):
        rows = first + start + tl.arange(0, BLOCK_T)
        active = (start + tl.arange(0, BLOCK_T) < split_rows) & (rows < T)
        if HAS_MASK:
            active = active & (tl.load(mask_ptr + rows, mask=active, other=0) != 0)
        inside = active[:, None] & in_cols[None, :]
        z_inside = active[:, None] & in_rank[None, :]
        z_at = rows[:, None] * R + ranks[None, :]
        if WANT_UP or WANT_STATIC:
            gradient = tl.load(grad_moved_ptr + rows[:, None] * stride_gt + cols[None, :], mask=inside, other=0.0)
            scale = tl.load(row_ptr + SCALE * T + rows, mask=active, other=0.0)
            gradient = gradient.to(tl.float32) * scale[:, None]
            if WANT_UP:
                a = tl.where(z_inside, phi(tl.load(pre_ptr + z_at, mask=z_inside, other=0.0), ACTIVATION), 0.0)
                up += tl.dot(tl.trans(gradient), a, input_precision=PRECISION)
            if WANT_STATIC:
                static += tl.sum(gradient, axis=0)
        if WANT_DOWN or WANT_GATE:
            h = stream_piece(residual_ptr, update_ptr, rows, cols, stride_rt, stride_ut, inside, HAS_UPDATE)
            x = h.to(tl.float32)
            if WANT_DOWN:
                input_rms = tl.load(row_ptr + INPUT_RMS * T + rows, mask=active, other=0.0)
                grad_z = tl.load(grad_pre_ptr + z_at, mask=z_inside, other=0.0) * input_rms[:, None]
                down += tl.dot(tl.trans(grad_z), x, input_precision=PRECISION)
            if WANT_GATE:
                grad_logit = tl.load(row_ptr + GATE * T + rows, mask=active, other=0.0)
                gate += tl.sum(x * grad_logit[:, None], axis=0)
    columns = cols.to(tl.int64)
    if WANT_UP:
        at = up_ptr + (split * D + columns)[:, None] * R + ranks[None, :]
        tl.store(at, up, mask=in_cols[:, None] & in_rank[None, :])
    if WANT_DOWN:
        at = down_ptr + (split * R + ranks)[:, None] * D + columns[None, :]
        tl.store(at, down, mask=in_rank[:, None] & in_cols[None, :])
    # The programs of the other rank blocks have the same sums. A tensor is compared, not the number alone, of which the
    # interpreter of Triton 3.9 makes no mask.
    alone = in_cols & (tl.zeros_like(columns) + tl.program_id(1) == 0)
    if WANT_STATIC:
        tl.store(static_ptr + split * D + columns, static, mask=alone)
    if WANT_GATE:
        tl.store(gate_ptr + split * D + columns, gate, mask=alone)


def over_rows(inputs, pre_activation, grad_moved, grad_pre, row_values, wanted):
    """down, up, static and gate_direction where wanted: partial sums a program, added in a fixed order.

    Our own product and not cuBLAS's: that would need x and M in float32 in memory, masked rows (which may hold NaN)
    cleared, [T, D] each; here they are formed from what is stored.
    """
    residual, update, rank = inputs.residual, inputs.update, inputs.rank
    rows, hidden_size = residual.shape
    shapes = {
        "up": (1, hidden_size, rank), "down": (1, rank, hidden_size),
        "static": (1, hidden_size), "gate_direction": (1, hidden_size),
    }  # fmt: skip
    wanted = wanted & shapes.keys()
    if not wanted:
        return {}
    blocks = parameter_blocks_for(rows, hidden_size, rank, residual.dtype)
    partial = {
        name: torch.empty(blocks.splits, *shapes[name][1:], dtype=torch.float32, device=residual.device)
        for name in wanted
    }
    grid = (triton.cdiv(hidden_size, blocks.BLOCK_D), max(triton.cdiv(rank, blocks.BLOCK_R), 1), blocks.splits)
    steer_bwd_parameters_kernel[grid](
        grad_moved,
        residual,
        update,
        pre_activation,
        grad_pre,
        row_values,
        inputs.mask,
        partial.get("up"),
        partial.get("down"),
        partial.get("static"),
        partial.get("gate_direction"),
        rows,
        hidden_size,
        rank,
        blocks.split_rows,
        grad_moved.stride(0),
        residual.stride(0),
        0 if update is None else update.stride(0),
        HAS_UPDATE=update is not None,
        HAS_MASK=inputs.mask is not None,
        ACTIVATION=inputs.activation,
        WANT_UP="up" in wanted and rank > 0,
        WANT_DOWN="down" in wanted and rank > 0,
        WANT_STATIC="static" in wanted,
        WANT_GATE="gate_direction" in wanted,
        PRECISION=blocks.PRECISION,
        BLOCK_T=blocks.BLOCK_T,
        BLOCK_D=blocks.BLOCK_D,
        BLOCK_R=blocks.BLOCK_R,
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
    )
    return {name: x.sum(0, keepdim=True) for name, x in partial.items()}
