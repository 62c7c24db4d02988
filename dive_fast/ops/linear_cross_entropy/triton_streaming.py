"""The loss on a GPU without logits in memory: they live in the accumulators of one tile at a time.

    per row block and vocabulary split: logits tile by tile -> partial softmax, figures
    per row: the splits' parts combined
    per row block and vocabulary split: logits again, tile by tile -> dlogits -> part of the hidden gradient

Three products instead of two, and memory that does not depend on V. No atomics: each program owns what it writes, and
parts are added in a fixed order.

T rows, N rows that count, D hidden size, V vocabulary, K top tokens of a cached teacher, S vocabulary splits.
"""

import math
from typing import NamedTuple

import torch
import triton

from dive_fast.ops.linear_cross_entropy.triton_common import (
    class_weight_sum,
    device_of,
    empty_figures,
    feature_flags,
    multiprocessors,
    teacher_tables,
)
from dive_fast.ops.linear_cross_entropy.triton_gradient_rows import sum_parts
from dive_fast.ops.linear_cross_entropy.triton_streaming_gradient import (
    linear_cross_entropy_streaming_gradient_fwd_kernel,
)
from dive_fast.ops.linear_cross_entropy.triton_streaming_softmax import (
    PARTS,
    linear_cross_entropy_streaming_combine_fwd_kernel,
    linear_cross_entropy_streaming_parts_fwd_kernel,
)
from dive_fast.ops.linear_cross_entropy.types import RowFigures, RowInputs

COMBINE_SWITCHES = ("HAS_CLASS_WEIGHTS", "HAS_SMOOTHING", "HAS_ONLINE_TEACHER", "HAS_CACHED_TEACHER")
SWITCHES = ("HAS_BIAS", "HAS_SOFTCAP", *COMBINE_SWITCHES)
# Each top token of a row block costs a thread an index, a place and an address.
MAX_BLOCK_K = 16
MAX_BLOCK_D = 1024
# The least side of a tile that tl.dot takes.
LEAST_SIDE = 16


class Tile(NamedTuple):
    """Rows, tokens and hidden elements of a tile of products, with the warps and pipeline stages that compute it."""

    n: int
    v: int
    d: int
    warps: int
    stages: int


# The largest tiles whose kernels, with every option and a teacher beside the student, stay within 255 registers a
# thread on sm_80, sm_90 and sm_100: 128 tokens in half precision, or 64 in full, spill. Shared memory: 68 KiB at most.
HALF_TILE = Tile(64, 64, 64, warps=8, stages=3)
FULL_TILE = Tile(32, 32, 32, warps=4, stages=2)


