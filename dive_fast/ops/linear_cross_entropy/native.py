"""The CPU backend: loss figures and hidden gradient of a frozen head in one call of the compiled extension.

T rows of hidden states, N rows that count, D hidden size, V vocabulary, K most probable tokens.
"""

import torch

from dive_fast import native
from dive_fast.ops.linear_cross_entropy.types import RowFigures, TeacherStatistics

# As numbered in csrc/cpu/dtype.h.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NO_MATRIX = (0, 0, 0)


def row_figures(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    rows: torch.Tensor,
    ce_share: torch.Tensor | None,
    kl_share: torch.Tensor | None,
    *,
    teacher_rows: torch.Tensor | None,
    bias: torch.Tensor | None,
    class_weights: torch.Tensor | None,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    teacher: torch.Tensor | TeacherStatistics | None,
    logits_dtype: torch.dtype,
    max_workspace_bytes: int,
    gradient: bool,
    stats: bool,
    isa: str | None = None,
    threads: int | None = None,
) -> RowFigures:
    """Cross-entropy, KL and hidden gradient of the rows that count; the formulas are `linear_cross_entropy`'s.

    Args:
        hidden: [T, D], weight: [V, D]; float32, bfloat16 or float16, unit inner stride.
        targets: int64 [N], in [0, V).
        rows: int64 [N], the row of `hidden` of each target.
        ce_share, kl_share: float32 [N]; gradient = ce_share * d ce / d hidden + kl_share * d kl / d hidden. None is 0.
        bias, class_weights: [V] or None.
        teacher: hidden states or statistics, whose rows `teacher_rows` (int64 [N]) belong to the targets; or None.
        logits_dtype: the least precision asked for. Logits are float32 whatever it is: sums in registers are float32
            anyway, so that rounding them to less would cost time and gain none.
        max_workspace_bytes: bound on the logits held at once, but never below those of one panel of rows (32 with
            AVX-512, 16 with AVX2, 8 without either).
        gradient: compute the gradient; stats: compute lse, log_prob, entropy and correct.
        isa: level of the kernels, a name in `dive_fast._native.cpu.kernel_levels()`; None is the best.
        threads: None is `torch.get_num_threads()`. Equal numbers give equal bits.

    Returns:
        RowFigures; float32 but for `correct` (bool) and `gradient` (hidden's dtype).

    Raises:
        InputError: the extension is not built. ValueError: an index out of range.
    """
    count, (_, hidden_size) = len(rows), hidden.shape
    figures = {"ce": hidden.new_empty(count, dtype=torch.float32)}
    if teacher is not None:
        figures["kl"] = torch.empty_like(figures["ce"])
    if stats:
        figures.update({name: torch.empty_like(figures["ce"]) for name in ("lse", "log_prob", "entropy")})
        figures["correct"] = hidden.new_empty(count, dtype=torch.bool)
    if gradient:
        figures["gradient"] = hidden.new_empty(count, hidden_size)
    if count == 0:
        return RowFigures(**figures)

    inputs = {
        "rows": _contiguous(rows, torch.int64),
        "targets": _contiguous(targets, torch.int64),
        "ce_share": _contiguous(ce_share, torch.float32),
        "kl_share": _contiguous(kl_share, torch.float32),
        "bias": _contiguous(bias, torch.float32),
        "class_weights": _contiguous(class_weights, torch.float32),
    }
    statistics = isinstance(teacher, TeacherStatistics)
    teacher_hidden = None if teacher is None or statistics else teacher.to(hidden.dtype)
    inputs["teacher_rows"] = None if teacher is None else _contiguous(teacher_rows, torch.int64)
    for name in TeacherStatistics._fields:
        dtype = torch.int32 if name == "top_indices" else torch.float32
        inputs[name] = _contiguous(getattr(teacher, name), dtype) if statistics else None
    kernels = native.load().cpu
    kernels.linear_cross_entropy(
        rows_counted=count,
        hidden_size=hidden_size,
        vocabulary=weight.shape[0],
        hidden=_matrix(hidden),
        weight=_matrix(weight),
        teacher_hidden=NO_MATRIX if teacher_hidden is None else _matrix(teacher_hidden),
        top_count=teacher.top_indices.shape[-1] if statistics else 0,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap or 0.0,
        max_workspace_bytes=max_workspace_bytes,
        threads=threads or torch.get_num_threads(),
        isa=isa or kernels.kernel_levels()[-1],
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
