"""What the steering kernels share: activations, the products with the adapter, and the shapes they are launched in.

T rows, D hidden size, R adapter rank; RANK is R padded to a power of two (0 without a low-rank part), contracted in
pieces of BLOCK_R.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from dive_fast.ops.steer.reference import INPUT_RMS_EPS

EPS = tl.constexpr(INPUT_RMS_EPS)


class Blocks(NamedTuple):
    """Constexprs of a launch, and its warps and stages."""

    BLOCK_T: int
    BLOCK_D: int
    RANK: int
    BLOCK_R: int
    ONE_PIECE: bool
    PRECISION: str
    num_warps: int
    num_stages: int


def blocks_for(rows: int, hidden_size: int, rank: int, dtype: torch.dtype, *, mixed=False, backward=False) -> Blocks:
    """Launch parameters from the shape alone, so that a call repeats bit for bit.

    Args:
        rows, hidden_size, rank: T, D, R.
        dtype: of the residual stream.
        mixed: rows pick their adapters, so a program owns one row.
        backward: for the backward kernel, which holds more values at a time.
    """
    width = triton.next_power_of_2(hidden_size)
    # Three TF32 products recover float32 to about 2**-21, far below what a 16-bit stream rounds; a float32 stream has
    # no such slack and takes the CUDA cores. What either costs beside the memory traffic is unmeasured.
    precision = "ieee" if dtype == torch.float32 else "tf32x3"
    if rank == 0:
        # A row in registers: 32 values a thread, of h, the push and the result; 16 where gradients stand beside them.
        block_d = min(width, 8192)
        num_warps = min(max(block_d // (512 if backward else 1024), 1), 16)
        return Blocks(1, block_d, 0, 0, block_d >= hidden_size, precision, num_warps, 2)
    # 16 is the least that tensor cores take along each side.
    padded = max(triton.next_power_of_2(rank), 16)
    num_warps, num_stages = 4, 3
    if mixed or rows < 16:
        # The product is a tile [RANK, BLOCK_D] reduced over D: 4096 values are 32 registers a thread with 4 warps.
        block_t, block_d, block_r = 1, max(min(width, 4096 // padded), 16), min(padded, 64)
    elif precision == "ieee":
        # The CUDA cores' product keeps whole rows of its operands in registers, BLOCK_D or BLOCK_R of them: 16 fit.
        block_t, block_d, block_r = 16, 16, 16
    elif padded <= 32:
        # 64 columns of 16 bits are one line of 128 bytes; the backward pass spills with them.
        block_t, block_d, block_r = 16, 32 if backward else 64, padded
    elif padded == 64:
        # A block reads the whole adapter from L2: twice the rows halve that, once there is a block for every
        # multiprocessor. More rows or columns spill.
        block_t, block_d, block_r = (32, 32, 32) if rows >= 4096 else (16, 64, 64)
        num_warps = 8
    else:
        # The accumulator [16, 256] alone is 16 registers a thread with 8 warps; larger pieces spill.
        block_t, block_d, block_r = 16, 32, 32
        num_warps = 8
    block_d = min(block_d, max(width, 16))
    return Blocks(block_t, block_d, padded, block_r, block_d >= hidden_size, precision, num_warps, num_stages)


class ParameterBlocks(NamedTuple):
    """Constexprs of the products over rows; `splits` programs share the rows, `split_rows` each."""

    BLOCK_T: int
    BLOCK_D: int
    BLOCK_R: int
    PRECISION: str
    splits: int
    split_rows: int
    num_warps: int
    num_stages: int


def parameter_blocks_for(rows: int, hidden_size: int, rank: int, dtype: torch.dtype) -> ParameterBlocks:
    """Launch parameters of the sums over rows, from the shape alone."""
    precision = "ieee" if dtype == torch.float32 else "tf32x3"
    # Two accumulators of 64 x 64 are 32 registers a thread with 8 warps, and 16 rows an iteration are what fits beside
    # them; wider ranks are further programs.
    block_t, block_d, block_r = 16, 64, min(max(triton.next_power_of_2(rank), 16), 64)
    programs = triton.cdiv(hidden_size, block_d) * max(triton.cdiv(rank, block_r), 1)
    # About 512 programs, four for each multiprocessor of the largest devices, but not splits so short that writing and
    # adding the partial sums outweighs the rows read.
    splits = max(min(512 // programs, rows // 256), 1)
    split_rows = triton.cdiv(triton.cdiv(rows, splits), block_t) * block_t
    return ParameterBlocks(block_t, block_d, block_r, precision, triton.cdiv(rows, split_rows), split_rows, 8, 2)


@triton.jit
def phi(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        return z * tl.sigmoid(z)
    elif ACTIVATION == "relu":
        # Not tl.maximum: a NaN must stay one.
        return tl.where(z <= 0.0, 0.0, z)
    elif ACTIVATION == "gelu":
        return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == "tanh":
        return _tanh(z)
    else:
        return z


@triton.jit
def phi_slope(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        s = tl.sigmoid(z)
        return s * (1.0 + z * (1.0 - s))
    elif ACTIVATION == "relu":
        return tl.where(z > 0.0, 1.0, 0.0)
    elif ACTIVATION == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * z * z)
        return 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * density
    elif ACTIVATION == "tanh":
        y = _tanh(z)
        return 1.0 - y * y
    else:
        return tl.full(z.shape, 1.0, tl.float32)


@triton.jit
def _tanh(z):
    # exp(-2|z|) cannot overflow, but 1 - exp cancels near 0: there the series, whose next term is below half an ulp.
    e = tl.exp(-2.0 * tl.abs(z))
    far = (1.0 - e) / (1.0 + e)
    square = z * z
    near = z * (1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0 - square * (17.0 / 315.0))))
    return tl.where(tl.abs(z) < 0.2, near, tl.where(z < 0.0, -far, far))


@triton.jit
def product(x, w, PRECISION: tl.constexpr):
    """x [T, K] @ w [N, K].T; a single row is multiplied and reduced, since tensor cores take 16 at a time."""
    if x.shape[0] >= 16:
        return tl.dot(x, tl.trans(w), input_precision=PRECISION)
    else:
        return tl.sum(x[:, None, :] * w[None, :, :], axis=2)


@triton.jit
def stream_piece(residual_ptr, update_ptr, rows, cols, stride_rt, stride_ut, inside, HAS_UPDATE: tl.constexpr):
    """h [T, D piece] in the stream's dtype: as stored, where there is no update."""
    h = tl.load(residual_ptr + rows[:, None] * stride_rt + cols[None, :], mask=inside, other=0.0)
    if HAS_UPDATE:
        update = tl.load(update_ptr + rows[:, None] * stride_ut + cols[None, :], mask=inside, other=0.0)
        h = (h.to(tl.float32) + update.to(tl.float32)).to(h.dtype)
    return h


