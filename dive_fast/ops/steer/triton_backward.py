"""Backward of steering as Triton kernels: the rows first, then what sums over rows.

T rows, D hidden size, R adapter rank. `steer_bwd_kernel` gives the stream's gradient and, per row, what the parameters'
gradients need; triton_parameters.py sums it over rows. The formulas are those of triton.py.
"""

import triton
import triton.language as tl

from dive_fast.ops.steer.triton_parameters import ALPHA, GATE, INPUT_RMS, SCALE
from dive_fast.ops.steer.triton_parts import (
    EPS,
    expand,
    moved_piece,
    norm_ratio,
    phi,
    phi_slope,
    product,
    stream_piece,
)


@triton.jit
def _upstream_piece(
    grad_steered_ptr,
    grad_normalized_ptr,
    norm_weight_ptr,
    y,
    rms,
    shrink,
    rows,
    cols,
    stride_gt,
    stride_nt,
    inside,
    D,
    HAS_GRAD_STEERED: tl.constexpr,
    HAS_NORM: tl.constexpr,
):
    """G [T, D piece], the gradient of h' = y from both outputs, and y's normalized row times its gradient."""
    gradient = tl.zeros(y.shape, tl.float32)
    weighted = gradient
    if HAS_GRAD_STEERED:
        at = grad_steered_ptr + rows[:, None] * stride_gt + cols[None, :]
        gradient += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if HAS_NORM:
        at = grad_normalized_ptr + rows[:, None] * stride_nt + cols[None, :]
        upstream = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        weight = tl.load(norm_weight_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)
        gradient += upstream * weight[None, :] * rms[:, None] - y * shrink[:, None]
        weighted = upstream * y * rms[:, None]
    return gradient, weighted


