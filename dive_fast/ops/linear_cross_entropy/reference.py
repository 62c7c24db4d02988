"""The loss in plain differentiable PyTorch, a chunk of rows at a time: the oracle, and what trains a head.

T rows, N rows that count, R rows of one chunk, D hidden size, V vocabulary, K most probable tokens.
"""

import math
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from dive_fast.ops.checks import accumulation_dtype
from dive_fast.ops.linear_cross_entropy.types import LossStats, TeacherStatistics

# [R, V] buffers alive at once, from counting live storages (a test holds them to it): log-probabilities, their gradient
# and that of the logits, plus what each option adds. Options do not all peak together, so their sum is an upper bound.
BASE_BUFFERS = 3
SMOOTHING_BUFFERS = 1
CLASS_WEIGHT_BUFFERS = 1
SOFTCAP_BUFFERS = 1
LSE_BUFFERS = 3
ONLINE_TEACHER_BUFFERS = 4
STATISTICS_BUFFERS = 3


class RowFigures(NamedTuple):
    """Per counted row: what the loss needs, then what `LossStats` needs (None when not asked for)."""

    ce: torch.Tensor
    kl: torch.Tensor | None
    lse: torch.Tensor | None
    log_prob: torch.Tensor | None
    entropy: torch.Tensor | None
    correct: torch.Tensor | None


def linear_cross_entropy(
    hidden,
    weight,
    targets,
    token_weights,
    *,
    bias,
    class_weights,
    ignore_index,
    label_smoothing,
    z_loss,
    softcap,
    teacher,
    kl_weight,
    reduction,
    denominator,
    logits_dtype,
    max_workspace_bytes,
    return_stats,
):
    """The public function after validation, on flat rows: hidden [T, D], targets [T], token_weights [T] float32/64.

    Returns:
        (loss, LossStats or None), with [T] where the public function has the shape of `targets`.
    """
    # A NaN weight (the mark of a bad row where values cannot be checked) counts, so that it reaches the loss.
    counted = (targets != ignore_index) & ~(token_weights <= 0)
    index = counted.nonzero().squeeze(1)
    row_figures = partial(
        _row_figures,
        # Cast per chunk, a trained half-precision head would also round and add up its gradient per chunk.
        weight=weight.to(logits_dtype) if weight.requires_grad else weight,
        bias=None if bias is None else bias.to(logits_dtype),
        class_weights=None if class_weights is None else class_weights.to(token_weights.dtype),
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
        kl_weight=kl_weight,
        logits_dtype=logits_dtype,
        accumulate=token_weights.dtype,
        return_stats=return_stats,
    )
    if teacher is not None and not (kl_weight or return_stats):
        teacher = None
    buffers = _buffers(teacher, class_weights, label_smoothing, z_loss, softcap, return_stats)
    limit = _rows_per_chunk(weight.shape[0], buffers, token_weights.dtype, max_workspace_bytes)
    with torch.autocast(hidden.device.type, enabled=False):
        figures = _in_chunks(row_figures, hidden, targets, teacher, index, limit)
    shares = token_weights
    if class_weights is not None:
        # Targets of rows that do not count may lie outside the vocabulary.
        shares = token_weights * class_weights.to(token_weights.dtype)[torch.where(counted, targets, 0)]
    loss = _reduce(figures, token_weights, shares, counted, index, kl_weight, reduction, denominator)
    return loss, _stats(figures, counted, index) if return_stats else None


