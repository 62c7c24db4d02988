"""Forward of steering as a Triton kernel, one pass over the hidden states; the formulas are those of triton.py.

T rows, D hidden size, R adapter rank, A stacked adapters.
"""

import triton
import triton.language as tl

from dive_fast.ops.steer.triton_parts import EPS, moved_piece, norm_ratio, phi, product, stream_piece


@triton.jit(do_not_specialize=["T"])
def steer_fwd_kernel(
    residual_ptr,
    update_ptr,
    down_ptr,
    up_ptr,
    bias_ptr,
    static_ptr,
    alpha_ptr,
    gate_ptr,
    offset_ptr,
    mask_ptr,
    index_ptr,
    norm_weight_ptr,
    steered_ptr,
    normalized_ptr,
    pre_ptr,
    T,
    D,
    R,
    norm_eps,
    stride_rt,
    stride_ut,
    stride_da,
    stride_dr,
    stride_dd,
    stride_ua,
    stride_ud,
    stride_ur,
    HAS_UPDATE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_STATIC: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    HAS_NORM: tl.constexpr,
    ROUND_BEFORE_WEIGHT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    NORMALIZE_INPUT: tl.constexpr,
    PRESERVE_NORM: tl.constexpr,
    PRECISION: tl.constexpr,
    ONE_PIECE: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    rows = program * BLOCK_T + tl.arange(0, BLOCK_T)
    in_rows = rows < T
    active = in_rows
    if HAS_MASK:
        active = active & (tl.load(mask_ptr + rows, mask=in_rows, other=0) != 0)
    if HAS_INDEX:
        # The launcher gives one row to a program, so its adapter is one scalar.
        adapter = tl.load(index_ptr + program).to(tl.int64)
        active = active & (adapter >= 0)
        adapter = tl.maximum(adapter, 0)
        alpha_ptr += adapter
        if RANK > 0:
            down_ptr += adapter * stride_da
            up_ptr += adapter * stride_ua
        if HAS_BIAS:
            bias_ptr += adapter * R
        if HAS_STATIC:
            static_ptr += adapter * D
        if HAS_GATE:
            gate_ptr += adapter * D
            offset_ptr += adapter
    piece = tl.arange(0, BLOCK_D)
    ranks = tl.arange(0, RANK if RANK > 0 else 1)
    if ONE_PIECE:
        inside = in_rows[:, None] & (piece < D)[None, :]
        h = stream_piece(residual_ptr, update_ptr, rows, piece, stride_rt, stride_ut, inside, HAS_UPDATE)

    squares = tl.zeros([BLOCK_T], tl.float32)
    logit = tl.zeros([BLOCK_T], tl.float32)
    z = tl.zeros([BLOCK_T, RANK if RANK > 0 else 1], tl.float32)
    if RANK > 0 or HAS_GATE or PRESERVE_NORM:
        # A block without a steered row needs none of these sums.
        for start in range(0, tl.max(active.to(tl.int32)) * D, BLOCK_D):
            cols = start + piece
            in_cols = cols < D
            if not ONE_PIECE:
                inside = in_rows[:, None] & in_cols[None, :]
                h = stream_piece(residual_ptr, update_ptr, rows, cols, stride_rt, stride_ut, inside, HAS_UPDATE)
            x = tl.where(active[:, None], h.to(tl.float32), 0.0)
            squares += tl.sum(x * x, axis=1)
            if HAS_GATE:
                logit += tl.sum(x * tl.load(gate_ptr + cols, mask=in_cols, other=0.0).to(tl.float32)[None, :], axis=1)
            if RANK > 0:
                down_at = down_ptr + ranks.to(tl.int64)[:, None] * stride_dr + cols.to(tl.int64)[None, :] * stride_dd
                down = tl.load(down_at, mask=(ranks < R)[:, None] & in_cols[None, :], other=0.0)
                z += product(x, down.to(tl.float32), PRECISION)

    if RANK > 0:
        if NORMALIZE_INPUT:
            z *= tl.rsqrt(squares / D + EPS)[:, None]
        if HAS_BIAS:
            z += tl.load(bias_ptr + ranks, mask=ranks < R, other=0.0).to(tl.float32)[None, :]
        tl.store(pre_ptr + rows[:, None] * R + ranks[None, :], z, mask=in_rows[:, None] & (ranks < R)[None, :])
        if RANK > BLOCK_R:
            tl.debug_barrier()
    a = phi(z, ACTIVATION)
    scale = tl.zeros([BLOCK_T], tl.float32) + tl.load(alpha_ptr)
    if HAS_GATE:
        scale *= tl.sigmoid(logit + tl.load(offset_ptr).to(tl.float32))
    if ONE_PIECE:
        x, push, m = moved_piece(
            h, a, pre_ptr, up_ptr, static_ptr, scale, rows, piece, in_rows, active, D, R, stride_ud, stride_ur,
            HAS_STATIC, ACTIVATION, RANK, BLOCK_R, PRECISION,
        )  # fmt: skip

    ratio = tl.full([BLOCK_T], 1.0, tl.float32)
    if PRESERVE_NORM:
        moved_squares = tl.zeros([BLOCK_T], tl.float32)
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
        steered = tl.where(active[:, None], (m * ratio[:, None]).to(h.dtype), h)
        tl.store(steered_ptr + rows[:, None] * D + cols[None, :], steered, mask=inside)
        if HAS_NORM:
            y = steered.to(tl.float32)
            steered_squares += tl.sum(y * y, axis=1)

    if HAS_NORM:
        rms = tl.rsqrt(steered_squares / D + norm_eps)
        tl.debug_barrier()
        for start in range(0, D, BLOCK_D):
            cols = start + piece
            inside = in_rows[:, None] & (cols < D)[None, :]
            y = tl.load(steered_ptr + rows[:, None] * D + cols[None, :], mask=inside, other=0.0).to(tl.float32)
            weight = tl.load(norm_weight_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)
            y *= rms[:, None]
            if ROUND_BEFORE_WEIGHT:
                y = y.to(normalized_ptr.dtype.element_ty).to(tl.float32)
            out = (weight[None, :] * y).to(normalized_ptr.dtype.element_ty)
            tl.store(normalized_ptr + rows[:, None] * D + cols[None, :], out, mask=inside)