@torch.no_grad()
def row_figures(x: RowInputs) -> RowFigures:
    """`row_figures` of the row-chunked form, for float32 and half precision; logits are accumulated in float32.

    max_workspace_bytes bounds the float32 gradient parts [S, rows, D], but never below one split of one row.
    """
    N, V, D = x.sizes
    figures = empty_figures(x)
    if N == 0:
        return figures
    flags = feature_flags(x)
    tables = teacher_tables(x)
    online = x.teacher_hidden
    K = tables[3].shape[1] if flags["HAS_CACHED_TEACHER"] else 0
    tile = tile_shape(x.hidden.dtype, N, V, D)
    vocabulary_tiles = triton.cdiv(V, tile.v)
    size, splits = rows_and_splits(
        N, D, tile.n, vocabulary_tiles, x.max_workspace_bytes, multiprocessors(x.hidden.device)
    )
    grid = (triton.cdiv(size, tile.n), splits)
    parts = x.hidden.new_empty(splits, PARTS.value, size, dtype=torch.float32)
    best = x.hidden.new_empty(splits, size, dtype=torch.int32) if x.stats else None
    softmax = x.hidden.new_empty(4, size, dtype=torch.float32)
    gradient_parts = x.hidden.new_empty(splits, size, D, dtype=torch.float32) if x.gradient else None
    top_tiles = x.hidden.new_zeros(*grid, tile.n, tile.v, dtype=torch.float32) if flags["HAS_CACHED_TEACHER"] else None
    c_sum = class_weight_sum(x)
    sizes = (V, D, K, triton.cdiv(vocabulary_tiles, splits))
    strides = (*x.hidden.stride(), *x.weight.stride(), *((0, 0) if online is None else online.stride()))
    switches = {name: flags[name] for name in SWITCHES} | {
        "ROUNDS_LOGITS": x.logits_dtype != torch.float32,
        "PRECISION": "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee",
        "BLOCK_N": tile.n,
        "BLOCK_V": tile.v,
        "BLOCK_D": tile.d,
        "BLOCK_K": min(MAX_BLOCK_K, triton.next_power_of_2(max(K, 1))),
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
    with device_of(x.hidden):
        for start in range(0, N, size):
            chunk = slice(start, min(start + size, N))
            count = chunk.stop - start
            chunk_rows, chunk_targets = x.rows[chunk], x.targets[chunk]
            chunk_teacher = None if x.teacher is None else x.teacher_rows[chunk]
            chunk_figures = [None if figure is None else figure[chunk] for figure in figures]
            chunk_kl_share = x.kl_share[chunk] if flags["HAS_KL_GRADIENT"] else None
            blocks = (triton.cdiv(count, tile.n), splits)
            states = (x.hidden, x.weight, online, chunk_rows, chunk_teacher, chunk_targets)
            linear_cross_entropy_streaming_parts_fwd_kernel[blocks](
                *states,
                x.bias,
                x.class_weights,
                *tables[3:],
                top_tiles,
                parts,
                best,
                count,
                *sizes,
                *strides,
                x.softcap or 0.0,
                WANTS_STATS=x.stats,
                **switches,
            )
            linear_cross_entropy_streaming_combine_fwd_kernel[(count,)](
                parts,
                best,
                softmax,
                x.hidden,
                chunk_rows,
                chunk_teacher,
                chunk_targets,
                x.class_weights,
                *tables[:3],
                *chunk_figures[:6],
                count,
                V,
                D,
                splits,
                *x.hidden.stride(),
                x.label_smoothing,
                x.z_loss,
                WANTS_STATS=x.stats,
                HAS_Z_LOSS=flags["HAS_Z_LOSS"],
                **{name: flags[name] for name in COMBINE_SWITCHES},
                BLOCK_S=triton.next_power_of_2(splits),
                BLOCK_D=min(MAX_BLOCK_D, triton.next_power_of_2(D)),
                num_warps=4,
            )
            if not x.gradient:
                continue
            linear_cross_entropy_streaming_gradient_fwd_kernel[blocks](
                *states,
                x.ce_share[chunk],
                chunk_kl_share,
                x.bias,
                x.class_weights,
                c_sum,
                *tables[3:],
                top_tiles,
                softmax,
                gradient_parts,
                count,
                *sizes,
                *strides,
                x.label_smoothing,
                x.z_loss,
                x.softcap or 0.0,
                HAS_Z_LOSS=flags["HAS_Z_LOSS"],
                HAS_KL_GRADIENT=flags["HAS_KL_GRADIENT"],
                **switches,
            )
            tail = tables[0] if flags["HAS_KL_GRADIENT"] else None
            used_parts = gradient_parts.view(-1)[: splits * count * D].view(splits, count, D)
            sum_parts(used_parts, chunk_figures[6], tail, chunk_teacher, chunk_kl_share)
    return figures


def tile_shape(dtype: torch.dtype, N: int, V: int, D: int) -> Tile:
    """The dtype's tile, cut down to problems that are smaller than it."""
    largest = FULL_TILE if dtype == torch.float32 else HALF_TILE
    sides = (
        max(LEAST_SIDE, min(side, triton.next_power_of_2(extent)))
        for side, extent in zip(largest[:3], (N, V, D), strict=True)
    )
    return Tile(*sides, *largest[3:])


def rows_and_splits(
    rows: int, hidden_size: int, tile_rows: int, vocabulary_tiles: int, max_workspace_bytes: int, multiprocessors: int
) -> tuple[int, int]:
    """(rows a chunk, vocabulary splits S): as few chunks as the float32 parts [S, rows, D] allow, then splits.

    Splits make up for row blocks fewer than the multiprocessors; beyond that they only add parts to write and sum.
    """
    row_bytes = 4 * hidden_size
    fit = max(1, max_workspace_bytes // row_bytes)
    if fit < rows and fit > tile_rows:
        fit -= fit % tile_rows
    size = min(rows, fit)
    wanted = math.ceil(multiprocessors / math.ceil(size / tile_rows))
    splits = max(1, min(wanted, vocabulary_tiles, max_workspace_bytes // (size * row_bytes)))
    # No split may be left without a tile: its gradient part would be read unwritten.
    return size, math.ceil(vocabulary_tiles / math.ceil(vocabulary_tiles / splits))
