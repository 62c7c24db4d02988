"""The fused loss as a torch operator: which rows count, how they are reduced, and the backward pass.

Backends compute per-row figures and gradients (`RowFigures`); everything here is small, but for one pass over the
gradient. T rows, N rows that are computed, D hidden size, V vocabulary.
"""

import importlib
import math

import torch

from dive_fast.ops.backend import select_backend
from dive_fast.ops.checks import accumulation_dtype
from dive_fast.ops.linear_cross_entropy import checks
from dive_fast.ops.linear_cross_entropy.types import RowFigures, RowInputs, TeacherStatistics

BACKEND_MODULES = {
    "native": "dive_fast.ops.linear_cross_entropy.native",
    "triton": "dive_fast.ops.linear_cross_entropy.triton",
    "triton-streaming": "dive_fast.ops.linear_cross_entropy.triton_streaming",
}

LIBRARY = torch.library.Library("dive_fast", "FRAGMENT")
LIBRARY.define(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor targets, Tensor? token_weights, Tensor? rows, "
    "Tensor? bias, Tensor? class_weights, Tensor[] teacher, Tensor? ce_denominator, Tensor? kl_denominator, "
    "int ignore_index, float label_smoothing, float z_loss, float? softcap, float kl_weight, str reduction, "
    "ScalarType logits_dtype, int max_workspace_bytes, bool check_values, bool needs_gradient, bool return_stats, "
    "str? backend) -> (Tensor loss, Tensor gradient, Tensor row_scale, Tensor lse, Tensor log_prob, Tensor entropy, "
    "Tensor correct, Tensor kl, Tensor counted)"
)
LIBRARY.define(
    "linear_cross_entropy_backward(Tensor gradient, Tensor row_scale, Tensor upstream, Tensor? rows, int all_rows) "
    "-> Tensor"
)


def linear_cross_entropy(
    hidden,
    weight,
    targets,
    token_weights,
    rows,
    bias,
    class_weights,
    teacher,
    ce_denominator,
    kl_denominator,
    ignore_index,
    label_smoothing,
    z_loss,
    softcap,
    kl_weight,
    reduction,
    logits_dtype,
    max_workspace_bytes,
    check_values,
    needs_gradient,
    return_stats,
    backend,
):
    """The operator: hidden [T, D], targets [T]. `teacher` is [], [hidden] or the tensors of TeacherStatistics, with one
    row per entry of `rows`, or per row of hidden without them.

    Returns:
        loss: 0-d, or [T] for reduction "none".
        gradient, row_scale: [N, D] and [N]; hidden's gradient in row n is row_scale[n] * upstream * gradient[n].
            N is the length of `rows`, or T without it; without needs_gradient both are empty.
        lse, log_prob, entropy, correct, kl, counted: [T]; empty without return_stats (kl also without a teacher).
    """
    accumulate = accumulation_dtype(hidden, weight)
    taught = _teacher(teacher)
    denominators = (ce_denominator, kl_denominator)
    if check_values:
        vocabulary = weight.shape[0]
        checks.check_values(targets, token_weights, rows, class_weights, taught, denominators, ignore_index, vocabulary)
    else:
        weights = torch.ones_like(targets, dtype=accumulate) if token_weights is None else token_weights.to(accumulate)
        targets, token_weights = checks.poison(targets, weights, ignore_index, weight.shape[0])
        if class_weights is not None:
            class_weights = class_weights.masked_fill(checks.bad_weights(class_weights), math.nan)
    index = rows
    if index is None:
        index = _counted(targets, token_weights, ignore_index).nonzero().squeeze(1)
    row_targets = targets.index_select(0, index)
    row_weights = _row_weights(token_weights, index, accumulate)
    counted = _counted(row_targets, row_weights, ignore_index)
    row_targets = row_targets.masked_fill(~counted, 0)
    row_weights = row_weights.masked_fill(~counted, 0.0)

    averaged = reduction == "mean"
    ce_divisor, kl_divisor = _divisors(row_targets, row_weights, counted, class_weights, denominators)
    sizes = (
        None if class_weights is None else _sizes(row_targets, class_weights.to(accumulate), label_smoothing, z_loss)
    )
    row_scale, ce_share, kl_share = _shares(row_weights, counted, kl_weight, averaged, ce_divisor, kl_divisor, sizes)
    if taught is not None and kl_share is None:
        kl_share = torch.zeros_like(ce_share)  # its divergence is asked for, not its gradient
    name = _choose_backend(backend, hidden, len(index), max_workspace_bytes, weight.shape[0])
    states, head = hidden, weight
    if name != "native" and hidden.dtype != weight.dtype:
        wider = torch.promote_types(hidden.dtype, weight.dtype)
        states, head = hidden.to(wider), weight.to(wider)
        logits_dtype = torch.promote_types(logits_dtype, wider)  # logits leave room for their gradients
    states, head = (_unit_inner_stride(x) for x in (states, head))
    with torch.autocast(hidden.device.type, enabled=False):
        figures = importlib.import_module(BACKEND_MODULES[name]).row_figures(
            RowInputs(
                states,
                head,
                row_targets,
                index,
                ce_share,
                kl_share,
                teacher_rows=_teacher_rows(taught, rows, index),
                teacher=_unit_inner_stride(taught.to(states.dtype)) if isinstance(taught, torch.Tensor) else taught,
                bias=bias,
                class_weights=class_weights,
                label_smoothing=label_smoothing,
                z_loss=z_loss,
                softcap=softcap,
                logits_dtype=logits_dtype,
                max_workspace_bytes=max_workspace_bytes,
                gradient=needs_gradient,
                stats=return_stats,
            )
        )
    loss = _reduce(figures, row_weights, counted, kl_weight, reduction, ce_divisor, kl_divisor)
    if reduction == "none":
        loss = _spread(loss, index, len(targets))
    gradient, row_scale = _saved(figures.gradient, row_scale, index, rows, hidden, needs_gradient)
    return (loss, gradient, row_scale, *_stats(figures, counted, index, len(targets), return_stats, accumulate))


