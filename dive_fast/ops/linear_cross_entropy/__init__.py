"""Cross-entropy of a linear head, with per-token weights and distillation, without holding the logits of all rows.

T rows, D hidden size, V vocabulary.
"""

import torch

from dive_fast.ops.backend import select_backend
from dive_fast.ops.checks import accumulation_dtype, has_tangent
from dive_fast.ops.linear_cross_entropy import checks, library, reference
from dive_fast.ops.linear_cross_entropy.types import TOP_TOKENS, LossStats, TeacherStatistics
from dive_fast.ops.precision import own_precision

__all__ = ["DEFAULT_WORKSPACE_BYTES", "LossStats", "TeacherStatistics", "linear_cross_entropy", "teacher_statistics"]

# 512 MiB hold the float32 logits of 882 rows at V = 152064 (Qwen2.5). An H100 needs some 266 rows (798 TFLOP/s over
# 3.0 TB/s, two bytes a weight) before reading the head stops being the limit; more buys little.
DEFAULT_WORKSPACE_BYTES = 512 * 2**20


@own_precision
def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    token_weights: torch.Tensor | None = None,
    *,
    rows: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    class_weights: torch.Tensor | None = None,
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
    check_values: bool | None = None,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, LossStats]:
    """Weighted cross-entropy and KL distillation of `hidden @ weight.T`.

    With z = hidden @ weight.T + bias, then z = softcap * tanh(z / softcap) if a softcap is given, c = class_weights (or
    1) and y = targets_t, per row t::

        nll_tv = logsumexp(z_t) - z_tv
        ce_t   = (1 - label_smoothing) * c_y * nll_ty + label_smoothing * mean_v(c_v * nll_tv)
                 + z_loss * logsumexp(z_t)**2
        KL_t   = sum_v q_tv * (log q_tv - log softmax(z_t)_v)                 # q: the teacher's distribution

        "none": w_t * ce_t + kl_weight * KL_t       # float32, 0 on rows that do not count
        "sum":  sum_t of "none"
        "mean": sum_t(w_t * ce_t) / sum_t(w_t * c_y) + kl_weight * sum_t(KL_t) / (number of rows that count)

    A row counts when its target is not `ignore_index` and its weight is > 0. Other rows are dropped before the logits
    product: they cost nothing, and NaN in them reaches neither loss nor gradient. When no row counts the loss is 0, its
    gradient zeros. With weights of 1 it is `torch.nn.functional.cross_entropy(z, targets, class_weights)`.

    With a frozen head, forward and backward together take two products with it, for every reduction and also with a
    teacher's statistics (three with its hidden states): the forward pass leaves each row's gradient, up to a factor
    that the backward pass multiplies in.

    Args:
        hidden: final hidden states [..., D]; float16, bfloat16, float32 or float64.
        weight: lm_head weight [V, D], any of these dtypes; it and `bias` get gradients only if they require them, and
            then from the reference implementation. A sharded weight must be gathered by the caller.
        targets: int64 [...], not shifted here.
        token_weights: floating [...], finite and >= 0, constants; None is 1 everywhere.
        rows: int64 [N], where the rows that count lie among the flattened ones, each once; all others are left out.
            None: the op looks for them, for which a GPU has to be waited for once; a collator knows them anyway.
        bias: [V]; -inf takes a token out of the vocabulary (not with label smoothing, whose mean then is infinite).
        class_weights: [V], finite and >= 0, constants.
        ignore_index: the target of rows that do not count.
        label_smoothing: in [0, 1).
        z_loss: weight of the squared log-sum-exp, >= 0.
        softcap: > 0, or None.
        teacher: the teacher's final hidden states [..., D], read by the same head; or `TeacherStatistics`, for a head
            that is not trained and has no softcap. With `rows` it has one row per entry of them: [N, D]. No gradient
            flows into it.
        kl_weight: >= 0.
        reduction: "mean", "sum" or "none" (the shape of `targets`).
        denominator: for "mean", a number or 0-d tensor in place of sum(w * c), so that micro-batches or data-parallel
            ranks add up to the mean over the whole batch; with a teacher a pair, the second in place of the number of
            rows.
        logits_dtype: dtype of the logits. None is float32 on every device (float64 with float64 inputs), also of
            half-precision operands, whose products are exact in it. `hidden.dtype` is cheaper on a GPU and dominates
            the error in half precision; native keeps float32, which costs it nothing. Softmax and all reductions are
            float32 (float64) either way.
        max_workspace_bytes: bound on the [rows, V] buffers alive at once, chunk by chunk, but never below one row
            (native: one vector of rows). On a GPU a budget below min(N, 128) rows selects the form that holds none.
        return_stats: also return `LossStats`.
        check_values: look at targets and weights, and refuse a target outside [0, V) or a weight that is negative, NaN
            or infinite, naming its row. Otherwise such a row makes the loss NaN. None: on the CPU only, because on
            other devices looking waits for the device.
        backend: None (the best for the device), "native" (CPU), "triton", "triton-streaming" (CUDA) or "reference".

    Returns:
        The loss, float32 (float64 with float64 inputs); with `return_stats` the pair (loss, LossStats).

    Raises:
        InputError: an argument of the wrong shape, dtype, device or range.

    Sources: weighted loss and distillation, arXiv 2605.27194; z-loss, PaLM (arXiv 2204.02311), section 5; softcap,
        Gemma 2 (arXiv 2408.00118), section 2.
    """
    checks.check_head(hidden, weight, bias, class_weights, max_workspace_bytes)
    checks.check_rows(hidden, targets, token_weights, rows, ignore_index)
    checks.check_options(label_smoothing, z_loss, softcap, kl_weight, reduction)
    taught = hidden.shape[:-1] if rows is None else rows.shape
    checks.check_teacher(hidden, weight, bias, teacher, taught, kl_weight, softcap)
    checks.check_denominator(denominator, teacher, reduction)
    if not (kl_weight or return_stats):
        teacher = None
    options = {
        "bias": bias,
        "class_weights": class_weights,
        "ignore_index": ignore_index,
        "label_smoothing": float(label_smoothing),
        "z_loss": float(z_loss),
        "softcap": softcap if softcap is None else float(softcap),
        "kl_weight": float(kl_weight),
        "reduction": reduction,
        "logits_dtype": checks.check_logits_dtype(logits_dtype, hidden, weight),
        "max_workspace_bytes": max_workspace_bytes,
        "return_stats": return_stats,
    }
    inputs = (
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        targets.reshape(-1),
        None if token_weights is None else token_weights.reshape(-1),
        rows,
        _flatten_teacher(teacher, hidden.shape[-1]),
        denominator if isinstance(denominator, tuple | list) else (denominator, None),
    )
    check = hidden.device.type == "cpu" if check_values is None else check_values
    chosen = select_backend("linear_cross_entropy", backend, hidden.device, _unfit(hidden, weight, bias, token_weights))
    loss, stats = (_referred if chosen == "reference" else _fused)(*inputs, check, backend, options)
    if reduction == "none":
        loss = loss.reshape(targets.shape)
    if not return_stats:
        return loss
    return loss, LossStats(*(None if figure is None else figure.reshape(targets.shape) for figure in stats))


