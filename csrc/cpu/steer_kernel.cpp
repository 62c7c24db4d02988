#include "cpu/steer_kernel.h"

#include "cpu/products.h"
#include "cpu/steer_rows.h"
#include "cpu/vec.h"

namespace dive::cpu::DIVE_ISA {
namespace {

// c[m, R] = x . matrix^T. In panels of D, which L1 holds while all R rows pass by.
void project(const float* x, std::int64_t stride_x, int m, const float* matrix, std::int64_t stride_matrix,
             std::int64_t R, std::int64_t D, float* c, std::int64_t stride_c) {
  memset(c, 0, sizeof(float) * m * stride_c);
  for (std::int64_t d = 0; d < D; d += kSteerPanel) {
    const std::int64_t width = D - d < kSteerPanel ? D - d : kSteerPanel;
    add_dots(x + d, stride_x, m, matrix + d, stride_matrix, R, width, c, stride_c);
  }
}

// Columns d ... d + width of a @ up^T + static_push.
void push_panel(const SteerInputs& in, const Adapter& adapter, const float* up_transposed, const float* a, int m,
                std::int64_t d, std::int64_t width, float* push, std::int64_t stride_push) {
  const std::int64_t R = in.rank, stride_a = padded_size(R);
  if (R && up_transposed) {
    outer({a, stride_a, 1}, m, R, up_transposed + d, padded_size(in.hidden_size), padded_size(width), push, stride_push,
          false);
  } else {
    for (int i = 0; i < m; ++i) memset(push + i * stride_push, 0, sizeof(float) * padded_size(width));
    if (R) add_dots(a, stride_a, m, adapter.up + d * R, R, width, R, push, stride_push);
  }
  if (!adapter.static_push) return;
  for (int i = 0; i < m; ++i) {
    float* row = push + i * stride_push;
    for (std::int64_t j = 0; j < width; j += kLanes) {
      store(row + j, load(row + j) + at(adapter.static_push + d, j, width));
    }
  }
}

// x becomes h + d, float32.
void push_rows(const SteerInputs& in, const SteerOutputs& out, const SteerBlock& block, const float* up_transposed,
               const RowState* states, float* x, float* scratch) {
  const std::int64_t D = in.hidden_size, R = in.rank, stride = row_stride(D), stride_a = padded_size(R);
  const Adapter adapter = adapter_of(in, block.adapter);
  float* a = scratch;
  float* push = a + block.count * stride_a;
  if (R) project(x, stride, block.count, adapter.down, D, R, D, a, stride_a);
  for (int i = 0; R && i < block.count; ++i) {
    float* row = a + i * stride_a;
    for (std::int64_t r = 0; r < R; ++r) {
      row[r] = states[i].inverse_rms * row[r] + (adapter.bias ? adapter.bias[r] : 0.0f);
    }
    if (out.pre_activation) memcpy(out.pre_activation + block.rows[i] * R, row, sizeof(float) * R);
    activate(in.activation, row, stride_a);
  }
  for (std::int64_t d = 0; d < D; d += kSteerPanel) {
    const std::int64_t width = D - d < kSteerPanel ? D - d : kSteerPanel;
    push_panel(in, adapter, up_transposed, a, block.count, d, width, push, kSteerPanel);
    for (int i = 0; i < block.count; ++i) {
      float* row = x + i * stride + d;
      const vf scale = splat(states[i].scale);
      for (std::int64_t j = 0; j < width; j += kLanes) {
        store(row + j, moved(load(row + j), load(push + i * kSteerPanel + j), scale));
      }
    }
  }
}

template <typename Element>
void normalize_row(const SteerInputs& in, const float* x, Element* normalized) {
  const std::int64_t D = in.hidden_size;
  const vf inverse = splat(1.0f / sqrtf(dot(x, x, D) / D + in.norm_eps));
  for (std::int64_t i = 0; i < D; i += kLanes) {
    const vf y = load(x + i) * inverse;
    const vf weight = at(in.norm_weight, i, D);
    put(normalized, i, D, weight * (in.round_before_norm_weight ? rounded<Element>(y) : y));
  }
}

template <typename Element>
void forward(const SteerInputs& in, const SteerOutputs& out, const SteerBlock& block, const float* up_transposed,
             float* scratch) {
  const std::int64_t D = in.hidden_size, stride = row_stride(D);
  const bool pushed = block.adapter >= 0;
  float* x = scratch;
  RowState states[kSteerBlockRows];
  for (int i = 0; i < block.count; ++i) {
    read_stream<Element>(in, block.rows[i], x + i * stride);
    if (pushed) states[i] = state_of(in, adapter_of(in, block.adapter), x + i * stride);
  }
  if (pushed) {
    push_rows(in, out, block, up_transposed, states, x, scratch + block.count * stride);
  }
  for (int i = 0; i < block.count; ++i) {
    const std::int64_t row = block.rows[i];
    float* h = x + i * stride;
    Element* steered = static_cast<Element*>(out.steered) + row * D;
    if (pushed) {
      const vf factor = splat(in.preserve_norm ? kept_length(states[i].square_sum, dot(h, h, D)) : 1.0f);
      for (std::int64_t j = 0; j < D; j += kLanes) {
        const vf y = load(h + j) * factor;
        put(steered, j, D, y);
        if (out.normalized) store(h + j, rounded<Element>(y));
      }
    } else if (in.update) {
      for (std::int64_t j = 0; j < D; j += kLanes) put(steered, j, D, load(h + j));
    } else {
      memcpy(steered, static_cast<const Element*>(in.residual) + row * in.residual_stride, sizeof(Element) * D);
    }
    if (!pushed && out.pre_activation) memset(out.pre_activation + row * in.rank, 0, sizeof(float) * in.rank);
    if (out.normalized) normalize_row(in, h, static_cast<Element*>(out.normalized) + row * D);
  }
}

// Working memory of the backward pass over one block: rows x (h), g (the gradient on its way back) and push of
// row_stride, a and pre and its gradient of padded_size(R).
struct BackwardRows {
  float *x, *g, *push, *panel, *a, *pre, *grad_pre, *spare;
};

BackwardRows divide(const SteerInputs& in, int count, float* scratch) {
  const std::int64_t row = row_stride(in.hidden_size), rank = padded_size(in.rank);
  BackwardRows rows;
  rows.x = scratch;
  rows.g = rows.x + count * row;
  rows.push = rows.g + count * row;
  rows.spare = rows.push + count * row;
  rows.panel = rows.spare + row;
  rows.a = rows.panel + count * kSteerPanel;
  rows.pre = rows.a + count * rank;
  rows.grad_pre = rows.pre + count * rank;
  return rows;
}

// target += factor * row, D elements in padded rows.
inline void add_scaled(float* target, float factor, const float* row, std::int64_t D) {
  for (std::int64_t i = 0; i < D; i += kLanes) store(target + i, load(target + i) + splat(factor) * load(row + i));
}

// g += the gradient that comes through the RMSNorm of h', taken before its rounding; `row` is working memory.
template <typename Element, typename Steered>
void norm_backward(const SteerInputs& in, const Element* grad_normalized, Steered steered, float* row, float* g,
                   float* grad_norm_weight) {
  const std::int64_t D = in.hidden_size;
  for (std::int64_t i = 0; i < D; i += kLanes) store(row + i, steered(i));
  const float inverse = 1.0f / sqrtf(dot(row, row, D) / D + in.norm_eps);
  const float along = sum_over(D, [&](std::int64_t i) {
    return at(grad_normalized, i, D) * at(in.norm_weight, i, D) * (load(row + i) * splat(inverse));
  });
  const vf mean = splat(along / D);
  for (std::int64_t i = 0; i < D; i += kLanes) {
    const vf y = load(row + i) * splat(inverse), grad = at(grad_normalized, i, D);
    store(g + i, load(g + i) + splat(inverse) * (grad * at(in.norm_weight, i, D) - y * mean));
    if (grad_norm_weight) store(grad_norm_weight + i, load(grad_norm_weight + i) + grad * y);
  }
}

// From the gradient of h' * |h| / |h'| in g to that of h' before the scaling; returns what h gets through |h|, as a
// multiple of h.
float length_backward(float before, float after, float factor, const float* x, const float* push, float scale, float* g,
                      std::int64_t D) {
  const auto unscaled = [&](std::int64_t i) { return moved(load(x + i), load(push + i), splat(scale)); };
  const float along = sum_over(D, [&](std::int64_t i) { return unscaled(i) * load(g + i); });
  const vf share = splat(after > 0.0f ? along / after : 0.0f);
  for (std::int64_t i = 0; i < D; i += kLanes) store(g + i, splat(factor) * (load(g + i) - unscaled(i) * share));
  return before > 0.0f && after > 0.0f ? along / (sqrtf(before) * sqrtf(after)) : 0.0f;
}

// Gradients of alpha, the gate and the static push from that of h + d; returns the gate's logit's.
float strength_backward(const SteerInputs& in, const Adapter& adapter, const RowState& state,
                        const SteerPartials& partials, const BackwardRows& row) {
  const std::int64_t D = in.hidden_size;
  if (partials.static_push) add_scaled(partials.static_push, state.scale, row.g, D);
  if (!partials.alpha && !adapter.gate_direction) return 0.0f;
  const float grad_scale = dot(row.g, row.push, D);
  if (partials.alpha) *partials.alpha += state.gate * grad_scale;
  if (!adapter.gate_direction) return 0.0f;
  const float grad_logit = adapter.alpha * state.gate * (1.0f - state.gate) * grad_scale;
  if (partials.gate_offset) *partials.gate_offset += grad_logit;
  if (partials.gate_direction) add_scaled(partials.gate_direction, grad_logit, row.x, D);
  return grad_logit;
}

// Gradients of up, down and bias. Leaves in grad_pre the gradient of h @ down^T, and subtracts from along_x[i] what
// row i of h gets, as a multiple of itself, through its root mean square.
void low_rank_backward(const SteerInputs& in, const Adapter& adapter, int count, const float* up_transposed,
                       const RowState* states, const SteerPartials& partials, bool through_down,
                       const BackwardRows& rows, float* along_x) {
  const std::int64_t D = in.hidden_size, R = in.rank, rank = padded_size(R), stride = row_stride(D);
  for (int i = 0; i < count; ++i) {
    for (std::int64_t r = 0; r < R; ++r) rows.a[i * rank + r] *= states[i].scale;
  }
  // Transposed reading: what was a row of `a` is a column of the operand.
  if (partials.up) {
    outer({rows.a, 1, rank}, R, count, rows.g, stride, padded_size(D), partials.up, padded_size(D), true);
  }
  if (!through_down) return;
  project(rows.g, stride, count, up_transposed, padded_size(D), R, D, rows.grad_pre, rank);
  for (int i = 0; i < count; ++i) {
    float* grad = rows.grad_pre + i * rank;
    const float* pre = rows.pre + i * rank;
    const float inverse = states[i].inverse_rms;
    for (std::int64_t r = 0; r < R; ++r) grad[r] *= states[i].scale;
    activation_backward(in.activation, pre, grad, rank);
    const auto without_bias = [&](std::int64_t r) {
      return adapter.bias ? load(pre + r) - at(adapter.bias, r, R) : load(pre + r);
    };
    const float along = sum_over(R, [&](std::int64_t r) { return load(grad + r) * without_bias(r); });
    if (in.normalize_input) along_x[i] -= along * inverse * inverse / D;
    if (partials.bias) add_scaled(partials.bias, 1.0f, grad, R);
    for (std::int64_t r = 0; r < rank; r += kLanes) store(grad + r, load(grad + r) * splat(inverse));
  }
  if (partials.down) {
    outer({rows.grad_pre, 1, rank}, R, count, rows.x, stride, padded_size(D), partials.down, padded_size(D), true);
  }
}

// g += gradients of the adapter with respect to h.
void stream_backward(const SteerInputs& in, const Adapter& adapter, int count, const float* grad_logits,
                     const float* along_x, const BackwardRows& rows) {
  const std::int64_t D = in.hidden_size, R = in.rank, stride = row_stride(D);
  for (std::int64_t d = 0; d < D; d += kSteerPanel) {
    const std::int64_t width = D - d < kSteerPanel ? D - d : kSteerPanel;
    if (R) {
      outer({rows.grad_pre, padded_size(R), 1}, count, R, adapter.down + d, D, width, rows.panel, kSteerPanel, false);
    }
    for (int i = 0; i < count; ++i) {
      float* g = rows.g + i * stride + d;
      const float* x = rows.x + i * stride + d;
      for (std::int64_t j = 0; j < width; j += kLanes) {
        vf total = load(g + j) + splat(along_x[i]) * load(x + j);
        if (R) total += load(rows.panel + i * kSteerPanel + j);
        if (adapter.gate_direction) total += splat(grad_logits[i]) * at(adapter.gate_direction + d, j, width);
        store(g + j, total);
      }
    }
  }
}

template <typename Element>
void read_gradient(const SteerInputs& in, const SteerGradients& grads, std::int64_t row, float* g) {
  const std::int64_t D = in.hidden_size;
  if (grads.grad_steered) {
    const Element* none = nullptr;
    read_row(static_cast<const Element*>(grads.grad_steered) + row * grads.grad_steered_stride, none, D, g);
  } else {
    memset(g, 0, sizeof(float) * padded_size(D));
  }
}

template <typename Element>
void backward(const SteerInputs& in, const SteerGradients& grads, const SteerBlock& block, const float* up_transposed,
              const SteerPartials& partials, float* scratch) {
  const std::int64_t D = in.hidden_size, R = in.rank, stride = row_stride(D), rank = padded_size(R);
  const bool pushed = block.adapter >= 0;
  const Adapter adapter = adapter_of(in, pushed ? block.adapter : 0);
  const bool needs_push =
      pushed && (grads.grad_normalized || in.preserve_norm || partials.alpha || adapter.gate_direction);
  const BackwardRows all = divide(in, block.count, scratch);
  RowState states[kSteerBlockRows];
  float grad_logits[kSteerBlockRows] = {}, along_x[kSteerBlockRows] = {};

  for (int i = 0; i < block.count; ++i) {
    read_stream<Element>(in, block.rows[i], all.x + i * stride);
    read_gradient<Element>(in, grads, block.rows[i], all.g + i * stride);
    if (!pushed) continue;
    states[i] = state_of(in, adapter, all.x + i * stride);
    if (!R) continue;
    memset(all.pre + i * rank, 0, sizeof(float) * rank);
    memcpy(all.pre + i * rank, grads.pre_activation + block.rows[i] * R, sizeof(float) * R);
    memcpy(all.a + i * rank, all.pre + i * rank, sizeof(float) * rank);
    activate(in.activation, all.a + i * rank, rank);
  }
  for (std::int64_t d = 0; needs_push && d < D; d += kSteerPanel) {
    const std::int64_t width = D - d < kSteerPanel ? D - d : kSteerPanel;
    push_panel(in, adapter, up_transposed, all.a, block.count, d, width, all.push + d, stride);
  }
  for (int i = 0; i < block.count; ++i) {
    BackwardRows row = all;
    row.x += i * stride;
    row.g += i * stride;
    row.push += i * stride;
    float after = 0.0f, factor = 1.0f;
    const auto unscaled = [&](std::int64_t j) {
      return moved(load(row.x + j), load(row.push + j), splat(states[i].scale));
    };
    if (pushed && in.preserve_norm) {
      for (std::int64_t j = 0; j < D; j += kLanes) store(row.spare + j, unscaled(j));
      after = dot(row.spare, row.spare, D);
      factor = kept_length(states[i].square_sum, after);
    }
    if (grads.grad_normalized) {
      const Element* grad = static_cast<const Element*>(grads.grad_normalized);
      grad += block.rows[i] * grads.grad_normalized_stride;
      const auto steered = [&](std::int64_t j) { return pushed ? unscaled(j) * splat(factor) : load(row.x + j); };
      norm_backward(in, grad, steered, row.spare, row.g, partials.norm_weight);
    }
    if (!pushed) continue;
    if (in.preserve_norm) {
      along_x[i] = length_backward(states[i].square_sum, after, factor, row.x, row.push, states[i].scale, row.g, D);
    }
    grad_logits[i] = strength_backward(in, adapter, states[i], partials, row);
  }
  if (pushed) {
    const bool through_down = grads.residual || partials.down || partials.bias;
    if (R) low_rank_backward(in, adapter, block.count, up_transposed, states, partials, through_down, all, along_x);
    if (grads.residual) stream_backward(in, adapter, block.count, grad_logits, along_x, all);
  }
  for (int i = 0; grads.residual && i < block.count; ++i) {
    Element* target = static_cast<Element*>(grads.residual) + block.rows[i] * D;
    for (std::int64_t j = 0; j < D; j += kLanes) put(target, j, D, load(all.g + i * stride + j));
  }
}

}  // namespace

void steer_forward_block(const SteerInputs& inputs, const SteerOutputs& outputs, const SteerBlock& block,
                         const float* up_transposed, float* scratch) {
  switch (inputs.dtype) {
    case DType::kFloat32:
      return forward<float>(inputs, outputs, block, up_transposed, scratch);
    case DType::kBFloat16:
      return forward<Bf16>(inputs, outputs, block, up_transposed, scratch);
    case DType::kFloat16:
      return forward<F16>(inputs, outputs, block, up_transposed, scratch);
  }
}

void steer_backward_block(const SteerInputs& inputs, const SteerGradients& gradients, const SteerBlock& block,
                          const float* up_transposed, const SteerPartials& partials, float* scratch) {
  switch (inputs.dtype) {
    case DType::kFloat32:
      return backward<float>(inputs, gradients, block, up_transposed, partials, scratch);
    case DType::kBFloat16:
      return backward<Bf16>(inputs, gradients, block, up_transposed, partials, scratch);
    case DType::kFloat16:
      return backward<F16>(inputs, gradients, block, up_transposed, partials, scratch);
  }
}

}  // namespace dive::cpu::DIVE_ISA
