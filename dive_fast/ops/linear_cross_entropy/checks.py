"""Validation of `linear_cross_entropy`'s arguments; everything behind it trusts them."""

import math
from numbers import Real

import torch

from dive_fast.ops.checks import DTYPES, accumulation_dtype, check_device, check_tensor, wrong
from dive_fast.ops.linear_cross_entropy.types import TeacherStatistics

REDUCTIONS = ("mean", "sum", "none")


def check_head(hidden, weight, bias, class_weights, max_workspace_bytes) -> None:
    """The final hidden states against the head, for the loss and for `teacher_statistics`."""
    for name, value in (("hidden", hidden), ("weight", weight)):
        if not isinstance(value, torch.Tensor):
            raise wrong(name, "a tensor", type(value).__name__, "pass a torch.Tensor")
        if hasattr(value, "full_tensor"):
            raise wrong(name, "a plain tensor", "a sharded DTensor", f"gather it first with {name}.full_tensor()")
        if value.dtype not in DTYPES:
            raise wrong(name, "float16, bfloat16, float32 or float64", value.dtype, f"use {name}.float()")
    if weight.dim() != 2 or weight.shape[0] == 0:
        remedy = "pass the whole lm_head weight (under ZeRO-3 gather it first with deepspeed.zero.GatheredParameters)"
        raise wrong("weight", "shape [V, D] with V >= 1", list(weight.shape), remedy)
    if hidden.dim() == 0 or hidden.shape[-1] != weight.shape[1]:
        remedy = "pass the states that enter this lm_head"
        raise wrong("hidden", f"shape [..., D] with weight's D = {weight.shape[1]}", list(hidden.shape), remedy)
    check_device("weight", weight, hidden.device)
    if bias is not None:
        check_tensor("bias", bias, weight.shape[:1], hidden.device, "[V]")
    if class_weights is not None:
        check_tensor("class_weights", class_weights, weight.shape[:1], hidden.device, "[V]")
        if class_weights.requires_grad:
            raise wrong("class_weights", "constants", "a tensor that requires grad", "use class_weights.detach()")
    if not isinstance(max_workspace_bytes, int) or max_workspace_bytes <= 0:
        raise wrong("max_workspace_bytes", "an int > 0", repr(max_workspace_bytes), "for example 512 * 2**20")


def check_rows(hidden, targets, token_weights, rows, ignore_index) -> None:
    """Shapes, dtypes and devices of the per-row inputs."""
    if not isinstance(targets, torch.Tensor) or targets.dtype != torch.int64:
        got = getattr(targets, "dtype", type(targets).__name__)
        raise wrong("targets", "an int64 tensor", got, "use targets.long()")
    if targets.shape != hidden.shape[:-1]:
        remedy = "give one target per hidden state, shifted by the caller"
        raise wrong("targets", f"shape hidden.shape[:-1] = {list(hidden.shape[:-1])}", list(targets.shape), remedy)
    check_device("targets", targets, hidden.device)
    if token_weights is not None:
        check_tensor("token_weights", token_weights, targets.shape, hidden.device, "of targets")
        if token_weights.requires_grad:
            raise wrong("token_weights", "constants", "a tensor that requires grad", "use token_weights.detach()")
    if rows is not None:
        if not isinstance(rows, torch.Tensor) or rows.dtype != torch.int64 or rows.dim() != 1:
            got = f"{rows.dtype} {list(rows.shape)}" if isinstance(rows, torch.Tensor) else type(rows).__name__
            raise wrong("rows", "an int64 tensor [N]", got, "use (targets != ignore_index).flatten().nonzero()[:, 0]")
        check_device("rows", rows, hidden.device)
    if not isinstance(ignore_index, int):
        raise wrong("ignore_index", "an int", repr(ignore_index), "the custom is -100")