@triton.jit
def expand(
    values,
    values_ptr,
    w_ptr,
    rows,
    cols,
    in_rows,
    in_cols,
    R,
    stride_wd,
    stride_wr,
    ACTIVATION: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """phi(values) [T, R] @ w [D piece, R].T.

    `values` are in registers while one piece holds the rank, with phi applied. A wider rank would fill the register
    file as an operand, so its pieces come back from `values_ptr`, which this program has written.
    """
    if RANK == BLOCK_R:
        ranks = tl.arange(0, RANK)
        w_at = w_ptr + cols.to(tl.int64)[:, None] * stride_wd + ranks[None, :] * stride_wr
        w = tl.load(w_at, mask=in_cols[:, None] & (ranks < R)[None, :], other=0.0)
        out = product(values, w.to(tl.float32), PRECISION)
    else:
        out = tl.zeros([rows.shape[0], cols.shape[0]], tl.float32)
        for start in range(0, R, BLOCK_R):
            ranks = start + tl.arange(0, BLOCK_R)
            in_rank = ranks < R
            piece_at = values_ptr + rows[:, None] * R + ranks[None, :]
            piece = tl.load(piece_at, mask=in_rows[:, None] & in_rank[None, :], other=0.0)
            w_at = w_ptr + cols.to(tl.int64)[:, None] * stride_wd + ranks.to(tl.int64)[None, :] * stride_wr
            w = tl.load(w_at, mask=in_cols[:, None] & in_rank[None, :], other=0.0)
            out += product(phi(piece, ACTIVATION), w.to(tl.float32), PRECISION)
    return out


@triton.jit
def moved_piece(
    h,
    a,
    pre_ptr,
    up_ptr,
    static_ptr,
    scale,
    rows,
    cols,
    in_rows,
    active,
    D,
    R,
    stride_ud,
    stride_ur,
    HAS_STATIC: tl.constexpr,
    ACTIVATION: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """[T, D piece] each: x = h, or 0 in a row left alone; push = a @ up.T + static; m = x + scale * push."""
    in_cols = cols < D
    x = tl.where(active[:, None], h.to(tl.float32), 0.0)
    if RANK > 0:
        push = expand(
            a, pre_ptr, up_ptr, rows, cols, in_rows, in_cols, R, stride_ud, stride_ur,
            ACTIVATION, RANK, BLOCK_R, PRECISION,
        )  # fmt: skip
    else:
        push = tl.zeros([rows.shape[0], cols.shape[0]], tl.float32)
    if HAS_STATIC:
        push += tl.load(static_ptr + cols, mask=in_cols, other=0.0).to(tl.float32)[None, :]
    return x, push, x + scale[:, None] * push


@triton.jit
def norm_ratio(squares, moved_squares, changed):
    """|x| / |m|, exactly 1 for a row that the push left as it was, whatever order the two sums were rounded in."""
    norm = tl.sqrt_rn(moved_squares)
    ratio = tl.div_rn(tl.sqrt_rn(squares), tl.where(norm > 0.0, norm, 1.0))
    return tl.where((changed > 0) | (norm == 0.0), ratio, 1.0)