def _unfit(hidden, weight, bias, token_weights) -> dict[str, str]:
    """Backends that cannot take these arguments, with the reason."""
    unfit = {}
    if has_tangent(hidden, weight, bias, token_weights):
        return dict.fromkeys(library.BACKEND_MODULES, "it has no derivatives forward")
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        reason = "it is for a frozen head, and weight or bias requires grad (detach them, or train them by 'reference')"
        unfit = dict.fromkeys(library.BACKEND_MODULES, reason)
    elif accumulation_dtype(hidden, weight) == torch.float64:
        unfit = dict.fromkeys(("native", "triton-streaming"), "it has no float64")
    return unfit


def _fused(hidden, weight, targets, token_weights, rows, teacher, denominators, check, backend, options):
    """Through the registered operator (library.py)."""
    device, accumulate = hidden.device, accumulation_dtype(hidden, weight)
    ce_denominator, kl_denominator = (
        # full, not tensor: a number reaches a GPU with the launch, without a copy that would be waited for
        d if d is None or isinstance(d, torch.Tensor) else torch.full((), d, dtype=accumulate, device=device)
        for d in denominators
    )
    taught = [] if teacher is None else list(teacher) if isinstance(teacher, tuple) else [teacher]
    options = options | {"check_values": check, "backend": backend}
    options["needs_gradient"] = torch.is_grad_enabled() and hidden.requires_grad
    loss, _, _, *figures = torch.ops.dive_fast.linear_cross_entropy(
        hidden,
        weight.detach(),
        targets,
        token_weights,
        rows,
        teacher=[x.detach() for x in taught],
        ce_denominator=ce_denominator,
        kl_denominator=kl_denominator,
        **options,
    )
    if not options["return_stats"]:
        return loss, None
    lse, log_prob, entropy, correct, kl, counted = (figure.detach() for figure in figures)
    return loss, LossStats(lse, log_prob, entropy, correct, None if teacher is None else kl, counted)


