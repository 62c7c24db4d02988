"""Matrices as int8 with a float32 scale per row: made once for a parameter, and kept as long as it lives unchanged."""

from typing import NamedTuple

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from dive_fast import native

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # in the order of csrc/cpu/dtype.h
_LINE = 64  # bytes


class Int8Matrix(NamedTuple):
    """Row n of the matrix is about values[n] * scales[n].

    Attributes:
        values: int8 [N, K], from -127 to 127.
        scales: float32 [N], max |row| / 127.
    """

    values: torch.Tensor
    scales: torch.Tensor


class _Kept(NamedTuple):
    state: tuple
    matrix: Int8Matrix


_kept: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def int8_matrix(weight: torch.Tensor) -> Int8Matrix:
    """`weight` [N, K] (float32, bfloat16 or float16 on the CPU, rows contiguous) with every row rounded to 255 steps.

    A second call with the same tensor returns the same matrix, unless the tensor was written to in between, through
    `.data` too: its memory is read and summed.
    """
    weight_state = _state(weight)
    found = _kept.get(weight)
    if found is not None and found.state == weight_state:
        return found.matrix
    rows, columns = weight.shape
    matrix = Int8Matrix(torch.empty(rows, columns, dtype=torch.int8), torch.empty(rows))
    cpu = native.load().cpu
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
    """What changes when the tensor does: its place, torch's count of writes, the sum of its memory's words in whole
    cache lines, and the numbers behind the last of them."""
    cpu = native.load().cpu
    rows, _ = weight.shape
    words = (rows - 1) * weight.stride(0) + weight.shape[1]
    total = cpu.decode.read_memory(
        weight.data_ptr(), words * weight.element_size(), cpu.kernel_levels()[-1], torch.get_num_threads()
    )
    return weight.data_ptr(), weight._version, total, weight[-1, -_LINE // weight.element_size() :].tolist()