def _unit_inner_stride(matrix: torch.Tensor) -> torch.Tensor:
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] == 1 else matrix.contiguous()


def _teacher(tensors):
    if len(tensors) > 1:
        return TeacherStatistics(*tensors)
    return tensors[0] if tensors else None


def _teacher_rows(taught, rows, index) -> torch.Tensor | None:
    """Which of the teacher's rows belongs to each computed row: it has one per listed row, or one per row of hidden."""
    if taught is None or rows is None:
        return None if taught is None else index
    return torch.arange(len(index), device=index.device)


def _counted(targets, token_weights, ignore_index) -> torch.Tensor:
    """Rows with a label and a weight; a NaN weight (the mark of a bad row) counts, so that it reaches the loss."""
    counted = targets != ignore_index
    return counted if token_weights is None else counted & ~(token_weights <= 0)


def _row_weights(token_weights, index, accumulate) -> torch.Tensor:
    if token_weights is None:
        return torch.ones(index.shape, dtype=accumulate, device=index.device)
    return token_weights.index_select(0, index).to(accumulate)


def _divisors(targets, weights, counted, class_weights, denominators):
    """What the two means are divided by, 0-d: as given, or sum(w * class weight) and the number of rows."""
    ce_divisor, kl_divisor = denominators
    if ce_divisor is None:
        shares = weights if class_weights is None else weights * class_weights.to(weights.dtype)[targets]
        ce_divisor = shares.sum()
    if kl_divisor is None:
        kl_divisor = counted.sum()
    return ce_divisor.to(weights), kl_divisor.to(weights)


def _sizes(targets, class_weights, label_smoothing, z_loss) -> torch.Tensor:
    """[N]: how large a row's cross-entropy is beside one without class weights."""
    sizes = (1 - label_smoothing) * class_weights[targets] + label_smoothing * class_weights.mean() + z_loss
    return sizes.masked_fill(sizes == 0, 1.0)


