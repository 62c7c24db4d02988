"""What both Triton forms share: the feature flags, the outputs, and the loss's formulas on tiles of logits.

T rows, N rows that count, D hidden size, V vocabulary, K top tokens of a cached teacher.
"""

from contextlib import nullcontext

import torch
import triton
import triton.language as tl

from dive_fast.ops.checks import accumulation_dtype
from dive_fast.ops.linear_cross_entropy.types import RowFigures, RowInputs, TeacherStatistics

# Where a running maximum starts: finite, so that -inf - LOWEST is -inf rather than NaN.
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


def feature_flags(x: RowInputs) -> dict[str, bool]:
    """Every optional feature of the kernels, as the constexpr that compiles it in."""
    return {
        "HAS_BIAS": x.bias is not None,
        "HAS_CLASS_WEIGHTS": x.class_weights is not None,
        "HAS_SMOOTHING": x.label_smoothing > 0,
        "HAS_Z_LOSS": x.z_loss > 0,
        "HAS_SOFTCAP": x.softcap is not None,
        "HAS_ONLINE_TEACHER": x.teacher_hidden is not None,
        "HAS_CACHED_TEACHER": x.statistics is not None,
        "HAS_KL_GRADIENT": x.gradient and x.teacher is not None and x.kl_share is not None,
        "WANTS_GRADIENT": x.gradient,
        "WANTS_STATS": x.stats,
    }


def empty_figures(x: RowInputs) -> RowFigures:
    """Outputs for the kernels to fill."""
    N, _, D = x.sizes
    accumulate = accumulation_dtype(x.hidden)

    def figure(wanted):
        return x.hidden.new_empty(N, dtype=accumulate) if wanted else None

    return RowFigures(
        ce=figure(True),
        kl=figure(x.teacher is not None),
        lse=figure(x.stats),
        log_prob=figure(x.stats),
        entropy=figure(x.stats),
        correct=x.hidden.new_empty(N, dtype=torch.bool) if x.stats else None,
        gradient=x.hidden.new_empty(N, D) if x.gradient else None,
    )


def class_weight_sum(x: RowInputs) -> torch.Tensor | None:
    """sum_v c_v, 0-d; None where label smoothing does not ask for it."""
    if x.class_weights is None or not x.label_smoothing:
        return None
    return x.class_weights.to(accumulation_dtype(x.hidden)).sum()


def device_of(tensor):
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def multiprocessors(device: torch.device) -> int:
    """Blocks that run side by side, one each."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def teacher_tables(x: RowInputs) -> tuple[torch.Tensor | None, ...]:
    """(tail_mean_weight, tail_mass, tail_negative_entropy, top_indices, top_log_probs), contiguous, numbers in the
    dtype that is computed in; None without."""
    if x.statistics is None:
        return (None,) * len(TeacherStatistics._fields)
    accumulate = accumulation_dtype(x.hidden)
    return tuple((table.to(accumulate) if table.is_floating_point() else table).contiguous() for table in x.statistics)


@triton.jit
def tanh(x):
    """To a few units in the last place, in float32 and float64: Triton has none that the interpreter also runs.

    Below 0.5 Lambert's continued fraction cut at depth 7, whose next term is under 1e-15; above it one exponential,
    whose difference from 1 loses nothing there.
    """
    square = x * x
    above = x * (135135.0 + square * (17325.0 + square * (378.0 + square)))
    below = 135135.0 + square * (62370.0 + square * (3150.0 + square * 28.0))
    far = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(x)) + 1.0)
    return tl.where(tl.abs(x) < 0.5, above / below, tl.where(x < 0.0, -far, far))


@triton.jit
def finish_logits(z, bias_ptr, v, v_mask, softcap, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """Bias and softcap on raw logits z of the tokens v (one row of them, or broadcast along rows); -inf outside."""
    if HAS_BIAS:
        z += tl.load(bias_ptr + v, mask=v_mask, other=0.0).to(z.dtype)
    if HAS_SOFTCAP:
        z = softcap * tanh(z / softcap)
    return tl.where(v_mask, z, float("-inf"))


@triton.jit
def online_softmax(z, running_max, running_sum):
    """One more logit per lane, at one exponential: (maximum, sum of exp(z - maximum))."""
    small = tl.exp(-tl.abs(z - running_max))
    is_larger = z > running_max
    return (
        tl.where(is_larger, z, running_max),
        tl.where(is_larger, running_sum * small + 1.0, running_sum + small),
    )


@triton.jit
def class_weights_of(class_weights_ptr, v, v_mask, like, HAS_CLASS_WEIGHTS: tl.constexpr):
    """c_v, 1 without class weights, 0 outside the vocabulary."""
    if HAS_CLASS_WEIGHTS:
        c = tl.load(class_weights_ptr + v, mask=v_mask, other=0.0).to(like.dtype)
    else:
        c = tl.where(v_mask, 1.0, 0.0).to(like.dtype)
    return c


@triton.jit
def ce_gradient(
    p,
    is_target,
    c,
    target_scale,
    smoothing_share,
    c_sum,
    lse,
    z_loss,
    HAS_SMOOTHING: tl.constexpr,
    HAS_Z_LOSS: tl.constexpr,
):
    """d ce / dz; target_scale = (1 - label_smoothing) * c_target, smoothing_share = label_smoothing / V.

    p - 1 of the target is formed here, in the accumulation dtype, before anything rounds it.
    """
    d = target_scale * tl.where(is_target, p - 1.0, p)
    if HAS_SMOOTHING:
        d += smoothing_share * (c_sum * p - c)
    if HAS_Z_LOSS:
        d += 2.0 * z_loss * lse * p
    return d


@triton.jit
def softcap_slope(z, softcap):
    """d z / d raw logit for z = softcap * tanh(raw / softcap)."""
    t = z / softcap
    return 1.0 - t * t


@triton.jit
def times_log(p, log_ratio):
    """p * log_ratio, 0 where p is 0 and the logarithm infinite."""
    return tl.where(p > 0.0, p * log_ratio, 0.0)


@triton.jit
def row_stays(share, other_share):
    """A row counts if either share is not 0; a NaN share counts, so that it reaches the gradient."""
    return (share != 0.0) | (other_share != 0.0)
