"""The loss on a GPU, a chunk of rows at a time: cuBLAS logits, one row kernel, cuBLAS hidden gradient.

    logits = hidden[rows] @ weight.T          # [R, V], one reused workspace
    dlogits, figures = row kernel(logits)     # dlogits over the logits, in place
    gradient = dlogits @ weight               # [R, D]

T rows, N rows that count, R rows of one chunk, D hidden size, V vocabulary, K top tokens of a cached teacher.
"""

import math
import threading
from contextlib import contextmanager

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
from dive_fast.ops.linear_cross_entropy.triton_gradient_rows import scatter_scaled_rows, sum_parts
from dive_fast.ops.linear_cross_entropy.triton_row_kernel import linear_cross_entropy_row_fwd_kernel
from dive_fast.ops.linear_cross_entropy.types import RowFigures, RowInputs

__all__ = ["row_figures", "rows_per_chunk", "scatter_scaled_rows"]

# Logits a block of 8 warps holds at once, and the registers a thread may take. Plain: 8 logits a thread in 64
# registers, so that four blocks of 8 KiB are in flight on an SM; an H100 needs 14 KiB (3.0 TB/s * 600 ns / 132 SMs).
# Options that keep more per logit hold 4 a thread, which leaves three blocks in 80 registers; with 16 they would take
# 220 and leave one. Without the bound ptxas spills a pointer now and then to fit yet another block.
PLAIN_BLOCK_V, OPTIONS_BLOCK_V = 2048, 1024
PLAIN_REGISTERS, OPTIONS_REGISTERS = 64, 80
# Below one 128-bit float32 load for each of its threads a warp is not worth having.
MAX_WARPS, LEAST_PER_WARP = 8, 128
OPTIONS_PER_LOGIT = ("HAS_SMOOTHING", "HAS_SOFTCAP", "HAS_ONLINE_TEACHER", "WANTS_STATS")
MAX_BLOCK_D = 1024
MAX_BLOCK_K = 256

# cuBLAS's usual output tile for half precision on sm_80 and later, and the most parts it was taken to split K into.
TILE_ROWS, TILE_COLUMNS, MAX_SPLIT_K = 128, 256, 8
# 798 TFLOP/s over 3.0 TB/s at two FLOP a row and two bytes a weight (H100 SXM): fewer rows wait for the head's bytes.
ROWS_THAT_HIDE_THE_HEAD = 266


