// The row passes of linear_cross_entropy between its two matrix products: softmax sums and the logits' gradient. For
// its kernel file only. Logits lie as [v][kPanel], a vector running along rows of hidden states; R rows of a chunk.
#pragma once

#include "cpu/gemm_tile.h"
#include "cpu/linear_cross_entropy_kernel.h"

namespace dive::cpu::DIVE_ISA {

// Below every finite logit that is not on its way to overflow; finite, so that -inf - kLowest is no NaN.
inline constexpr float kLowest = -3e38f;

// tanh within 2 units in the last place: Cephes' polynomial for small arguments, where the exponential would cancel.
inline vf tanh(vf x) {
  const vf magnitude = max(x, -x);
  const vf square = x * x;
  vf p = splat(-5.70498872745e-3f);
  p = p * square + splat(2.06390887954e-2f);
  p = p * square + splat(-5.37397155531e-2f);
  p = p * square + splat(1.33314422036e-1f);
  p = p * square + splat(-3.33332819422e-1f);
  const vf large = splat(1.0f) - splat(2.0f) / (exp(magnitude + magnitude) + splat(1.0f));
  return select(magnitude < splat(0.625f), p * square * x + x, select(x < splat(0.0f), -large, large));
}

// Adds the bias and applies the softcap to a panel's logits [count][kPanel].
inline void finish_logits(const LinearCrossEntropy& problem, std::int64_t first, std::int64_t count, float* logits) {
  if (problem.bias != nullptr) {
    for (std::int64_t v = 0; v < count; ++v) {
      const vf bias = splat(problem.bias[first + v]);
      for (int half = 0; half < kPanel; half += kLanes) {
        float* z = logits + v * kPanel + half;
        store(z, load(z) + bias);
      }
    }
  }
  if (problem.softcap != 0) {
    const vf cap = splat(static_cast<float>(problem.softcap));
    for (std::int64_t i = 0; i < count * kPanel; i += kLanes) store(logits + i, cap * tanh(load(logits + i) / cap));
  }
}

// The largest logit of each lane and `before`; with kBest also its first token.
template <bool kBest>
inline vf max_of(const float* logits, std::int64_t first, std::int64_t count, vf before, std::int32_t* best) {
  vf largest = before;
  vi token;
  if (kBest) std::memcpy(&token, best, sizeof token);
  for (std::int64_t v = 0; v < count; ++v) {
    const vf z = load(logits + v * kPanel);
    if (kBest) token = z > largest ? splat(static_cast<std::int32_t>(first + v)) : token;
    largest = max(z, largest);
  }
  if (kBest) std::memcpy(best, &token, sizeof token);
  return largest;
}

// Lane by lane the sum of term(0) ... term(count - 1), in two levels: an error grows with the longer one.
template <class Term>
[[gnu::always_inline]] inline vf sum_of(std::int64_t count, Term term) {
  vf total{};
  for (std::int64_t v = 0; v < count; v += 16) {
    vf part{};
    const std::int64_t end = v + 16 < count ? v + 16 : count;
    for (std::int64_t i = v; i < end; ++i) part += term(i);
    total += part;
  }
  return total;
}

// Adds a block to the sums of kLanes rows; `z` and `teacher` point to the first of [count][kPanel].
inline void sum_lanes(const LinearCrossEntropy& problem, const RowSums& sums, int row, std::int64_t first,
                      std::int64_t count, const float* z, const float* teacher) {
  const vf old_max = load(sums.max + row);
  const bool wants_best = problem.correct != nullptr;
  const vf new_max = wants_best ? max_of<true>(z, first, count, old_max, sums.best + row)
                                : max_of<false>(z, first, count, old_max, nullptr);
  store(sums.max + row, new_max);
  float scale[kLanes], sum[kLanes], extra[kLanes];
  store(scale, exp(old_max - new_max));
  store(sum, sum_of(count, [&](std::int64_t v) { return exp(load(z + v * kPanel) - new_max); }));
  float shift[kLanes];
  store(shift, old_max - new_max);
  if (problem.entropy != nullptr) {
    store(extra, sum_of(count, [&](std::int64_t v) {
            const vf centred = load(z + v * kPanel) - new_max;
            const vf e = exp(centred);
            return select(e == splat(0.0f), splat(0.0f), e * centred);
          }));
    for (int m = 0; m < kLanes; ++m) {
      double& centred = sums.centred[row + m];
      centred = scale[m] * (centred + sums.sum[row + m] * shift[m]) + extra[m];
    }
  }
  for (int m = 0; m < kLanes; ++m) sums.sum[row + m] = sums.sum[row + m] * scale[m] + sum[m];
  if (problem.label_smoothing != 0) {
    const float* weights = problem.class_weights;
    store(extra, sum_of(count, [&](std::int64_t v) {
            return splat(weights == nullptr ? 1.0f : weights[first + v]) * load(z + v * kPanel);
          }));
    for (int m = 0; m < kLanes; ++m) sums.weighted_logits[row + m] += extra[m];
  }
  if (teacher != nullptr) {
    const vf old_teacher_max = load(sums.teacher_max + row);
    const vf teacher_max = max_of<false>(teacher, first, count, old_teacher_max, nullptr);
    store(sums.teacher_max + row, teacher_max);
    store(scale, exp(old_teacher_max - teacher_max));
    store(sum, sum_of(count, [&](std::int64_t v) { return exp(load(teacher + v * kPanel) - teacher_max); }));
    store(extra, sum_of(count, [&](std::int64_t v) {
            const vf centred = load(teacher + v * kPanel) - teacher_max;
            const vf f = exp(centred);
            return select(f == splat(0.0f), splat(0.0f), f * (centred - (load(z + v * kPanel) - new_max)));
          }));
    float teacher_shift[kLanes];
    store(teacher_shift, old_teacher_max - teacher_max);
    for (int m = 0; m < kLanes; ++m) {
      const double moved = static_cast<double>(teacher_shift[m]) - static_cast<double>(shift[m]);
      double& cross = sums.cross[row + m];
      cross = scale[m] * (cross + sums.teacher_sum[row + m] * moved) + extra[m];
      sums.teacher_sum[row + m] = sums.teacher_sum[row + m] * scale[m] + sum[m];
    }
  }
}

inline void clear(const RowSums& sums, int rows) {
  for (int m = 0; m < rows; ++m) {
    sums.max[m] = sums.teacher_max[m] = kLowest;
    sums.sum[m] = sums.centred[m] = sums.weighted_logits[m] = sums.teacher_sum[m] = sums.cross[m] = 0;
    sums.top_logits[m] = 0;
    sums.target_logit[m] = 0;
    sums.best[m] = -1;
  }
}

// Gradient with respect to a panel's logits, but for the marks: out is [count][kPanel].
[[gnu::noinline]] inline void differentiate_logits(const Chunk& chunk, int row, std::int64_t first, std::int64_t count,
                                                   const float* z, const float* teacher, float* out) {
  const LinearCrossEntropy& problem = *chunk.problem;
  const bool capped = problem.softcap != 0;
  const vf cap = splat(static_cast<float>(problem.softcap));
  for (int half = 0; half < kPanel; half += kLanes) {
    const vf largest = load(chunk.max + row + half);
    const vf p_share = load(chunk.p_share + row + half);
    const vf smoothing = load(chunk.smoothing_share + row + half);
    const vf teacher_max = load(chunk.teacher_max + row + half);
    const vf q_share = load(chunk.q_share + row + half);
    for (std::int64_t v = 0; v < count; ++v) {
      const vf logit = load(z + v * kPanel + half);
      vf dz = exp(logit - largest) * p_share;
      if (problem.label_smoothing != 0) {
        const float weight = problem.class_weights == nullptr ? 1.0f : problem.class_weights[first + v];
        dz -= smoothing * splat(weight);
      }
      if (teacher != nullptr) dz -= exp(load(teacher + v * kPanel + half) - teacher_max) * q_share;
      if (capped) dz *= splat(1.0f) - logit / cap * (logit / cap);
      store(out + v * kPanel + half, dz);
    }
  }
}

}  // namespace dive::cpu::DIVE_ISA
