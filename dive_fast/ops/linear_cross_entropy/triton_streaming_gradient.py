"""The streaming form's second pass: logits again, dlogits, and their product with the head.

T rows, N rows that count, D hidden size, V vocabulary, K top tokens of a cached teacher, S vocabulary splits.
"""

import triton
import triton.language as tl

from dive_fast.ops.linear_cross_entropy.triton_common import ce_gradient, class_weights_of, row_stays, softcap_slope
from dive_fast.ops.linear_cross_entropy.triton_streaming_softmax import (
    LOG_SUM,
    ROW_MAX,
    TEACHER_LOG_SUM,
    TEACHER_ROW_MAX,
    logits_tile,
    top_tile,
)


@triton.jit
def linear_cross_entropy_streaming_gradient_fwd_kernel(
    hidden_ptr,
    weight_ptr,
    teacher_ptr,
    rows_ptr,
    teacher_rows_ptr,
    targets_ptr,
    ce_share_ptr,
    kl_share_ptr,
    bias_ptr,
    class_weights_ptr,
    c_sum_ptr,
    top_indices_ptr,
    top_log_probs_ptr,
    top_tiles_ptr,
    softmax_ptr,
    gradient_parts_ptr,
    N,
    V,
    D,
    K,
    tiles_per_split,
    stride_ht,
    stride_hd,
    stride_wv,
    stride_wd,
    stride_teacher_t,
    stride_teacher_d,
    label_smoothing: tl.float64,
    z_loss: tl.float64,
    softcap: tl.float64,
    HAS_BIAS: tl.constexpr,
    HAS_CLASS_WEIGHTS: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    HAS_Z_LOSS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ONLINE_TEACHER: tl.constexpr,
    HAS_CACHED_TEACHER: tl.constexpr,
    HAS_KL_GRADIENT: tl.constexpr,
    ROUNDS_LOGITS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Logits again, dlogits, and their product with the head, added up in this program's own [N, D] part."""
    split = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    n_mask = n < N
    t = tl.load(rows_ptr + n, mask=n_mask, other=0)
    if HAS_ONLINE_TEACHER or HAS_CACHED_TEACHER:
        teacher_t = tl.load(teacher_rows_ptr + n, mask=n_mask, other=0)
    target = tl.load(targets_ptr + n, mask=n_mask, other=0)
    ce_share = tl.load(ce_share_ptr + n, mask=n_mask, other=0.0)
    kl_share = tl.load(kl_share_ptr + n, mask=n_mask, other=0.0) if HAS_KL_GRADIENT else ce_share
    stays = row_stays(ce_share, kl_share)
    row_max = tl.load(softmax_ptr + ROW_MAX * N + n, mask=n_mask, other=0.0)
    log_sum = tl.load(softmax_ptr + LOG_SUM * N + n, mask=n_mask, other=0.0)
    if HAS_ONLINE_TEACHER and HAS_KL_GRADIENT:
        teacher_max = tl.load(softmax_ptr + TEACHER_ROW_MAX * N + n, mask=n_mask, other=0.0)
        teacher_log_sum = tl.load(softmax_ptr + TEACHER_LOG_SUM * N + n, mask=n_mask, other=0.0)
    lse = row_max + log_sum
    label_smoothing = tl.full([], label_smoothing, tl.float32)
    z_loss = tl.full([], z_loss, tl.float32)
    softcap = tl.full([], softcap, tl.float32)
    target_scale = class_weights_of(class_weights_ptr, target, target < V, row_max, HAS_CLASS_WEIGHTS)
    target_scale = (1.0 - label_smoothing) * target_scale
    if HAS_SMOOTHING:
        smoothing_share = label_smoothing / V
        c_sum = tl.load(c_sum_ptr) if HAS_CLASS_WEIGHTS else tl.full([], 1.0, tl.float32) * V
    else:
        smoothing_share = 0.0
        c_sum = 0.0
    if HAS_CACHED_TEACHER:
        top_tiles_ptr += (tl.program_id(0) * tl.num_programs(1) + split).to(tl.int64) * (BLOCK_N * BLOCK_V)
    gradient_ptrs = gradient_parts_ptr + (split.to(tl.int64) * N + n[:, None]) * D
    d_offsets = tl.arange(0, BLOCK_D)

    first_v = split * tiles_per_split * BLOCK_V
    for start in range(first_v, min(V, first_v + tiles_per_split * BLOCK_V), BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        z = logits_tile(
            hidden_ptr,
            stride_ht,
            stride_hd,
            weight_ptr,
            stride_wv,
            stride_wd,
            bias_ptr,
            t,
            n_mask,
            v,
            V,
            D,
            softcap,
            HAS_BIAS,
            HAS_SOFTCAP,
            ROUNDS_LOGITS,
            PRECISION,
            BLOCK_D,
        )
        p = tl.exp(z - row_max[:, None] - log_sum[:, None])
        c = class_weights_of(class_weights_ptr, v, v < V, z, HAS_CLASS_WEIGHTS)[None, :] if HAS_SMOOTHING else 0.0
        d = ce_share[:, None] * ce_gradient(
            p,
            v[None, :] == target[:, None],
            c,
            target_scale[:, None],
            smoothing_share,
            c_sum,
            lse[:, None],
            z_loss,
            HAS_SMOOTHING,
            HAS_Z_LOSS,
        )
        if HAS_KL_GRADIENT:
            if HAS_ONLINE_TEACHER:
                u = logits_tile(
                    teacher_ptr,
                    stride_teacher_t,
                    stride_teacher_d,
                    weight_ptr,
                    stride_wv,
                    stride_wd,
                    bias_ptr,
                    teacher_t,
                    n_mask,
                    v,
                    V,
                    D,
                    softcap,
                    HAS_BIAS,
                    HAS_SOFTCAP,
                    ROUNDS_LOGITS,
                    PRECISION,
                    BLOCK_D,
                )
                q = tl.exp(u - teacher_max[:, None] - teacher_log_sum[:, None])
            else:
                q = top_tile(
                    top_tiles_ptr, top_indices_ptr, top_log_probs_ptr, teacher_t, n_mask, start, K, BLOCK_V, BLOCK_K
                )
            d += kl_share[:, None] * (p - q)
        if HAS_SOFTCAP:
            d *= softcap_slope(z, softcap)
        # Beyond the vocabulary the head's rows are loaded as 0, but the softcap's slope there is not a number.
        d = tl.where((v < V)[None, :] & stays[:, None], d, 0.0)
        d = d.to(weight_ptr.dtype.element_ty)
        weight_ptrs = weight_ptr + v.to(tl.int64)[:, None] * stride_wv
        # A tensor: what comes of comparing the loop's own number is no mask to the interpreter of Triton 3.9.
        follows = tl.zeros([1, 1], tl.int32) + start > first_v
        for d_start in range(0, D, BLOCK_D):
            column = d_start + d_offsets
            w = tl.load(
                weight_ptrs + column[None, :] * stride_wd, mask=(v < V)[:, None] & (column < D)[None, :], other=0.0
            )
            mask = n_mask[:, None] & (column < D)[None, :]
            # The first tile finds nothing to add to: the buffer is not initialised.
            before = tl.load(gradient_ptrs + column[None, :], mask=mask & follows, other=0.0)
            tl.store(gradient_ptrs + column[None, :], tl.dot(d, w, before, input_precision=PRECISION), mask=mask)
        # The next tile's loads may fall to other threads than these stores.
        tl.debug_barrier()
