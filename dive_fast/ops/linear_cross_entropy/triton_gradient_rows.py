"""Rows of hidden gradients: partial sums brought together in the forward pass, scaled and scattered in the backward.

T rows, N rows that count, D hidden size, S partial sums.
"""

import torch
import triton
import triton.language as tl

from dive_fast.ops.linear_cross_entropy.triton_common import device_of

# One 128-bit load of half precision for each thread of 4 warps; these kernels only move bytes.
MAX_BLOCK_D = 1024


@triton.jit
def linear_cross_entropy_sum_parts_fwd_kernel(
    parts_ptr,
    tail_mean_weight_ptr,
    teacher_rows_ptr,
    kl_share_ptr,
    gradient_ptr,
    D,
    parts,
    stride_part,
    HAS_TAIL: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """gradient[n] = sum over parts of parts[:, n] - kl_share[n] * tail_mean_weight[rows[n]], rounded once."""
    n = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_D], parts_ptr.dtype.element_ty)
    part_ptrs = parts_ptr + n * D + d
    for _ in range(0, parts):
        total += tl.load(part_ptrs, mask=d < D, other=0.0)
        part_ptrs += stride_part
    if HAS_TAIL:
        kl_share = tl.load(kl_share_ptr + n)
        # Not read where the share is 0: such a row may hold anything.
        is_read = tl.where(d < D, kl_share, 0.0) != 0.0
        tail = tl.load(tail_mean_weight_ptr + tl.load(teacher_rows_ptr + n) * D + d, mask=is_read, other=0.0)
        total -= kl_share * tail
    tl.store(gradient_ptr + n * D + d, total.to(gradient_ptr.dtype.element_ty), mask=d < D)


@triton.jit
def linear_cross_entropy_scatter_bwd_kernel(gradient_ptr, scale_ptr, inverse_ptr, out_ptr, D, BLOCK_D: tl.constexpr):
    """out[t] = scale[n] * gradient[n] for n = inverse[t], zeros where n < 0 or the scale is 0."""
    t = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    n = tl.load(inverse_ptr + t).to(tl.int64)
    scale = tl.load(scale_ptr + n, mask=n >= 0, other=0.0)
    # A NaN scale is not 0, so it reaches the gradient; the row of a scale of 0 is not even read.
    is_read = tl.where(d < D, scale, 0.0) != 0.0
    row = tl.load(gradient_ptr + n * D + d, mask=is_read, other=0.0)
    tl.store(out_ptr + t * D + d, (row * scale).to(out_ptr.dtype.element_ty), mask=d < D)


def sum_parts(parts, gradient, tail_mean_weight, rows, kl_share) -> None:
    """gradient [N, D] = parts [S, N, D] summed, less kl_share times the rows' tail_mean_weight [T, D] unless None."""
    _, N, D = parts.shape
    BLOCK_D = min(MAX_BLOCK_D, triton.next_power_of_2(D))
    linear_cross_entropy_sum_parts_fwd_kernel[(N, triton.cdiv(D, BLOCK_D))](
        parts,
        tail_mean_weight,
        rows,
        kl_share,
        gradient,
        D,
        parts.shape[0],
        parts.stride(0),
        HAS_TAIL=tail_mean_weight is not None,
        BLOCK_D=BLOCK_D,
        num_warps=4,
    )


@torch.no_grad()
def scatter_scaled_rows(gradient, scale, inverse, out_rows: int) -> torch.Tensor:
    """[T, D]: row t is scale[n] * gradient[n] with n = inverse[t], and exactly 0 where n < 0 or the scale is 0.

    Args:
        gradient: [N, D], contiguous, from `row_figures`.
        scale: [N] float32 (float64 with float64 gradients); NaN spreads over its row.
        inverse: [T] int32, each row's place in `gradient` or -1.
        out_rows: T.
    """
    D = gradient.shape[1]
    out = gradient.new_empty(out_rows, D)
    if out.numel() == 0:
        return out
    BLOCK_D = min(MAX_BLOCK_D, triton.next_power_of_2(D))
    with device_of(gradient):
        linear_cross_entropy_scatter_bwd_kernel[(out_rows, triton.cdiv(D, BLOCK_D))](
            gradient, scale, inverse, out, D, BLOCK_D=BLOCK_D, num_warps=4
        )
    return out
