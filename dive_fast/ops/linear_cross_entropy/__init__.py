"""Cross-entropy of a linear head, with per-token weights and distillation, without holding the logits of all rows.

T rows, D hidden size, V vocabulary.
"""

import torch

from dive_fast.ops.backend import select_backend
from dive_fast.ops.checks import accumulation_dtype
from dive_fast.ops.linear_cross_entropy import checks, reference
from dive_fast.ops.linear_cross_entropy.types import LossStats, TeacherStatistics

__all__ = ["DEFAULT_WORKSPACE_BYTES", "LossStats", "TeacherStatistics", "linear_cross_entropy", "teacher_statistics"]

# 512 MiB hold about 290 rows of the reference's float32 buffers at V = 152064 (Qwen2.5). An H100 needs some 266 rows
# (798 TFLOP/s over 3.0 TB/s, two bytes a weight) before reading the head stops being the limit; more buys little.
DEFAULT_WORKSPACE_BYTES = 512 * 2**20

IMPLEMENTATIONS = {"reference": reference.linear_cross_entropy}


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    token_weights: torch.Tensor | None = None,
    *,
    bias: torch.Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    teacher: torch.Tensor | TeacherStatistics | None = None,
    kl_weight: float = 0.0,
    reduction: str = "mean",
    denominator=None,
    logits_dtype: torch.dtype | None = None,
    max_workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
    return_stats: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, LossStats]:
    """Weighted cross-entropy and KL distillation of `hidden @ weight.T`.

    With z = hidden @ weight.T + bias, then z = softcap * tanh(z / softcap) if a softcap is given, per row t::

        nll_t = logsumexp(z_t) - z_t[targets_t]
        ce_t  = (1 - label_smoothing) * nll_t + label_smoothing * mean_v(logsumexp(z_t) - z_tv)
                + z_loss * logsumexp(z_t)**2
        KL_t  = sum_v q_tv * (log q_tv - log softmax(z_t)_v)                  # q: the teacher's distribution

        "none": w_t * ce_t + kl_weight * KL_t       # float32, 0 on rows that do not count
        "sum":  sum_t of "none"
        "mean": sum_t(w_t * ce_t) / sum_t(w_t) + kl_weight * sum_t(KL_t) / (number of rows that count)

    A row counts when its target is not `ignore_index` and its weight is > 0. Other rows are dropped before the logits
    product: they cost nothing, and NaN in them reaches neither loss nor gradient. When no row counts the loss is 0, its
    gradients are zeros. In float32, with every row counting at weight 1, no options and one chunk, loss and gradients
    are those of `torch.nn.functional.cross_entropy(hidden @ weight.T, targets)` to the last bit.

    Args:
        hidden: final hidden states [..., D]; float16, bfloat16, float32 or float64.
        weight: lm_head weight [V, D], any of these dtypes; it and `bias` get gradients only if they require them.
        targets: int64 [...], not shifted here.
        token_weights: floating [...], finite and >= 0, constants; None is 1 everywhere.
        bias: [V]; -inf takes a token out of the vocabulary (not with label smoothing, whose mean then is infinite).
        ignore_index: the target of rows that do not count.
        label_smoothing: in [0, 1).
        z_loss: weight of the squared log-sum-exp, >= 0.
        softcap: > 0, or None.
        teacher: the teacher's final hidden states [..., D], read by the same head; or `TeacherStatistics`, for a head
            that is not trained and has no softcap. No gradient flows into it.
            The statistics' KL is a difference of numbers as large as logits: rounding leaves about 1e-6 of their size.
        kl_weight: >= 0.
        reduction: "mean", "sum" or "none" (the shape of `targets`).
        denominator: for "mean", a number or 0-d tensor in place of sum(w), so that micro-batches or data-parallel ranks
            add up to the mean over the whole batch; with a teacher a pair, the second in place of the number of rows.
        logits_dtype: dtype of the logits product. None is float32 on every device (float64 with float64 inputs):
            lower-precision operands are widened first. `hidden.dtype` is cheaper and dominates the error in half
            precision. Softmax and all reductions are float32 (float64) either way.
        max_workspace_bytes: bound on the [rows, V] buffers alive at once, chunk by chunk, but never below one row. With
            more than one chunk the reference computes logits again in the backward pass instead of keeping them. A head
            in half precision is widened one chunk at a time, which takes another 4 * V * D bytes.
        return_stats: also return `LossStats`.
        backend: None (the best for the device) or "reference".

    Returns:
        The loss, float32 (float64 with float64 inputs); with `return_stats` the pair (loss, LossStats).

    Raises:
        InputError: an argument of the wrong shape, dtype, device or range. On the CPU also a target outside [0, V), or
            a weight that is negative, NaN or infinite, with its row; on other devices such a row makes the loss NaN,
            because looking would wait for the device. (The reference waits once anyway, for the number of rows that
            count.)

    Sources: weighted loss and distillation, arXiv 2605.27194; z-loss, PaLM (arXiv 2204.02311), section 5; softcap,
        Gemma 2 (arXiv 2408.00118), section 2.
    """
    checks.check_head(hidden, weight, bias, max_workspace_bytes)
    checks.check_rows(hidden, targets, token_weights, ignore_index)
    checks.check_options(label_smoothing, z_loss, softcap, kl_weight, reduction)
    checks.check_teacher(hidden, weight, bias, teacher, kl_weight, softcap)
    checks.check_denominator(denominator, teacher, reduction)
    logits_dtype = checks.check_logits_dtype(logits_dtype, hidden, weight)
    implementation = IMPLEMENTATIONS[select_backend("linear_cross_entropy", backend, hidden.device)]

    accumulate = accumulation_dtype(hidden, weight)
    flat_targets = targets.reshape(-1)
    if token_weights is None:
        flat_weights = torch.ones(flat_targets.shape, dtype=accumulate, device=hidden.device)
    else:
        flat_weights = token_weights.reshape(-1).to(accumulate)
    flat_targets, flat_weights = checks.check_values(flat_targets, flat_weights, ignore_index, weight.shape[0])
    loss, stats = implementation(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        flat_targets,
        flat_weights,
        bias=bias,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
        teacher=_flatten_teacher(teacher, hidden.shape[-1]),
        kl_weight=kl_weight,
        reduction=reduction,
        denominator=denominator,
        logits_dtype=logits_dtype,
        max_workspace_bytes=max_workspace_bytes,
        return_stats=return_stats,
    )
    if reduction == "none":
        loss = loss.reshape(targets.shape)
    if not return_stats:
        return loss
    return loss, LossStats(*(None if figure is None else figure.reshape(targets.shape) for figure in stats))