@torch.no_grad()
def row_figures(x: RowInputs) -> RowFigures:
    """Figures and unit-scaled hidden gradient of the rows that count; hidden and weight have one dtype.

    Teacher statistics go without softcap. Figures of rows whose shares are both 0 are arbitrary.
    """
    N, V, D = x.sizes
    figures = empty_figures(x)
    if N == 0:
        return figures
    flags = feature_flags(x)
    # Rows start on a 128-byte line, for logits and dlogits of two bytes or more.
    stride = math.ceil(V / 64) * 64
    row_bytes = stride * x.logits_dtype.itemsize * (1 + flags["HAS_ONLINE_TEACHER"])
    R = rows_per_chunk(N, D, row_bytes, x.max_workspace_bytes, multiprocessors(x.hidden.device))
    tables = teacher_tables(x)
    has_tail = flags["HAS_CACHED_TEACHER"] and flags["HAS_KL_GRADIENT"]
    K = tables[3].shape[1] if flags["HAS_CACHED_TEACHER"] else 0
    accumulate = figures.ce.dtype
    logits = x.hidden.new_empty(R, stride, dtype=x.logits_dtype)
    teacher_logits = torch.empty_like(logits) if flags["HAS_ONLINE_TEACHER"] else None
    top_dlogits = x.hidden.new_empty(R, K, dtype=accumulate) if has_tail else None
    product = x.hidden.new_empty(R, D, dtype=accumulate) if has_tail else None
    c_sum = class_weight_sum(x)
    dlogits = logits.view(x.hidden.dtype)

    BLOCK_V, registers = block_and_registers(V, flags)
    with device_of(x.hidden), _reductions.exact():
        for start in range(0, N, R):
            chunk = slice(start, min(start + R, N))
            size = chunk.stop - start
            chunk_hidden = x.hidden.index_select(0, x.rows[chunk])
            chunk_teacher = None if x.teacher is None else x.teacher_rows[chunk]
            _product(chunk_hidden, x.weight.T, logits[:size, :V])
            if teacher_logits is not None:
                _product(x.teacher.index_select(0, chunk_teacher), x.weight.T, teacher_logits[:size, :V])
            linear_cross_entropy_row_fwd_kernel[(size,)](
                logits,
                dlogits,
                teacher_logits,
                chunk_hidden,
                chunk_teacher,
                x.targets[chunk],
                x.ce_share[chunk] if x.gradient else None,
                x.kl_share[chunk] if flags["HAS_KL_GRADIENT"] else None,
                x.bias,
                x.class_weights,
                c_sum,
                *tables,
                top_dlogits,
                *(None if figure is None else figure[chunk] for figure in figures[:6]),
                V,
                D,
                K,
                logits.stride(0),
                dlogits.stride(0),
                x.label_smoothing,
                x.z_loss,
                x.softcap or 0.0,
                **flags,
                BLOCK_V=BLOCK_V,
                BLOCK_D=min(MAX_BLOCK_D, triton.next_power_of_2(D)),
                BLOCK_K=min(MAX_BLOCK_K, triton.next_power_of_2(max(K, 1))),
                num_warps=max(1, min(MAX_WARPS, BLOCK_V // LEAST_PER_WARP)),
                maxnreg=registers,
            )
            if has_tail:
                # Kept in the accumulation dtype: the tail's mean is nearly its equal where student and teacher agree.
                _product(dlogits[:size, :V], x.weight, product[:size])
                sum_parts(product[None, :size], figures.gradient[chunk], tables[0], chunk_teacher, x.kl_share[chunk])
            elif x.gradient:
                _product(dlogits[:size, :V], x.weight, figures.gradient[chunk])
    return figures


def block_and_registers(vocabulary: int, flags: dict[str, bool]) -> tuple[int, int]:
    """BLOCK_V of the row kernel with these features, and the registers a thread may take."""
    has_options = any(flags.get(name) for name in OPTIONS_PER_LOGIT)
    block, registers = (OPTIONS_BLOCK_V, OPTIONS_REGISTERS) if has_options else (PLAIN_BLOCK_V, PLAIN_REGISTERS)
    return min(block, triton.next_power_of_2(vocabulary)), registers


def rows_per_chunk(rows: int, hidden_size: int, row_bytes: int, max_workspace_bytes: int, multiprocessors: int) -> int:
    """R: the chunk size with the least estimated time of both products among the few largest that fit the budget.

    Chunks are even and, where the budget allows, multiples of 128 rows, cuBLAS's output tile. A product over r rows
    takes the time of max(r, 266) rows, since below that an H100 waits for the head's bytes. The logits product has
    V / 256 tiles a row block and fills any device; the gradient's has ceil(r / 128) * ceil(D / 256), and even with
    V split among blocks its last wave may leave multiprocessors idle, which is what the candidates are compared by.
    The model is arithmetic on tile counts; it has not been fitted to measurements.
    """
    fit = max(1, max_workspace_bytes // row_bytes)
    fewest = math.ceil(rows / fit)
    candidates = []
    for chunks in range(fewest, fewest + 4):
        even = math.ceil(rows / chunks)
        whole_tiles = math.ceil(even / TILE_ROWS) * TILE_ROWS
        candidates.append(min(rows, whole_tiles) if whole_tiles <= fit else even)

    def time(size: int) -> float:
        if size == 0:
            return 0.0
        row_tiles = math.ceil(size / TILE_ROWS)
        tiles = row_tiles * math.ceil(hidden_size / TILE_COLUMNS)
        occupancy = max(
            tiles * split / (math.ceil(tiles * split / multiprocessors) * multiprocessors)
            for split in range(1, MAX_SPLIT_K + 1)
        )
        return max(row_tiles * TILE_ROWS, ROWS_THAT_HIDE_THE_HEAD) * (1 + 1 / occupancy)

    return min(candidates, key=lambda size: rows // size * time(size) + time(rows % size))


def _product(left, right, out) -> None:
    """out = left @ right, accumulated and rounded once in out's dtype."""
    if out.dtype == left.dtype:
        torch.mm(left, right, out=out)
    elif left.is_cuda and out.dtype == torch.float32:
        torch.mm(left, right, out_dtype=out.dtype, out=out)
    else:
        # Only cuBLAS takes operands narrower than its result, and only for float32 results.
        torch.mm(left.to(out.dtype), right.to(out.dtype), out=out)


class _Reductions:
    """cuBLAS's settings, which belong to the process: calls that overlap change them once and hand them back once."""

    def __init__(self):
        self.lock, self.calls, self.before = threading.Lock(), 0, {}

    @contextmanager
    def exact(self):
        """cuBLAS adds up partial products of a split K in float32, whatever the process allows elsewhere."""
        with self.lock:
            self.calls += 1
            if self.calls == 1:
                self.before = _forbid_reduced_precision()
        try:
            yield
        finally:
            with self.lock:
                self.calls -= 1
                if self.calls == 0:
                    for name, value in self.before.items():
                        setattr(torch.backends.cuda.matmul, name, value)


_reductions = _Reductions()


def _forbid_reduced_precision() -> dict:
    """The settings as they were."""
    matmul = torch.backends.cuda.matmul
    before = {}
    for name in ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction"):
        # A plain bool allows splitting K too, so a ban on it must be handed back beside the value.
        may_split = getattr(matmul, f"{name}_split_k", True)
        allowed = getattr(matmul, name)
        before[name] = allowed if may_split else (allowed, False)
        setattr(matmul, name, False if may_split else (False, False))
    before["allow_fp16_accumulation"] = matmul.allow_fp16_accumulation
    matmul.allow_fp16_accumulation = False
    return before