def check_options(label_smoothing, z_loss, softcap, kl_weight, reduction) -> None:
    """The scalar options."""
    if not (_finite(label_smoothing) and 0 <= label_smoothing < 1):
        raise wrong("label_smoothing", "a number in [0, 1)", repr(label_smoothing), "0 turns it off")
    for name, value in (("z_loss", z_loss), ("kl_weight", kl_weight)):
        if not (_finite(value) and value >= 0):
            raise wrong(name, "a finite number >= 0", repr(value), "0 turns it off")
    if softcap is not None and not (_finite(softcap) and softcap > 0):
        raise wrong("softcap", "None or a finite number > 0", repr(softcap), "None turns it off")
    if reduction not in REDUCTIONS:
        raise wrong("reduction", "one of 'mean', 'sum', 'none'", repr(reduction), "see the docstring")


def check_teacher(hidden, weight, bias, teacher, rows, kl_weight, softcap) -> None:
    """Either form of teacher over rows of shape `rows`, and what each excludes."""
    if teacher is None:
        if kl_weight > 0:
            remedy = "pass the teacher's hidden states or teacher_statistics(...), or set kl_weight=0"
            raise wrong("teacher", "a teacher because kl_weight > 0", "None", remedy)
        return
    if isinstance(teacher, TeacherStatistics):
        mean_weight = teacher.tail_mean_weight
        check_tensor("teacher.tail_mean_weight", mean_weight, (*rows, hidden.shape[-1]), hidden.device, "of hidden")
        for name in ("tail_mass", "tail_negative_entropy"):
            check_tensor(f"teacher.{name}", getattr(teacher, name), rows, hidden.device, "of targets")
        top = (*rows, teacher.top_log_probs.shape[-1] if teacher.top_log_probs.dim() else 0)
        check_tensor("teacher.top_log_probs", teacher.top_log_probs, top, hidden.device, "of targets and K")
        if teacher.top_indices.shape != top or teacher.top_indices.dtype != torch.int32:
            got = f"{teacher.top_indices.dtype} {list(teacher.top_indices.shape)}"
            raise wrong("teacher.top_indices", f"int32 {list(top)}, as top_log_probs", got, "use teacher_statistics")
        if top[-1] > weight.shape[0]:
            remedy = "pass the statistics of a teacher with this head's vocabulary"
            raise wrong("teacher.top_indices", f"at most V = {weight.shape[0]} tokens a row", top[-1], remedy)
        if softcap is not None:
            remedy = "pass the teacher's hidden states instead: the statistics hold only for linear logits"
            raise wrong("teacher", "hidden states because softcap is set", "TeacherStatistics", remedy)
        if kl_weight > 0 and (weight.requires_grad or (bias is not None and bias.requires_grad)):
            remedy = "pass the teacher's hidden states instead: the statistics were made by one fixed head"
            raise wrong("teacher", "hidden states because the head is being trained", "TeacherStatistics", remedy)
    else:
        check_tensor("teacher", teacher, (*rows, hidden.shape[-1]), hidden.device, "of hidden")


def check_denominator(denominator, teacher, reduction) -> None:
    """A number or 0-d tensor, or two of them with a teacher; only where a mean is formed."""
    if denominator is None:
        return
    if reduction != "mean":
        raise wrong("denominator", "None", f"a value with reduction={reduction!r}", "it replaces a mean's divisor")
    is_pair = isinstance(denominator, tuple | list) and len(denominator) == 2
    if teacher is not None and not is_pair:
        remedy = "pass (sum of token weights, number of counted rows) over the whole batch"
        raise wrong("denominator", "a pair (cross-entropy, KL) because there is a teacher", repr(denominator), remedy)
    if teacher is None and isinstance(denominator, tuple | list):
        raise wrong("denominator", "a number or 0-d tensor", repr(denominator), "a pair is for use with a teacher")
    for value in denominator if is_pair else (denominator,):
        if isinstance(value, torch.Tensor):
            sound = value.dim() == 0 and not value.requires_grad and not value.is_complex()
        else:
            sound = _finite(value) and value >= 0
        if not sound:
            raise _wrong_denominator(value)