def teacher_statistics(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    max_workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
) -> TeacherStatistics:
    """A teacher's distributions in D + 1 numbers a row, enough for the exact KL to any student of the same linear head.

    With q = softmax(hidden @ weight.T + bias)::

        mean_weight      = q @ weight                                     # [..., D]
        negative_entropy = sum_v(q_v * log q_v) - q @ bias                # [...]
        KL(q || p)       = negative_entropy - mean_weight . h_student + logsumexp(h_student @ weight.T + bias)

    The last line follows from log p_v = weight_v . h_student + bias_v - logsumexp: the bias enters KL only through its
    mean under q, which does not depend on the student. It does not hold for logits with a softcap.

    Args:
        hidden: the teacher's final hidden states [..., D].
        weight: lm_head weight [V, D]; bias: [V] or None.
        max_workspace_bytes: bound on the [rows, V] buffers, but never below one row.

    Returns:
        TeacherStatistics, float32 (float64 with float64 inputs), without gradient.

    Raises:
        InputError: shapes, dtypes or devices that do not fit.
    """
    checks.check_head(hidden, weight, bias, max_workspace_bytes)
    flat = reference.teacher_statistics(
        hidden.reshape(-1, hidden.shape[-1]), weight, bias=bias, max_workspace_bytes=max_workspace_bytes
    )
    return TeacherStatistics(flat.mean_weight.reshape(hidden.shape), flat.negative_entropy.reshape(hidden.shape[:-1]))


def _flatten_teacher(teacher, hidden_size: int):
    if isinstance(teacher, TeacherStatistics):
        return TeacherStatistics(teacher.mean_weight.reshape(-1, hidden_size), teacher.negative_entropy.reshape(-1))
    return None if teacher is None else teacher.reshape(-1, hidden_size)
