"""The kernel between the two products of the row-chunked form: logits to figures and, in place, their gradient.

R rows of a chunk, D hidden size, V vocabulary, K top tokens of a cached teacher.
"""

import triton
import triton.language as tl

from dive_fast.ops.linear_cross_entropy.triton_common import (
    LOWEST,
    ce_gradient,
    class_weights_of,
    finish_logits,
    online_softmax,
    row_stays,
    softcap_slope,
    times_log,
)


@triton.jit
def linear_cross_entropy_row_fwd_kernel(
    logits_ptr,
    dlogits_ptr,
    teacher_logits_ptr,
    hidden_ptr,
    teacher_rows_ptr,
    targets_ptr,
    ce_share_ptr,
    kl_share_ptr,
    bias_ptr,
    class_weights_ptr,
    c_sum_ptr,
    tail_mean_weight_ptr,
    tail_mass_ptr,
    tail_negative_entropy_ptr,
    top_indices_ptr,
    top_log_probs_ptr,
    top_dlogits_ptr,
    ce_ptr,
    kl_ptr,
    lse_ptr,
    log_prob_ptr,
    entropy_ptr,
    correct_ptr,
    V,
    D,
    K,
    stride_logits_r,
    stride_dlogits_r,
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
    WANTS_GRADIENT: tl.constexpr,
    WANTS_STATS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program a row: the softmax's maximum and sum, then figures and dlogits term by term.

    dlogits may be narrower than the logits and then fills the front of the row's own storage. A piece of BLOCK_V logits
    is stored only after a barrier that follows its load, so when piece i is stored every warp has read pieces 0 to i,
    that is the first (i + 1) * BLOCK_V logits. The store ends at element (i + 1) * BLOCK_V of the same or a narrower
    type, hence within their bytes: no unread logit is overwritten, and no second barrier is needed.
    """
    ACCUMULATE: tl.constexpr = ce_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride_logits_r
    offsets = tl.arange(0, BLOCK_V)
    label_smoothing = tl.full([], label_smoothing, ACCUMULATE)
    z_loss = tl.full([], z_loss, ACCUMULATE)
    softcap = tl.full([], softcap, ACCUMULATE)

    target = tl.load(targets_ptr + row)
    target_z = tl.load(logits_ptr + target).to(ACCUMULATE)
    target_z = finish_logits(target_z, bias_ptr, target, target < V, softcap, HAS_BIAS, HAS_SOFTCAP)

    lane_max = tl.full([BLOCK_V], LOWEST, ACCUMULATE)
    lane_sum = tl.zeros([BLOCK_V], ACCUMULATE)
    if HAS_ONLINE_TEACHER:
        teacher_logits_ptr += row * stride_logits_r
        teacher_lane_max = tl.full([BLOCK_V], LOWEST, ACCUMULATE)
        teacher_lane_sum = tl.zeros([BLOCK_V], ACCUMULATE)
    for start in range(0, V, BLOCK_V):
        v = start + offsets
        z = tl.load(logits_ptr + v, mask=v < V, other=0.0).to(ACCUMULATE)
        z = finish_logits(z, bias_ptr, v, v < V, softcap, HAS_BIAS, HAS_SOFTCAP)
        lane_max, lane_sum = online_softmax(z, lane_max, lane_sum)
        if HAS_ONLINE_TEACHER:
            u = tl.load(teacher_logits_ptr + v, mask=v < V, other=0.0).to(ACCUMULATE)
            u = finish_logits(u, bias_ptr, v, v < V, softcap, HAS_BIAS, HAS_SOFTCAP)
            teacher_lane_max, teacher_lane_sum = online_softmax(u, teacher_lane_max, teacher_lane_sum)
    # Kept apart: z - row_max is exact for large logits, where z - lse would round to the size of z.
    row_max = tl.max(lane_max, 0)
    log_sum = tl.log(tl.sum(lane_sum * tl.exp(lane_max - row_max), 0))
    lse = row_max + log_sum
    if HAS_ONLINE_TEACHER:
        teacher_max = tl.max(teacher_lane_max, 0)
        teacher_log_sum = tl.log(tl.sum(teacher_lane_sum * tl.exp(teacher_lane_max - teacher_max), 0))

    target_c = class_weights_of(class_weights_ptr, target, target < V, target_z, HAS_CLASS_WEIGHTS)
    target_log_p = target_z - row_max - log_sum
    ce = -(1.0 - label_smoothing) * target_c * target_log_p
    if HAS_Z_LOSS:
        ce += z_loss * lse * lse
    if HAS_SMOOTHING:
        smoothing_share = label_smoothing / V
        c_sum = tl.load(c_sum_ptr) if HAS_CLASS_WEIGHTS else tl.full([], 1.0, ACCUMULATE) * V
    else:
        smoothing_share = 0.0
        c_sum = 0.0
    target_scale = (1.0 - label_smoothing) * target_c
    if WANTS_GRADIENT:
        ce_share = tl.load(ce_share_ptr + row)
        kl_share = tl.load(kl_share_ptr + row) if HAS_KL_GRADIENT else ce_share
        stays = row_stays(ce_share, kl_share)
        dlogits_ptr += row * stride_dlogits_r

    if HAS_CACHED_TEACHER:
        # The top tokens' logits are read, and their gradients kept aside, before the row is overwritten.
        t = tl.load(teacher_rows_ptr + row)
        k_offsets = tl.arange(0, BLOCK_K)
        lane_kl = tl.zeros([BLOCK_K], ACCUMULATE)
        for start in range(0, K, BLOCK_K):
            k = start + k_offsets
            v = tl.load(top_indices_ptr + t * K + k, mask=k < K, other=0)
            log_q = tl.load(top_log_probs_ptr + t * K + k, mask=k < K, other=float("-inf"))
            z = tl.load(logits_ptr + v, mask=k < K, other=0.0).to(ACCUMULATE)
            z = finish_logits(z, bias_ptr, v, k < K, softcap, HAS_BIAS, HAS_SOFTCAP)
            log_p = z - row_max - log_sum
            q = tl.exp(log_q)
            lane_kl += times_log(q, log_q - log_p)
            if HAS_KL_GRADIENT:
                p = tl.exp(log_p)
                c = class_weights_of(class_weights_ptr, v, k < K, z, HAS_CLASS_WEIGHTS)
                d = ce_gradient(
                    p, v == target, c, target_scale, smoothing_share, c_sum, lse, z_loss, HAS_SMOOTHING, HAS_Z_LOSS
                )
                d = tl.where(stays, ce_share * d + kl_share * (p - q), 0.0)
                tl.store(top_dlogits_ptr + row * K + k, d, mask=k < K)
        kl = tl.sum(lane_kl, 0)
        d_offsets = tl.arange(0, BLOCK_D)
        lane_dot = tl.zeros([BLOCK_D], ACCUMULATE)
        for start in range(0, D, BLOCK_D):
            d = start + d_offsets
            h = tl.load(hidden_ptr + row * D + d, mask=d < D, other=0.0).to(ACCUMULATE)
            lane_dot += h * tl.load(tail_mean_weight_ptr + t * D + d, mask=d < D, other=0.0)
        tail_mass = tl.load(tail_mass_ptr + t)
        kl += tl.load(tail_negative_entropy_ptr + t) - tl.sum(lane_dot, 0) + tail_mass * lse
        tl.store(kl_ptr + row, kl)

    if WANTS_GRADIENT or WANTS_STATS or HAS_SMOOTHING or HAS_ONLINE_TEACHER:
        lane_smoothing = tl.zeros([BLOCK_V], ACCUMULATE)
        lane_entropy = tl.zeros([BLOCK_V], ACCUMULATE)
        lane_kl = tl.zeros([BLOCK_V], ACCUMULATE)
        lane_beaten = tl.zeros([BLOCK_V], tl.int32)
        for start in range(0, V, BLOCK_V):
            v = start + offsets
            z = tl.load(logits_ptr + v, mask=v < V, other=0.0).to(ACCUMULATE)
            z = finish_logits(z, bias_ptr, v, v < V, softcap, HAS_BIAS, HAS_SOFTCAP)
            log_p = z - row_max - log_sum
            p = tl.exp(log_p)
            c = class_weights_of(class_weights_ptr, v, v < V, z, HAS_CLASS_WEIGHTS) if HAS_SMOOTHING else 0.0
            if HAS_SMOOTHING:
                lane_smoothing -= tl.where(v < V, c * log_p, 0.0)
            if WANTS_STATS:
                lane_entropy -= times_log(p, log_p)
                lane_beaten |= ((z > target_z) | ((z == target_z) & (v < target))).to(tl.int32)
            if HAS_ONLINE_TEACHER:
                u = tl.load(teacher_logits_ptr + v, mask=v < V, other=0.0).to(ACCUMULATE)
                u = finish_logits(u, bias_ptr, v, v < V, softcap, HAS_BIAS, HAS_SOFTCAP)
                log_q = u - teacher_max - teacher_log_sum
                q = tl.exp(log_q)
                lane_kl += times_log(q, log_q - log_p)
            if WANTS_GRADIENT:
                d = ce_share * ce_gradient(
                    p, v == target, c, target_scale, smoothing_share, c_sum, lse, z_loss, HAS_SMOOTHING, HAS_Z_LOSS
                )
                if HAS_KL_GRADIENT:
                    d += kl_share * (p - q if HAS_ONLINE_TEACHER else p)
                if HAS_SOFTCAP:
                    d *= softcap_slope(z, softcap)
                tl.debug_barrier()
                tl.store(dlogits_ptr + v, tl.where(stays, d, 0.0).to(dlogits_ptr.dtype.element_ty), mask=v < V)
        if HAS_SMOOTHING:
            ce += smoothing_share * tl.sum(lane_smoothing, 0)
        if WANTS_STATS:
            # Comparisons with NaN are false, and times_log takes its products for 0.
            tl.store(entropy_ptr + row, tl.where(lse == lse, tl.sum(lane_entropy, 0), lse))
            tl.store(correct_ptr + row, (tl.max(lane_beaten, 0) == 0) & (lse == lse))
            tl.store(lse_ptr + row, lse)
            tl.store(log_prob_ptr + row, target_log_p)
        if HAS_ONLINE_TEACHER:
            tl.store(kl_ptr + row, tl.sum(lane_kl, 0))
    tl.store(ce_ptr + row, ce)

    if HAS_CACHED_TEACHER and HAS_KL_GRADIENT:
        # Other warps stored p alone at these places.
        tl.debug_barrier()
        for start in range(0, K, BLOCK_K):
            k = start + k_offsets
            v = tl.load(top_indices_ptr + t * K + k, mask=k < K, other=0)
            d = tl.load(top_dlogits_ptr + row * K + k, mask=k < K, other=0.0)
            tl.store(dlogits_ptr + v, d.to(dlogits_ptr.dtype.element_ty), mask=k < K)