@triton.jit(do_not_specialize=["T"])
def steer_bwd_kernel(
    grad_steered_ptr,
    grad_normalized_ptr,
    residual_ptr,
    update_ptr,
    pre_ptr,
    down_ptr,
    up_ptr,
    bias_ptr,
    static_ptr,
    alpha_ptr,
    gate_ptr,
    offset_ptr,
    mask_ptr,
    norm_weight_ptr,
    grad_residual_ptr,
    grad_moved_ptr,
    grad_pre_ptr,
    grad_weighted_ptr,
    row_ptr,
    T,
    D,
    R,
    norm_eps,
    stride_gt,
    stride_nt,
    stride_rt,
    stride_ut,
    stride_dr,
    stride_dd,
    stride_ud,
    stride_ur,
    HAS_GRAD_STEERED: tl.constexpr,
    HAS_UPDATE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_STATIC: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_NORM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    NORMALIZE_INPUT: tl.constexpr,
    PRESERVE_NORM: tl.constexpr,
    WANT_RESIDUAL: tl.constexpr,
    WANT_PRE: tl.constexpr,
    WANT_SCALE: tl.constexpr,
    WANT_WEIGHT: tl.constexpr,
    PRECISION: tl.constexpr,
    ONE_PIECE: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # G depends on m only through the two norms; without them it is the upstream gradient itself.
    NEEDS_MOVED: tl.constexpr = HAS_NORM or PRESERVE_NORM
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    in_rows = rows < T
    active = in_rows
    if HAS_MASK:
        active = active & (tl.load(mask_ptr + rows, mask=in_rows, other=0) != 0)
    piece = tl.arange(0, BLOCK_D)
    ranks = tl.arange(0, RANK if RANK > 0 else 1)
    z_inside = in_rows[:, None] & (ranks < R)[None, :]
    z_at = rows[:, None] * R + ranks[None, :]
    if ONE_PIECE:
        inside = in_rows[:, None] & (piece < D)[None, :]
        h = stream_piece(residual_ptr, update_ptr, rows, piece, stride_rt, stride_ut, inside, HAS_UPDATE)

    squares = tl.zeros([BLOCK_T], tl.float32)
    logit = tl.zeros([BLOCK_T], tl.float32)
    if PRESERVE_NORM or HAS_GATE or (RANK > 0 and NORMALIZE_INPUT):
        for start in range(0, D, BLOCK_D):
            cols = start + piece
            if not ONE_PIECE:
                inside = in_rows[:, None] & (cols < D)[None, :]
                h = stream_piece(residual_ptr, update_ptr, rows, cols, stride_rt, stride_ut, inside, HAS_UPDATE)
            x = tl.where(active[:, None], h.to(tl.float32), 0.0)
            squares += tl.sum(x * x, axis=1)
            if HAS_GATE:
                logit += tl.sum(x * tl.load(gate_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)[None, :], axis=1)

    if RANK > 0:
        z = tl.load(pre_ptr + z_at, mask=z_inside, other=0.0)
    else:
        z = tl.zeros([BLOCK_T, 1], tl.float32)
    a = phi(z, ACTIVATION)
    alpha = tl.load(alpha_ptr)
    gate = tl.full([BLOCK_T], 1.0, tl.float32)
    if HAS_GATE:
        gate = tl.sigmoid(logit + tl.load(offset_ptr).to(tl.float32))
    gate = tl.where(active, gate, 0.0)
    scale = alpha * gate
    if ONE_PIECE:
        x, push, m = moved_piece(
            h, a, pre_ptr, up_ptr, static_ptr, scale, rows, piece, in_rows, active, D, R, stride_ud, stride_ur,
            HAS_STATIC, ACTIVATION, RANK, BLOCK_R, PRECISION,
        )  # fmt: skip

    ratio = tl.full([BLOCK_T], 1.0, tl.float32)
    moved_squares = tl.zeros([BLOCK_T], tl.float32)
    if PRESERVE_NORM:
        changed = tl.zeros([BLOCK_T], tl.int32)
        for start in range(0, D, BLOCK_D):
            if not ONE_PIECE:
                cols = start + piece
                inside = in_rows[:, None] & (cols < D)[None, :]
                h = stream_piece(residual_ptr, update_ptr, rows, cols, stride_rt, stride_ut, inside, HAS_UPDATE)
                x, push, m = moved_piece(
                    h, a, pre_ptr, up_ptr, static_ptr, scale, rows, cols, in_rows, active, D, R, stride_ud, stride_ur,
                    HAS_STATIC, ACTIVATION, RANK, BLOCK_R, PRECISION,
                )  # fmt: skip
            moved_squares += tl.sum(m * m, axis=1)
            changed += tl.sum((m != x).to(tl.int32), axis=1)
        ratio = norm_ratio(squares, moved_squares, changed)

    rms = tl.zeros([BLOCK_T], tl.float32)
    shrink = tl.zeros([BLOCK_T], tl.float32)
    if HAS_NORM:
        steered_squares = tl.zeros([BLOCK_T], tl.float32)
        for start in range(0, D, BLOCK_D):
            cols = start + piece
            inside = in_rows[:, None] & (cols < D)[None, :]
            if not ONE_PIECE:
                h = stream_piece(residual_ptr, update_ptr, rows, cols, stride_rt, stride_ut, inside, HAS_UPDATE)
                x, push, m = moved_piece(
                    h, a, pre_ptr, up_ptr, static_ptr, scale, rows, cols, in_rows, active, D, R, stride_ud, stride_ur,
                    HAS_STATIC, ACTIVATION, RANK, BLOCK_R, PRECISION,
                )  # fmt: skip
            y = tl.where(active[:, None], (m * ratio[:, None]).to(h.dtype), h).to(tl.float32)
            upstream_at = grad_normalized_ptr + rows[:, None] * stride_nt + cols[None, :]
            upstream = tl.load(upstream_at, mask=inside, other=0.0).to(tl.float32)
            weight = tl.load(norm_weight_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)
            steered_squares += tl.sum(y * y, axis=1)
            shrink += tl.sum(upstream * weight[None, :] * y, axis=1)
        rms = tl.rsqrt(steered_squares / D + norm_eps)
        # In this order no factor overflows where the result does not: rms is up to 1e3 and its cube up to 1e9.
        shrink = shrink / D * rms * rms * rms

    along = tl.zeros([BLOCK_T], tl.float32)
    if PRESERVE_NORM:
        for start in range(0, D, BLOCK_D):
            cols = start + piece
            inside = in_rows[:, None] & (cols < D)[None, :]
            if not ONE_PIECE:
                h = stream_piece(residual_ptr, update_ptr, rows, cols, stride_rt, stride_ut, inside, HAS_UPDATE)
                x, push, m = moved_piece(
                    h, a, pre_ptr, up_ptr, static_ptr, scale, rows, cols, in_rows, active, D, R, stride_ud, stride_ur,
                    HAS_STATIC, ACTIVATION, RANK, BLOCK_R, PRECISION,
                )  # fmt: skip
            y = (m * ratio[:, None]).to(h.dtype).to(tl.float32)
            gradient, weighted = _upstream_piece(
                grad_steered_ptr, grad_normalized_ptr, norm_weight_ptr, y, rms, shrink, rows, cols,
                stride_gt, stride_nt, inside, D, HAS_GRAD_STEERED, HAS_NORM,
            )  # fmt: skip
            along += tl.sum(gradient * m, axis=1)
    along = tl.where(active, along, 0.0)
    moved_norm = tl.sqrt_rn(moved_squares)
    safe_norm = tl.where(moved_norm > 0.0, moved_norm, 1.0)
    # A row that became 0 has no direction: the norm's gradient there is 0, as torch defines it.
    back = tl.where(moved_norm > 0.0, along / safe_norm * ratio / safe_norm, 0.0)

    grad_a = tl.zeros([BLOCK_T, RANK if RANK > 0 else 1], tl.float32)
    grad_scale = tl.zeros([BLOCK_T], tl.float32)
    if NEEDS_MOVED or WANT_PRE or WANT_SCALE:
        for start in range(0, D, BLOCK_D):
            cols = start + piece
            in_cols = cols < D
            inside = in_rows[:, None] & in_cols[None, :]
            if not ONE_PIECE and (NEEDS_MOVED or WANT_SCALE):
                h = stream_piece(residual_ptr, update_ptr, rows, cols, stride_rt, stride_ut, inside, HAS_UPDATE)
                x, push, m = moved_piece(
                    h, a, pre_ptr, up_ptr, static_ptr, scale, rows, cols, in_rows, active, D, R, stride_ud, stride_ur,
                    HAS_STATIC, ACTIVATION, RANK, BLOCK_R, PRECISION,
                )  # fmt: skip
            if NEEDS_MOVED:
                y = tl.where(active[:, None], (m * ratio[:, None]).to(h.dtype), h).to(tl.float32)
            else:
                y = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
            gradient, weighted = _upstream_piece(
                grad_steered_ptr, grad_normalized_ptr, norm_weight_ptr, y, rms, shrink, rows, cols,
                stride_gt, stride_nt, inside, D, HAS_GRAD_STEERED, HAS_NORM,
            )  # fmt: skip
            if WANT_WEIGHT:
                tl.store(grad_weighted_ptr + rows[:, None] * D + cols[None, :], weighted, mask=inside)
            if PRESERVE_NORM:
                gradient = tl.where(active[:, None], gradient * ratio[:, None] - m * back[:, None], gradient)
            if NEEDS_MOVED:
                tl.store(grad_moved_ptr + rows[:, None] * D + cols[None, :], gradient, mask=inside)
            gradient = tl.where(active[:, None], gradient, 0.0)
            if WANT_SCALE:
                grad_scale += tl.sum(gradient * push, axis=1)
            if WANT_PRE:
                up_at = up_ptr + cols.to(tl.int64)[None, :] * stride_ud + ranks.to(tl.int64)[:, None] * stride_ur
                up = tl.load(up_at, mask=in_cols[None, :] & (ranks < R)[:, None], other=0.0).to(tl.float32)
                grad_a += product(gradient, up, PRECISION)

    input_rms = tl.full([BLOCK_T], 1.0, tl.float32)
    if NORMALIZE_INPUT:
        input_rms = tl.rsqrt(squares / D + EPS)
    grad_logit = grad_scale * scale * (1.0 - gate) if HAS_GATE else tl.zeros([BLOCK_T], tl.float32)
    tl.store(row_ptr + SCALE * T + rows, scale, mask=in_rows)
    tl.store(row_ptr + INPUT_RMS * T + rows, input_rms, mask=in_rows)
    tl.store(row_ptr + ALPHA * T + rows, grad_scale * gate, mask=in_rows)
    tl.store(row_ptr + GATE * T + rows, grad_logit, mask=in_rows)
    # What the row's gradient takes along x itself: through its norm and through the normalized input.
    input_norm = tl.sqrt_rn(squares)
    along_x = tl.where(input_norm > 0.0, along / safe_norm / tl.where(input_norm > 0.0, input_norm, 1.0), 0.0)
    if WANT_PRE:
        grad_z = scale[:, None] * grad_a * phi_slope(z, ACTIVATION)
        tl.store(grad_pre_ptr + z_at, grad_z, mask=z_inside)
        if NORMALIZE_INPUT:
            if HAS_BIAS:
                z -= tl.load(bias_ptr + ranks, mask=ranks < R, other=0.0).to(tl.float32)[None, :]
            along_x -= tl.sum(grad_z * z, axis=1) / D * input_rms * input_rms
    if WANT_RESIDUAL:
        tl.debug_barrier()
        for start in range(0, D, BLOCK_D):
            cols = start + piece
            in_cols = cols < D
            inside = in_rows[:, None] & in_cols[None, :]
            if NEEDS_MOVED:
                gradient = tl.load(grad_moved_ptr + rows[:, None] * D + cols[None, :], mask=inside, other=0.0)
            else:
                gradient = tl.load(grad_steered_ptr + rows[:, None] * stride_gt + cols[None, :], mask=inside, other=0.0)
            gradient = gradient.to(tl.float32)
            if RANK > 0:
                gradient += input_rms[:, None] * expand(
                    grad_z, grad_pre_ptr, down_ptr, rows, cols, in_rows, in_cols, R, stride_dd, stride_dr,
                    "identity", RANK, BLOCK_R, PRECISION,
                )  # fmt: skip
            if HAS_GATE:
                direction = tl.load(gate_ptr + cols, mask=in_cols, other=0.0).to(tl.float32)
                gradient += grad_logit[:, None] * direction[None, :]
            if PRESERVE_NORM or (RANK > 0 and NORMALIZE_INPUT):
                if not ONE_PIECE:
                    h = stream_piece(residual_ptr, update_ptr, rows, cols, stride_rt, stride_ut, inside, HAS_UPDATE)
                gradient += along_x[:, None] * tl.where(active[:, None], h.to(tl.float32), 0.0)
            out = gradient.to(grad_residual_ptr.dtype.element_ty)
            tl.store(grad_residual_ptr + rows[:, None] * D + cols[None, :], out, mask=inside)
