// What rows of the steering kernels are made of. For steer_kernel.cpp and step_steer_kernel.cpp. D hidden size, R
// adapter rank.
#pragma once

#include <math.h>

#include "cpu/steer_kernel.h"
#include "cpu/vec.h"

namespace dive::cpu::DIVE_ISA {

// Keeps the root mean square of a zero row from dividing by zero. It is no part of norm_eps: steering does not change
// with the norm that follows.
inline constexpr float kInputRmsEps = 1e-12f;

struct Adapter {
  const float *down, *up, *bias, *static_push, *gate_direction;
  float alpha, gate_offset;
};

inline Adapter adapter_of(const SteerInputs& in, std::int64_t index) {
  const std::int64_t D = in.hidden_size, R = in.rank;
  const auto at = [&](const float* stack, std::int64_t size) { return stack ? stack + index * size : nullptr; };
  return {at(in.down, R * D),
          at(in.up, D * R),
          at(in.bias, R),
          at(in.static_push, D),
          at(in.gate_direction, D),
          in.alpha[index],
          in.gate_offset ? in.gate_offset[index] : 0.0f};
}

// Vector i of n elements in memory that ends with them.
template <typename Element>
inline vf at(const Element* p, std::int64_t i, std::int64_t n) {
  return i + kLanes <= n ? load(p + i) : load_partial(p + i, static_cast<int>(n - i));
}

template <typename Element>
inline void put(Element* p, std::int64_t i, std::int64_t n, vf v) {
  if (i + kLanes <= n) {
    store(p + i, v);
  } else {
    store_partial(p + i, v, static_cast<int>(n - i));
  }
}

template <typename Element>
inline vf rounded(vf v) {
  if constexpr (sizeof(Element) == sizeof(float)) {
    return v;
  } else {
    Element stored[kLanes];
    store(stored, v);
    return load(stored);
  }
}

// Sum over i of term(i), a vector each: four sums side by side, because one would wait for every addition's latency.
template <typename Term>
inline float sum_over(std::int64_t n, Term term) {
  vf total[4] = {};
  std::int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    for (int j = 0; j < 4; ++j) total[j] += term(i + j * kLanes);
  }
  for (; i < n; i += kLanes) total[0] += term(i);
  return sum((total[0] + total[1]) + (total[2] + total[3]));
}

inline float dot(const float* a, const float* b, std::int64_t n) {
  return sum_over(n, [=](std::int64_t i) { return at(a, i, n) * at(b, i, n); });
}

// phi in place over n elements, a whole number of vectors. erf and tanh come from libm: R of them are little beside the
// products of a row.
inline void activate(Activation activation, float* a, std::int64_t n) {
  for (std::int64_t i = 0; i < n; i += kLanes) {
    const vf x = load(a + i);
    if (activation == Activation::kSilu) store(a + i, x * sigmoid(x));
    if (activation == Activation::kRelu) store(a + i, select(x < splat(0.0f), splat(0.0f), x));
  }
  if (activation == Activation::kGelu) {
    for (std::int64_t i = 0; i < n; ++i) a[i] = 0.5f * a[i] * (1.0f + erff(a[i] * 0.70710678118654752f));
  } else if (activation == Activation::kTanh) {
    for (std::int64_t i = 0; i < n; ++i) a[i] = tanhf(a[i]);
  }
}

// grad *= phi'(pre).
inline void activation_backward(Activation activation, const float* pre, float* grad, std::int64_t n) {
  for (std::int64_t i = 0; i < n; i += kLanes) {
    const vf x = load(pre + i), g = load(grad + i);
    if (activation == Activation::kSilu) {
      const vf s = sigmoid(x);
      store(grad + i, g * (s * (splat(1.0f) + x * (splat(1.0f) - s))));
    }
    if (activation == Activation::kRelu) store(grad + i, select(x > splat(0.0f), g, splat(0.0f)));
  }
  if (activation == Activation::kGelu) {
    for (std::int64_t i = 0; i < n; ++i) {
      const float density = 0.39894228040143268f * expf(-0.5f * pre[i] * pre[i]);
      grad[i] *= 0.5f * (1.0f + erff(pre[i] * 0.70710678118654752f)) + pre[i] * density;
    }
  } else if (activation == Activation::kTanh) {
    for (std::int64_t i = 0; i < n; ++i) {
      const float y = tanhf(pre[i]);
      grad[i] *= 1.0f - y * y;
    }
  }
}

template <typename Element>
inline void read_row(const Element* residual, const Element* update, std::int64_t D, float* x) {
  for (std::int64_t i = 0; i < D; i += kLanes) {
    const vf r = at(residual, i, D);
    store(x + i, update ? rounded<Element>(r + at(update, i, D)) : r);
  }
  // A vector of another level's padding may follow; products and sums read it.
  for (std::int64_t i = (D + kLanes - 1) / kLanes * kLanes; i < padded_size(D); i += kLanes) store(x + i, vf{});
}

template <typename Element>
inline void read_stream(const SteerInputs& in, std::int64_t row, float* x) {
  const Element* update = static_cast<const Element*>(in.update);
  read_row(static_cast<const Element*>(in.residual) + row * in.residual_stride,
           update ? update + row * in.update_stride : nullptr, in.hidden_size, x);
}

struct RowState {
  float square_sum;   // of h, where something needs it
  float inverse_rms;  // 1 without normalize_input
  float gate;         // 1 without one
  float scale;        // alpha * gate
};

inline RowState state_of(const SteerInputs& in, const Adapter& adapter, const float* x) {
  const std::int64_t D = in.hidden_size;
  RowState state{0.0f, 1.0f, 1.0f, adapter.alpha};
  if (in.preserve_norm || (in.normalize_input && in.rank)) state.square_sum = dot(x, x, D);
  if (in.normalize_input && in.rank) state.inverse_rms = 1.0f / sqrtf(state.square_sum / D + kInputRmsEps);
  if (adapter.gate_direction) {
    state.gate = sigmoid(splat(dot(x, adapter.gate_direction, D) + adapter.gate_offset))[0];
    state.scale *= state.gate;
  }
  return state;
}

// A push of zero leaves every bit, that of -0 too.
inline vf moved(vf x, vf push, vf scale) { return select(push == vf{}, x, x + scale * push); }

// |h| / |h + d|. Equal sums give exactly 1, also where both underflow or overflow, so that no push is no change.
inline float kept_length(float before, float after) {
  if (before == after) return 1.0f;
  return sqrtf(before) / (after > 0.0f ? sqrtf(after) : 1.0f);
}

}  // namespace dive::cpu::DIVE_ISA