def _wrong_denominator(value):
    remedy = "pass the sum of the token weights over the whole batch, without gradient"
    return wrong("denominator", "a finite number or 0-d tensor >= 0", repr(value), remedy)


def check_logits_dtype(logits_dtype, hidden, weight) -> torch.dtype:
    """The dtype of the logits product; None is the accumulation dtype."""
    accumulate = accumulation_dtype(hidden, weight)
    if logits_dtype is None:
        return accumulate
    if logits_dtype not in (accumulate, hidden.dtype):
        expected = f"None, {accumulate} or hidden's {hidden.dtype}"
        raise wrong("logits_dtype", expected, logits_dtype, "None is the exact choice")
    return logits_dtype


def check_values(targets, token_weights, rows, class_weights, teacher, denominators, ignore_index, vocabulary) -> None:
    """Read the values and refuse the first that is out of range; on another device than the CPU this waits for it.

    Args:
        targets: [T]; token_weights: [T] or None; rows: [N] or None; class_weights: [V] or None.
        teacher: as in the public function.
        denominators: numbers, 0-d tensors and None.

    Raises:
        InputError: names the argument, the row and the value.
    """
    for value in denominators:
        if isinstance(value, torch.Tensor) and not (_finite(value.item()) and value.item() >= 0):
            raise _wrong_denominator(value)
    if rows is not None:
        _refuse_first((rows < 0) | (rows >= len(targets)), rows, "rows", f"values in [0, {len(targets)})", "flat rows")
        repeated = torch.bincount(rows, minlength=1) > 1
        if repeated.any():
            got = f"{repeated.nonzero()[0].item()} more than once"
            raise wrong("rows", "every row once", got, "raise its token weight")
    expected = f"values in [0, {vocabulary}) or ignore_index = {ignore_index}"
    remedy = "tokenize with the model's own tokenizer or mark the row with ignore_index"
    _refuse_first(bad_targets(targets, ignore_index, vocabulary), targets, "targets", expected, remedy)
    if token_weights is not None:
        remedy = "use weight 0 to leave a row out"
        _refuse_first(bad_weights(token_weights), token_weights, "token_weights", "finite values >= 0", remedy)
    if class_weights is not None:
        remedy = "use weight 0 to leave a class out"
        _refuse_first(bad_weights(class_weights), class_weights, "class_weights", "finite values >= 0", remedy)
    if isinstance(teacher, TeacherStatistics) and teacher.top_indices.numel():
        top = teacher.top_indices
        bad = ((top < 0) | (top >= vocabulary)).any(dim=1)
        remedy = "pass the statistics of a teacher with this head's vocabulary"
        _refuse_first(bad, top.amax(dim=1), "teacher.top_indices", f"values in [0, {vocabulary})", remedy)


def _refuse_first(bad, values, argument, expected, remedy) -> None:
    if bad.any():
        row = bad.nonzero()[0].item()
        raise wrong(argument, expected, f"{values[row].item()} in row {row}", remedy)


def bad_targets(targets, ignore_index, vocabulary) -> torch.Tensor:
    """Where a target is neither a class nor `ignore_index`."""
    return (targets != ignore_index) & ((targets < 0) | (targets >= vocabulary))


def bad_weights(weights) -> torch.Tensor:
    """Where a weight is negative, NaN or infinite."""
    return ~((weights >= 0) & weights.isfinite())


def poison(targets, token_weights, ignore_index, vocabulary):
    """Give rows with a bad target or weight a target that can be looked up and a NaN weight, which reaches the loss.

    For devices whose values cannot be read without waiting for them.
    """
    bad = bad_targets(targets, ignore_index, vocabulary) | bad_weights(token_weights)
    return targets.masked_fill(bad, 0), token_weights.masked_fill(bad, math.nan)


def _finite(value) -> bool:
    # Comparisons, because a graph that is traced with changing numbers knows no isfinite.
    return isinstance(value, Real) and -math.inf < value < math.inf
