"""The streaming form's first pass: tiles of logits, partial softmax over vocabulary splits, and their combination.

T rows, N rows that count, D hidden size, V vocabulary, K top tokens of a cached teacher, S vocabulary splits.
"""

import triton
import triton.language as tl

from dive_fast.ops.linear_cross_entropy.triton_common import (
    LOWEST,
    class_weights_of,
    finish_logits,
    times_log,
)

# Parts of a row that splits leave behind, in the order of the parts buffer [S, PARTS, N].
MAXIMUM, SUM, TARGET_LOGIT, SMOOTHING, CLASS_WEIGHT, ENTROPY, TEACHER_MAXIMUM, TEACHER_SUM, KL, TOP_MASS = (
    tl.constexpr(part) for part in range(10)
)
PARTS = tl.constexpr(10)
# What the gradient needs of a row, in the order of the softmax buffer [4, N].
ROW_MAX, LOG_SUM, TEACHER_ROW_MAX, TEACHER_LOG_SUM = (tl.constexpr(figure) for figure in range(4))


@triton.jit
def logits_tile(
    states_ptr,
    stride_t,
    stride_d,
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
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    ROUNDS_LOGITS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Finished logits [BLOCK_N, BLOCK_V] of the rows t and the tokens v."""
    d_offsets = tl.arange(0, BLOCK_D)
    state_ptrs = states_ptr + t[:, None] * stride_t
    weight_ptrs = weight_ptr + v.to(tl.int64)[None, :] * stride_wv
    z = tl.zeros([t.shape[0], v.shape[0]], tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + d_offsets
        h = tl.load(state_ptrs + d[None, :] * stride_d, mask=n_mask[:, None] & (d < D)[None, :], other=0.0)
        w = tl.load(weight_ptrs + d[:, None] * stride_wd, mask=(d < D)[:, None] & (v < V)[None, :], other=0.0)
        z = tl.dot(h, w, z, input_precision=PRECISION)
    if ROUNDS_LOGITS:
        z = z.to(states_ptr.dtype.element_ty).to(tl.float32)
    return finish_logits(z, bias_ptr, v[None, :], (v < V)[None, :], softcap, HAS_BIAS, HAS_SOFTCAP)


@triton.jit
def top_tile(
    tile_ptr,
    top_indices_ptr,
    top_log_probs_ptr,
    t,
    n_mask,
    first_v,
    K,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The cached teacher's q on the tile [BLOCK_N, BLOCK_V] of tokens from first_v; 0 on tokens that are not top.

    `tile_ptr` is this program's own tile in memory, zeros before and after: q is scattered into it, read densely, and
    taken out again, because registers cannot be addressed by an index. The barriers order the block's warps.
    """
    rows = tl.arange(0, t.shape[0])[:, None] * BLOCK_V
    k_offsets = tl.arange(0, BLOCK_K)
    for start in range(0, K, BLOCK_K):
        k = start + k_offsets
        k_mask = n_mask[:, None] & (k < K)[None, :]
        place = tl.load(top_indices_ptr + t[:, None] * K + k[None, :], mask=k_mask, other=-1) - first_v
        log_q = tl.load(top_log_probs_ptr + t[:, None] * K + k[None, :], mask=k_mask, other=0.0)
        tl.store(tile_ptr + rows + place, tl.exp(log_q), mask=k_mask & (place >= 0) & (place < BLOCK_V))
    tl.debug_barrier()
    q = tl.load(tile_ptr + rows + tl.arange(0, BLOCK_V)[None, :])
    tl.debug_barrier()
    for start in range(0, K, BLOCK_K):
        k = start + k_offsets
        k_mask = n_mask[:, None] & (k < K)[None, :]
        place = tl.load(top_indices_ptr + t[:, None] * K + k[None, :], mask=k_mask, other=-1) - first_v
        zeros = tl.zeros([t.shape[0], BLOCK_K], tl.float32)
        tl.store(tile_ptr + rows + place, zeros, mask=k_mask & (place >= 0) & (place < BLOCK_V))
    tl.debug_barrier()
    return q


@triton.jit
def linear_cross_entropy_streaming_parts_fwd_kernel(
    hidden_ptr,
    weight_ptr,
    teacher_ptr,
    rows_ptr,
    teacher_rows_ptr,
    targets_ptr,
    bias_ptr,
    class_weights_ptr,
    top_indices_ptr,
    top_log_probs_ptr,
    top_tiles_ptr,
    parts_ptr,
    best_ptr,
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
    softcap: tl.float64,
    HAS_BIAS: tl.constexpr,
    HAS_CLASS_WEIGHTS: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ONLINE_TEACHER: tl.constexpr,
    HAS_CACHED_TEACHER: tl.constexpr,
    WANTS_STATS: tl.constexpr,
    ROUNDS_LOGITS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Sums over one vocabulary split, relative to the maximum so far and rescaled when it grows.

    SMOOTHING holds sum c_v (max - z_v), ENTROPY sum e^(z - max) (z - max), and KL, for an online teacher with logits u,
    sum e^(u - teacher max) (u - z), for a cached one sum over top of q (log q - z + max): differences of close numbers
    are taken before they are weighted.
    """
    split = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    n_mask = n < N
    t = tl.load(rows_ptr + n, mask=n_mask, other=0)
    if HAS_ONLINE_TEACHER or HAS_CACHED_TEACHER:
        teacher_t = tl.load(teacher_rows_ptr + n, mask=n_mask, other=0)
    target = tl.load(targets_ptr + n, mask=n_mask, other=0)
    softcap = tl.full([], softcap, tl.float32)
    if HAS_CACHED_TEACHER:
        top_tiles_ptr += (tl.program_id(0) * tl.num_programs(1) + split).to(tl.int64) * (BLOCK_N * BLOCK_V)

    running_max = tl.full([BLOCK_N], LOWEST, tl.float32)
    running_sum = tl.zeros([BLOCK_N], tl.float32)
    target_z = tl.zeros([BLOCK_N], tl.float32)
    smoothing = tl.zeros([BLOCK_N], tl.float32)
    c_sum = tl.zeros([BLOCK_N], tl.float32)
    entropy = tl.zeros([BLOCK_N], tl.float32)
    best = tl.zeros([BLOCK_N], tl.int32)
    kl = tl.zeros([BLOCK_N], tl.float32)
    top_mass = tl.zeros([BLOCK_N], tl.float32)
    teacher_max = tl.full([BLOCK_N], LOWEST, tl.float32)
    teacher_sum = tl.zeros([BLOCK_N], tl.float32)
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
        tile_max = tl.max(z, 1)
        if WANTS_STATS:
            best = tl.where(tile_max > running_max, start + tl.argmax(z, 1), best)
        new_max = tl.maximum(running_max, tile_max)
        rescale = tl.exp(running_max - new_max)
        shifted = z - new_max[:, None]
        e = tl.exp(shifted)
        if WANTS_STATS:
            entropy = rescale * (entropy + (running_max - new_max) * running_sum)
            entropy += tl.sum(times_log(e, shifted), 1)
        running_sum = rescale * running_sum + tl.sum(e, 1)
        target_z += tl.sum(tl.where(v[None, :] == target[:, None], z, 0.0), 1)
        if HAS_SMOOTHING:
            c = class_weights_of(class_weights_ptr, v, v < V, z, HAS_CLASS_WEIGHTS)[None, :]
            smoothing += (new_max - running_max) * c_sum - tl.sum(tl.where((v < V)[None, :], c * shifted, 0.0), 1)
            c_sum += tl.sum(c, 1)
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
            new_teacher_max = tl.maximum(teacher_max, tl.max(u, 1))
            teacher_rescale = tl.exp(teacher_max - new_teacher_max)
            e = tl.exp(u - new_teacher_max[:, None])
            kl = teacher_rescale * kl + tl.sum(times_log(e, u - z), 1)
            teacher_sum = teacher_rescale * teacher_sum + tl.sum(e, 1)
            teacher_max = new_teacher_max
        if HAS_CACHED_TEACHER:
            q = top_tile(
                top_tiles_ptr, top_indices_ptr, top_log_probs_ptr, teacher_t, n_mask, start, K, BLOCK_V, BLOCK_K
            )
            kl += (new_max - running_max) * top_mass + tl.sum(times_log(q, tl.log(q) - shifted), 1)
            # Not tl.sum(q, 1). Where a loop adds up sums straight from a load, Triton (3.6 and 3.7 at least; its pull
            # request 11842 mends it) leaves the parts with the threads until the loop ends, and whatever reads the
            # accumulator before, as kl above does, finds the 0 it started from. A selection in between is left alone.
            top_mass += tl.sum(tl.where(q > 0.0, q, 0.0), 1)
        running_max = new_max

    part_ptrs = parts_ptr + split.to(tl.int64) * PARTS * N + n
    tl.store(part_ptrs + MAXIMUM * N, running_max, mask=n_mask)
    tl.store(part_ptrs + SUM * N, running_sum, mask=n_mask)
    tl.store(part_ptrs + TARGET_LOGIT * N, target_z, mask=n_mask)
    if HAS_SMOOTHING:
        tl.store(part_ptrs + SMOOTHING * N, smoothing, mask=n_mask)
        tl.store(part_ptrs + CLASS_WEIGHT * N, c_sum, mask=n_mask)
    if WANTS_STATS:
        tl.store(part_ptrs + ENTROPY * N, entropy, mask=n_mask)
        tl.store(best_ptr + split.to(tl.int64) * N + n, best, mask=n_mask)
    if HAS_ONLINE_TEACHER:
        tl.store(part_ptrs + TEACHER_MAXIMUM * N, teacher_max, mask=n_mask)
        tl.store(part_ptrs + TEACHER_SUM * N, teacher_sum, mask=n_mask)
    if HAS_ONLINE_TEACHER or HAS_CACHED_TEACHER:
        tl.store(part_ptrs + KL * N, kl, mask=n_mask)
    if HAS_CACHED_TEACHER:
        tl.store(part_ptrs + TOP_MASS * N, top_mass, mask=n_mask)


@triton.jit
def linear_cross_entropy_streaming_combine_fwd_kernel(
    parts_ptr,
    best_ptr,
    softmax_ptr,
    hidden_ptr,
    rows_ptr,
    teacher_rows_ptr,
    targets_ptr,
    class_weights_ptr,
    tail_mean_weight_ptr,
    tail_mass_ptr,
    tail_negative_entropy_ptr,
    ce_ptr,
    kl_ptr,
    lse_ptr,
    log_prob_ptr,
    entropy_ptr,
    correct_ptr,
    N,
    V,
    D,
    splits,
    stride_ht,
    stride_hd,
    label_smoothing: tl.float64,
    z_loss: tl.float64,
    HAS_CLASS_WEIGHTS: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    HAS_Z_LOSS: tl.constexpr,
    HAS_ONLINE_TEACHER: tl.constexpr,
    HAS_CACHED_TEACHER: tl.constexpr,
    WANTS_STATS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program a row: its splits' parts to figures."""
    n = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, BLOCK_S)
    s_mask = s < splits
    part_ptrs = parts_ptr + s.to(tl.int64) * PARTS * N + n
    label_smoothing = tl.full([], label_smoothing, tl.float32)
    z_loss = tl.full([], z_loss, tl.float32)

    maxima = tl.load(part_ptrs + MAXIMUM * N, mask=s_mask, other=LOWEST)
    sums = tl.load(part_ptrs + SUM * N, mask=s_mask, other=0.0)
    row_max = tl.max(maxima, 0)
    rescale = tl.exp(maxima - row_max)
    row_sum = tl.sum(rescale * sums, 0)
    log_sum = tl.log(row_sum)
    lse = row_max + log_sum
    tl.store(softmax_ptr + ROW_MAX * N + n, row_max)
    tl.store(softmax_ptr + LOG_SUM * N + n, log_sum)

    target = tl.load(targets_ptr + n)
    target_z = tl.sum(tl.load(part_ptrs + TARGET_LOGIT * N, mask=s_mask, other=0.0), 0)
    target_log_p = target_z - row_max - log_sum
    target_c = class_weights_of(class_weights_ptr, target, target < V, target_z, HAS_CLASS_WEIGHTS)
    ce = -(1.0 - label_smoothing) * target_c * target_log_p
    if HAS_SMOOTHING:
        c_sums = tl.load(part_ptrs + CLASS_WEIGHT * N, mask=s_mask, other=0.0)
        below_max = tl.load(part_ptrs + SMOOTHING * N, mask=s_mask, other=0.0) + (row_max - maxima) * c_sums
        ce += label_smoothing / V * (tl.sum(below_max, 0) + log_sum * tl.sum(c_sums, 0))
    if HAS_Z_LOSS:
        ce += z_loss * lse * lse
    tl.store(ce_ptr + n, ce)

    if WANTS_STATS:
        entropies = tl.load(part_ptrs + ENTROPY * N, mask=s_mask, other=0.0)
        entropies = rescale * (entropies + (maxima - row_max) * sums)
        tl.store(entropy_ptr + n, log_sum - tl.sum(entropies, 0) / row_sum)
        # argmax takes the first split that holds the maximum, and that split its first token.
        best = tl.load(best_ptr + tl.argmax(maxima, 0).to(tl.int64) * N + n)
        tl.store(correct_ptr + n, best == target)
        tl.store(lse_ptr + n, lse)
        tl.store(log_prob_ptr + n, target_log_p)
    if HAS_ONLINE_TEACHER:
        teacher_maxima = tl.load(part_ptrs + TEACHER_MAXIMUM * N, mask=s_mask, other=LOWEST)
        teacher_sums = tl.load(part_ptrs + TEACHER_SUM * N, mask=s_mask, other=0.0)
        teacher_max = tl.max(teacher_maxima, 0)
        teacher_rescale = tl.exp(teacher_maxima - teacher_max)
        teacher_sum = tl.sum(teacher_rescale * teacher_sums, 0)
        teacher_log_sum = tl.log(teacher_sum)
        tl.store(softmax_ptr + TEACHER_ROW_MAX * N + n, teacher_max)
        tl.store(softmax_ptr + TEACHER_LOG_SUM * N + n, teacher_log_sum)
        kls = teacher_rescale * tl.load(part_ptrs + KL * N, mask=s_mask, other=0.0)
        tl.store(kl_ptr + n, tl.sum(kls, 0) / teacher_sum + (row_max - teacher_max) + (log_sum - teacher_log_sum))
    if HAS_CACHED_TEACHER:
        t = tl.load(rows_ptr + n)
        teacher_t = tl.load(teacher_rows_ptr + n)
        top_masses = tl.load(part_ptrs + TOP_MASS * N, mask=s_mask, other=0.0)
        kls = tl.load(part_ptrs + KL * N, mask=s_mask, other=0.0) + (row_max - maxima) * top_masses
        kl = tl.sum(kls, 0) + log_sum * tl.sum(top_masses, 0)
        dot = tl.zeros([BLOCK_D], tl.float32)
        for start in range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            h = tl.load(hidden_ptr + t * stride_ht + d * stride_hd, mask=d < D, other=0.0).to(tl.float32)
            dot += h * tl.load(tail_mean_weight_ptr + teacher_t * D + d, mask=d < D, other=0.0)
        kl += tl.load(tail_negative_entropy_ptr + teacher_t) - tl.sum(dot, 0) + tl.load(tail_mass_ptr + teacher_t) * lse
        tl.store(kl_ptr + n, kl)
