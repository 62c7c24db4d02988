"""Matrices as int8 with a float32 scale per row: made once for a parameter, and kept as long as it lives unchanged."""

from typing import NamedTuple

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from dive_fast import native
from dive_fast.models.writes import write_count

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # in the order of csrc/cpu/dtype.h
_LINE = 64  # bytes


class Int8Matrix(NamedTuple):
    """Row n of a matrix [N, K] is about scales[n] times its numbers in `values`.

    Attributes:
        values: int8 [ceil(N / 16), ceil(K / 4), 16, 4], from -127 to 127: number k of row n is
            values[n // 16, k // 4, n % 16, k % 4], and beyond N and K there are zeros. So 16 rows at 4 columns are a
            cache line, which the processor multiplies with 4 numbers at a time.
        scales: float32 [N], max |row| / 127.
    """

    values: torch.Tensor
    scales: torch.Tensor

    @property
    def row_stride(self) -> int:
        """Numbers of a row, zeros included."""
        _, groups, _, columns = self.values.shape
        return groups * columns


class _Kept(NamedTuple):
    state: tuple
    matrix: Int8Matrix


_kept: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def int8_matrix(weight: torch.Tensor) -> Int8Matrix:
    """`weight` [N, K] (float32, bfloat16 or float16 on the CPU, rows contiguous) with every row rounded to 255 steps.

    A second call with the same tensor returns the same matrix, unless the tensor was written to in between, through
    `.data` too: its memory is read.
    """
    weight_state = _state(weight)
    found = _kept.get(weight)
    if found is not None and found.state == weight_state:
        return found.matrix
    rows, columns = weight.shape
    cpu = native.load().cpu
    line_rows, line_columns = cpu.decode.INT8_LINE
    lines = (-(-rows // line_rows), -(-columns // line_columns), line_rows, line_columns)
    matrix = Int8Matrix(torch.empty(lines, dtype=torch.int8), torch.empty(rows))
    cpu.decode.quantize_int8(
        (weight.data_ptr(), _DTYPES.index(weight.dtype), 0, rows, columns, weight.stride(0), 0),
        matrix.values.data_ptr(),
        matrix.scales.data_ptr(),
        cpu.kernel_levels()[-1],
        torch.get_num_threads(),
    )
    _kept[weight] = _Kept(weight_state, matrix)
    return matrix


def _state(weight: torch.Tensor) -> tuple:
    """What changes when the tensor does: its place, torch's count of writes, a digest of its memory's whole
    cache lines, and the numbers behind the last of them."""
    cpu = native.load().cpu
    rows, _ = weight.shape
    words = (rows - 1) * weight.stride(0) + weight.shape[1]
    digest = cpu.decode.digest_memory(
        weight.data_ptr(), words * weight.element_size(), cpu.kernel_levels()[-1], torch.get_num_threads()
    )
    return weight.data_ptr(), write_count(weight), digest, weight[-1, -_LINE // weight.element_size() :].tolist()