def _referred(hidden, weight, targets, token_weights, rows, teacher, denominators, check, backend, options):
    """Through the plain PyTorch implementation, which autograd differentiates."""
    ignore_index, vocabulary, class_weights = options["ignore_index"], weight.shape[0], options["class_weights"]
    if check:
        checks.check_values(
            targets, token_weights, rows, class_weights, teacher, denominators, ignore_index, vocabulary
        )
    accumulate = accumulation_dtype(hidden, weight)
    if token_weights is None:
        token_weights = torch.ones(targets.shape, dtype=accumulate, device=hidden.device)
    token_weights = token_weights.to(accumulate)
    if rows is not None:
        listed = torch.zeros(targets.shape, dtype=torch.bool, device=hidden.device).index_fill_(0, rows, True)
        targets = targets.masked_fill(~listed, ignore_index)
        if teacher is not None:
            tensors = teacher if isinstance(teacher, tuple) else (teacher,)
            spread = (x.new_zeros(len(targets), *x.shape[1:]).index_copy(0, rows, x.detach()) for x in tensors)
            teacher = TeacherStatistics(*spread) if isinstance(teacher, tuple) else next(spread)
    if not check:
        targets, token_weights = checks.poison(targets, token_weights, ignore_index, vocabulary)
    denominator = denominators if denominators[1] is not None else denominators[0]
    return reference.linear_cross_entropy(
        hidden, weight, targets, token_weights, teacher=teacher, denominator=denominator, **options
    )


@own_precision
def teacher_statistics(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    top_k: int = TOP_TOKENS,
    max_workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
) -> TeacherStatistics:
    """A teacher's distributions in D + 2 + 2 K numbers a row, enough for the exact KL to any student of the same head.

    With q = softmax(hidden @ weight.T + bias), top its K = min(top_k, V) most probable tokens and p the student's::

        tail_mean_weight      = sum_{v not in top} q_v * weight_v                 # [..., D]
        tail_mass             = sum_{v not in top} q_v                            # [...]
        tail_negative_entropy = sum_{v not in top} q_v * (log q_v - bias_v)       # [...]
        KL(q || p) = sum_{v in top} q_v * (log q_v - log p_v)
                     + tail_negative_entropy - tail_mean_weight . h_student
                     + tail_mass * logsumexp(h_student @ weight.T + bias)

    The tail's line follows from log p_v = weight_v . h_student + bias_v - logsumexp. Alone (K = 0) it is exact as well,
    but a difference of numbers as large as logits; with the probable tokens taken out, it is as small as their tail.
    It does not hold for logits with a softcap.

    Args:
        hidden: the teacher's final hidden states [..., D].
        weight: lm_head weight [V, D]; bias: [V] or None.
        top_k: >= 0.
        max_workspace_bytes: bound on the [rows, V] buffers, but never below one row.

    Returns:
        TeacherStatistics, float32 (float64 with float64 inputs), without gradient.

    Raises:
        InputError: shapes, dtypes or devices that do not fit; a negative top_k.
    """
    checks.check_head(hidden, weight, bias, None, max_workspace_bytes)
    if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 0:
        raise checks.wrong("top_k", "an int >= 0", repr(top_k), "64 is the default")
    flat = reference.teacher_statistics(
        hidden.reshape(-1, hidden.shape[-1]), weight, bias=bias, top_k=top_k, max_workspace_bytes=max_workspace_bytes
    )
    return TeacherStatistics(*(figure.reshape(*hidden.shape[:-1], *figure.shape[1:]) for figure in flat))


def _flatten_teacher(teacher, hidden_size: int):
    if isinstance(teacher, TeacherStatistics):
        mean, mass, entropy, *top = teacher
        mean = mean.reshape(-1, hidden_size)
        top = (x.reshape(len(mean), x.shape[-1]) for x in top)
        return TeacherStatistics(mean, mass.reshape(-1), entropy.reshape(-1), *top)
    return None if teacher is None else teacher.reshape(-1, hidden_size)
