"""The CPU backend: loss figures and hidden gradient of a frozen head in one call of the compiled extension.

N rows that count, D hidden size, V vocabulary.
"""

import torch

from dive_fast import native
from dive_fast.ops.linear_cross_entropy.types import RowFigures, RowInputs, TeacherStatistics

# As numbered in csrc/cpu/dtype.h.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NO_MATRIX = (0, 0, 0)


def row_figures(x: RowInputs, *, isa: str | None = None, threads: int | None = None) -> RowFigures:
    """Figures and hidden gradient of the rows that count; float32, bfloat16 or float16.

    Logits are float32 whatever `logits_dtype` is: sums in registers are float32 anyway, so that rounding them to less
    would cost time and gain none. The workspace never holds less than one panel of rows (32 with AVX-512, 16 with AVX2,
    8 without either).

    Args:
        isa: level of the kernels, a name in `dive_fast._native.cpu.kernel_levels()`; None is the quickest
            for these dtypes.
        threads: None is `torch.get_num_threads()`. Equal numbers give equal bits.

    Returns:
        RowFigures; float32 but for `correct` (bool) and `gradient` (hidden's dtype).

    Raises:
        InputError: the extension is not built. ValueError: an index out of range.
    """
    N, V, D = x.sizes
    figures = {"ce": x.hidden.new_empty(N, dtype=torch.float32)}
    if x.teacher is not None:
        figures["kl"] = torch.empty_like(figures["ce"])
    if x.stats:
        figures.update({name: torch.empty_like(figures["ce"]) for name in ("lse", "log_prob", "entropy")})
        figures["correct"] = x.hidden.new_empty(N, dtype=torch.bool)
    if x.gradient:
        figures["gradient"] = x.hidden.new_empty(N, D)
    if N == 0:
        return RowFigures(**figures)

    inputs = {name: _contiguous(getattr(x, name), torch.int64) for name in ("rows", "targets", "teacher_rows")}
    for name in ("ce_share", "kl_share", "bias", "class_weights"):
        inputs[name] = _contiguous(getattr(x, name), torch.float32)
    for name in TeacherStatistics._fields:
        dtype = torch.int32 if name == "top_indices" else torch.float32
        inputs[name] = None if x.statistics is None else _contiguous(getattr(x.statistics, name), dtype)
    kernels = native.load().cpu
    hidden, weight = _matrix(x.hidden), _matrix(x.weight)
    kernels.linear_cross_entropy(
        rows_counted=N,
        hidden_size=D,
        vocabulary=V,
        hidden=hidden,
        weight=weight,
        teacher_hidden=NO_MATRIX if x.teacher_hidden is None else _matrix(x.teacher_hidden),
        top_count=0 if x.statistics is None else x.statistics.top_indices.shape[-1],
        label_smoothing=x.label_smoothing,
        z_loss=x.z_loss,
        softcap=x.softcap or 0.0,
        max_workspace_bytes=x.max_workspace_bytes,
        threads=threads or torch.get_num_threads(),
        isa=isa or kernels.linear_cross_entropy_level(hidden[2], weight[2]),
        **{name: 0 if tensor is None else tensor.data_ptr() for name, tensor in inputs.items()},
        **{name: figures[name].data_ptr() if name in figures else 0 for name in RowFigures._fields},
    )
    return RowFigures(**figures)


def _contiguous(tensor: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    return None if tensor is None else tensor.detach().to(dtype).contiguous()


def _matrix(tensor: torch.Tensor) -> tuple[int, int, int]:
    """(address, row stride in elements, number of the dtype)"""
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise AssertionError(f"expected a unit inner stride, got {tensor.stride()}")
    return tensor.data_ptr(), tensor.stride(0), DTYPES.index(tensor.dtype)