@torch.no_grad()
def teacher_statistics(hidden, weight, *, bias, top_k, max_workspace_bytes) -> TeacherStatistics:
    """The public function after validation, on flat rows: hidden [T, D]."""
    accumulate = accumulation_dtype(hidden, weight)
    weight = weight.to(accumulate)
    # A token that a bias of -inf takes out has q = 0 and adds nothing to E_q[bias].
    finite_bias = None if bias is None else bias.to(accumulate).masked_fill(bias == -math.inf, 0.0)
    limit = _rows_per_chunk(weight.shape[0], STATISTICS_BUFFERS, accumulate, max_workspace_bytes)
    with torch.autocast(hidden.device.type, enabled=False):
        # A chunk's buffers end with the call, before the next chunk's begin.
        parts = [_chunk_statistics(rows, weight, bias, finite_bias, accumulate, top_k) for rows in hidden.split(limit)]
    return TeacherStatistics(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _chunk_statistics(hidden, weight, bias, finite_bias, accumulate, top_k) -> TeacherStatistics:
    log_q = F.log_softmax(_logits(hidden, weight, bias, None, accumulate, accumulate), dim=-1)
    top = log_q.topk(min(top_k, weight.shape[0]), dim=-1)
    q = log_q.exp().scatter_(1, top.indices, 0.0)
    constant = log_q.masked_fill_(q == 0, 0.0).mul_(q).sum(-1)
    if bias is not None:
        constant = constant - q @ finite_bias
    return TeacherStatistics(q @ weight, q.sum(-1), constant, top.indices.to(torch.int32), top.values)


def _buffers(teacher, class_weights, label_smoothing, z_loss, softcap, return_stats) -> int:
    needs_lse = bool(z_loss) or return_stats or isinstance(teacher, TeacherStatistics)
    return (
        BASE_BUFFERS
        + SMOOTHING_BUFFERS * bool(label_smoothing)
        + CLASS_WEIGHT_BUFFERS * bool(label_smoothing and class_weights is not None)
        + SOFTCAP_BUFFERS * (softcap is not None)
        + LSE_BUFFERS * needs_lse
        + ONLINE_TEACHER_BUFFERS * isinstance(teacher, torch.Tensor)
    )


def _rows_per_chunk(vocabulary, buffers, accumulate, max_workspace_bytes) -> int:
    return max(1, max_workspace_bytes // (buffers * vocabulary * accumulate.itemsize))


def _in_chunks(row_figures, hidden, targets, teacher, index, limit) -> RowFigures:
    """`row_figures` over the rows in `index`, at most `limit` at a time, concatenated."""
    columns = [hidden.index_select(0, index), targets.index_select(0, index)]
    if isinstance(teacher, TeacherStatistics):
        columns += [figure.detach().index_select(0, index) for figure in teacher]
    elif teacher is not None:
        columns.append(teacher.detach().index_select(0, index))
    # Even chunks: a short last one would read the head for few rows.
    chunks = max(1, math.ceil(len(index) / limit))
    parts = list(zip(*(column.split(max(1, math.ceil(len(index) / chunks))) for column in columns), strict=True))
    if chunks == 1 or not torch.is_grad_enabled():
        results = [row_figures(*part) for part in parts]
    else:
        results = [checkpoint(row_figures, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
    return RowFigures(*(None if column[0] is None else torch.cat(column) for column in zip(*results, strict=True)))


def _row_figures(
    hidden,
    targets,
    *teacher,
    weight,
    bias,
    class_weights,
    label_smoothing,
    z_loss,
    softcap,
    kl_weight,
    logits_dtype,
    accumulate,
    return_stats,
) -> RowFigures:
    """One chunk: hidden [R, D], targets [R]; `teacher` is (), (hidden [R, D],) or TeacherStatistics' tensors."""
    logits = _logits(hidden, weight, bias, softcap, logits_dtype, accumulate)
    log_probs = F.log_softmax(logits, dim=-1)
    nll = F.nll_loss(log_probs, targets, reduction="none")
    lse = torch.logsumexp(logits, dim=-1) if z_loss or return_stats or len(teacher) > 1 else None
    ce = nll if class_weights is None else class_weights[targets] * nll
    if label_smoothing:
        over_classes = log_probs if class_weights is None else log_probs * class_weights
        ce = (1 - label_smoothing) * ce - label_smoothing * over_classes.mean(-1)
    if z_loss:
        ce = ce + z_loss * lse.square()
    kl = None
    with torch.set_grad_enabled(torch.is_grad_enabled() and kl_weight > 0):
        if len(teacher) == 1:
            with torch.no_grad():
                log_q = F.log_softmax(_logits(teacher[0], weight, bias, softcap, logits_dtype, accumulate), dim=-1)
                q = log_q.exp()
            # Tokens that a bias of -inf takes out of both distributions would give 0 * (inf - inf).
            kl = (q * (log_q - log_probs).masked_fill(q == 0, 0.0)).sum(-1)
        elif teacher:
            kl = _cached_divergence(TeacherStatistics(*teacher), hidden, logits, lse)
    if not return_stats:
        return RowFigures(ce, kl, None, None, None, None)
    with torch.no_grad():
        entropy = torch.special.entr(log_probs.exp()).sum(-1)
        return RowFigures(ce, kl, lse.detach(), -nll.detach(), entropy, logits.argmax(-1) == targets)


def _cached_divergence(teacher, hidden, logits, lse) -> torch.Tensor:
    """KL(teacher || student) [R]: term by term over the teacher's top tokens, by its sums over the tail."""
    teacher = TeacherStatistics(*(x if x.dtype == torch.int32 else x.to(logits.dtype) for x in teacher))
    log_p = logits.gather(1, teacher.top_indices.long()) - lse.unsqueeze(1)
    log_q = teacher.top_log_probs
    # Tokens that a bias of -inf takes out of both distributions would give 0 * (inf - inf).
    top = (log_q.exp() * (log_q - log_p).masked_fill(log_q == -math.inf, 0.0)).sum(-1)
    tail = teacher.tail_negative_entropy - (teacher.tail_mean_weight * hidden.to(logits.dtype)).sum(-1)
    return top + tail + teacher.tail_mass * lse


def _logits(hidden, weight, bias, softcap, logits_dtype, accumulate) -> torch.Tensor:
    """[R, V] in `accumulate`, the product in `logits_dtype`."""
    bias = None if bias is None else bias.to(logits_dtype)
    logits = F.linear(hidden.to(logits_dtype), weight.to(logits_dtype), bias).to(accumulate)
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _reduce(figures, token_weights, shares, counted, index, kl_weight, reduction, denominator) -> torch.Tensor:
    """`shares` [T]: the token weights times their targets' class weights, whose sum divides a mean."""
    weighted = token_weights.index_select(0, index) * figures.ce
    if reduction == "mean":
        is_pair = isinstance(denominator, tuple | list)
        ce_denominator, kl_denominator = denominator if is_pair else (denominator, None)
        if ce_denominator is None:
            ce_denominator = shares.masked_fill(~counted, 0.0).sum()
        loss = _mean(weighted, counted, index, ce_denominator)
        if kl_weight:
            kl_denominator = len(index) if kl_denominator is None else kl_denominator
            loss = loss + kl_weight * _mean(figures.kl, counted, index, kl_denominator)
        return loss
    rows = weighted + kl_weight * figures.kl if kl_weight else weighted
    return _spread(rows, counted, index) if reduction == "none" else _sum(rows, counted, index)


def _mean(rows, counted, index, denominator) -> torch.Tensor:
    """sum(rows) / denominator; 0 when there are no rows, whatever the denominator."""
    if len(index) == 0:
        denominator = 1
    elif isinstance(denominator, torch.Tensor):
        denominator = denominator.to(rows)
    return _sum(rows, counted, index) / denominator


def _sum(rows, counted, index) -> torch.Tensor:
    """The sum of the rows, added in the order of `torch.nn.functional.cross_entropy`: equal rows give equal bits."""
    scores = -_spread(rows, counted, index).unsqueeze(1)
    return F.nll_loss(scores, torch.where(counted, 0, -100), reduction="sum", ignore_index=-100)


def _spread(rows, counted, index) -> torch.Tensor:
    """[N] to [T], 0 (False) on rows that do not count."""
    return torch.zeros(counted.shape, dtype=rows.dtype, device=rows.device).index_copy(0, index, rows)


def _stats(figures, counted, index) -> LossStats:
    kl = None if figures.kl is None else _spread(figures.kl.detach(), counted, index)
    spread = [_spread(figure, counted, index) for figure in (figures.lse, figures.log_prob, figures.entropy)]
    return LossStats(*spread, _spread(figures.correct, counted, index), kl, counted)