def _shares(weights, counted, kl_weight, averaged, ce_divisor, kl_divisor, sizes=None):
    """(row_scale, ce_share, kl_share), [N] each: how a row's two losses enter its gradient.

    The row's loss is proportional to w * ce + kappa * kl. The backend computes that combination divided by
    w * size + kappa, which keeps its terms near 1, where half precision has its digits; the rest is row_scale, applied
    in the backward.
    """
    divisor = ce_divisor if averaged else 1.0
    sized = weights if sizes is None else weights * sizes
    if not kl_weight:
        share = counted.to(weights.dtype) if sizes is None else (1 / sizes).masked_fill(~counted, 0.0)
        return (sized / divisor).masked_fill(~counted, 0.0), share, None
    kappa = kl_weight * ce_divisor / kl_divisor if averaged else torch.full_like(ce_divisor, kl_weight)
    total = sized + kappa
    scale = (total / divisor).masked_fill(~counted, 0.0)
    return scale, (weights / total).masked_fill(~counted, 0.0), (kappa / total).masked_fill(~counted, 0.0)


# An H100 multiplies 266 times in the time it reads one bfloat16 weight (798 TFLOP/s over 3.0 TB/s). With R rows a chunk
# the two products wait for the head's weights 266 / R times as long as they compute; the streaming form computes three
# products instead of two, so that it wins where R is below about 128, unless all rows fit in one chunk.
LEAST_CHUNK_ROWS = 128


def _choose_backend(requested, hidden, rows, max_workspace_bytes, vocabulary) -> str:
    name = select_backend("linear_cross_entropy", requested, hidden.device)
    affordable = max_workspace_bytes // (4 * vocabulary)
    if requested is None and name == "triton" and affordable < min(rows, LEAST_CHUNK_ROWS):
        return "triton" if hidden.dtype == torch.float64 else "triton-streaming"
    return name


def _reduce(figures: RowFigures, weights, counted, kl_weight, reduction, ce_divisor, kl_divisor) -> torch.Tensor:
    ce = (weights * figures.ce).masked_fill(~counted, 0.0)
    kl = figures.kl.masked_fill(~counted, 0.0) if kl_weight else None
    if reduction == "mean":
        none = ~counted.any()  # without a row the loss is 0, whatever the divisor
        loss = (ce.sum() / ce_divisor).masked_fill(none, 0.0)
        return loss if kl is None else loss + (kl_weight * kl.sum() / kl_divisor).masked_fill(none, 0.0)
    loss = ce if kl is None else ce + kl_weight * kl
    return loss if reduction == "none" else loss.sum()


def _saved(gradient, row_scale, index, rows, hidden, needs_gradient):
    """What the backward pass needs, in the order of `rows`, or over all rows where the operator found them itself."""
    if not needs_gradient:
        return hidden.new_empty(0, hidden.shape[1]), row_scale.new_empty(0)
    if rows is not None:
        return gradient.to(hidden.dtype), row_scale
    everywhere = hidden.new_zeros(hidden.shape).index_copy_(0, index, gradient.to(hidden.dtype))
    return everywhere, _spread(row_scale, index, len(hidden))


def _spread(values, index, all_rows) -> torch.Tensor:
    """[N] to [T], 0 (False) on rows that are not in `index`."""
    return values.new_zeros(all_rows).index_copy_(0, index, values)


def _stats(figures: RowFigures, counted, index, all_rows, return_stats, accumulate) -> list[torch.Tensor]:
    columns = (figures.lse, figures.log_prob, figures.entropy, figures.correct, figures.kl, counted)
    kinds = (accumulate, accumulate, accumulate, torch.bool, accumulate, torch.bool)
    if not return_stats:
        return [counted.new_empty(0, dtype=kind) for kind in kinds]
    return [
        counted.new_empty(0, dtype=kind)
        if column is None
        else _spread(column.to(kind).masked_fill(~counted, 0), index, all_rows)
        for column, kind in zip(columns, kinds, strict=True)
    ]


def fake_linear_cross_entropy(hidden, weight, targets, token_weights, rows, bias, class_weights, teacher, *options):
    """Shapes and dtypes of the operator's results."""
    reduction, needs_gradient, return_stats = options[7], options[11], options[12]
    accumulate = accumulation_dtype(hidden, weight)
    computed = hidden.shape[0] if rows is None else rows.shape[0]
    saved = computed if needs_gradient else 0
    loss = hidden.new_empty(targets.shape if reduction == "none" else (), dtype=accumulate)
    figures = [
        hidden.new_empty(targets.shape if return_stats and present else (0,), dtype=kind)
        for kind, present in (
            (accumulate, True),
            (accumulate, True),
            (accumulate, True),
            (torch.bool, True),
            (accumulate, bool(teacher)),
            (torch.bool, True),
        )
    ]
    return loss, hidden.new_empty(saved, hidden.shape[1]), hidden.new_empty(saved, dtype=accumulate), *figures


def linear_cross_entropy_backward(gradient, row_scale, upstream, rows, all_rows):
    """hidden's gradient [T, D]; upstream is 0-d or [T]."""
    if upstream.dim() and rows is not None:
        upstream = upstream.index_select(0, rows)
    scale = row_scale * upstream
    if gradient.device.type == "cuda":
        from dive_fast.ops.linear_cross_entropy import triton

        inverse = torch.arange(all_rows, dtype=torch.int32, device=gradient.device)
        if rows is not None:
            inverse = torch.full_like(inverse, -1).index_copy_(0, rows, inverse[: len(rows)])
        return triton.scatter_scaled_rows(gradient, scale, inverse)
    scaled = (gradient * scale.unsqueeze(1)).to(gradient.dtype)
    if rows is None:
        return scaled
    return gradient.new_zeros(all_rows, gradient.shape[1]).index_copy_(0, rows, scaled)


def fake_linear_cross_entropy_backward(gradient, row_scale, upstream, rows, all_rows):
    """Shape and dtype of hidden's gradient."""
    return gradient.new_empty(all_rows, gradient.shape[1])


def _setup_context(ctx, inputs, output):
    hidden, rows, needs_gradient = inputs[0], inputs[4], inputs[-3]
    ctx.all_rows, ctx.has_rows, ctx.has_gradient = hidden.shape[0], rows is not None, needs_gradient
    # One entry per input, a list for a list of tensors.
    ctx.no_gradients = [[None] * len(x) if isinstance(x, list | tuple) else None for x in inputs]
    ctx.save_for_backward(output[1], output[2], *([rows] if ctx.has_rows else []))
    ctx.set_materialize_grads(False)


def _backward(ctx, upstream, *_):
    gradients = list(ctx.no_gradients)
    if upstream is not None:
        if not ctx.has_gradient:
            raise RuntimeError("linear_cross_entropy was called with needs_gradient=False: it has no backward pass")
        gradient, row_scale, *rows = ctx.saved_tensors
        gradients[0] = torch.ops.dive_fast.linear_cross_entropy_backward(
            gradient, row_scale, upstream, rows[0] if ctx.has_rows else None, ctx.all_rows
        )
    return tuple(gradients)


def _no_second_backward(ctx, *_):
    raise RuntimeError(
        "linear_cross_entropy: its backward pass has no derivative; backend='reference' has derivatives of every order"
    )


LIBRARY.impl("linear_cross_entropy", linear_cross_entropy, "CompositeExplicitAutograd")
LIBRARY.impl("linear_cross_entropy_backward", linear_cross_entropy_backward, "CompositeExplicitAutograd")
torch.library.register_fake("dive_fast::linear_cross_entropy", fake_linear_cross_entropy, lib=LIBRARY)
torch.library.register_fake("dive_fast::linear_cross_entropy_backward", fake_linear_cross_entropy_backward, lib=LIBRARY)
torch.library.register_autograd("dive_fast::linear_cross_entropy", _backward, setup_context=_setup_context, lib=LIBRARY)
torch.library.register_autograd("dive_fast::linear_cross_entropy_backward", _no_second_backward, lib=LIBRARY)
