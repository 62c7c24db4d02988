// What steering does to a row of a decoding step around its two products.
#include "cpu/step_steer_kernel.h"

#include "cpu/steer_rows.h"

namespace dive::cpu::DIVE_ISA {

void activate_row(Activation activation, const float* in, std::int64_t n, float* out) {
  const std::int64_t padded = (n + kLanes - 1) / kLanes * kLanes;
  for (std::int64_t i = 0; i < padded; i += kLanes) store(out + i, at(in, i, n));
  activate(activation, out, padded);
}

void normalize_input_row(const float* h, std::int64_t size, float* out) {
  const vf inverse = splat(1.0f / sqrtf(dot(h, h, size) / size + kInputRmsEps));
  for (std::int64_t i = 0; i < size; i += kLanes) put(out, i, size, at(h, i, size) * inverse);
}

void push_row(const RowPush& push, const float* product, std::int64_t size, float* h) {
  float scale = push.alpha;
  if (push.gate_direction) scale *= 1.0f / (1.0f + expf(-(dot(h, push.gate_direction, size) + push.gate_offset)));
  const float before = push.preserve_norm ? dot(h, h, size) : 0.0f;
  for (std::int64_t i = 0; i < size; i += kLanes) {
    vf d = product ? at(product, i, size) : vf{};
    if (push.static_push) d += at(push.static_push, i, size);
    put(h, i, size, moved(at(h, i, size), d, splat(scale)));
  }
  if (!push.preserve_norm) return;
  const vf factor = splat(kept_length(before, dot(h, h, size)));
  for (std::int64_t i = 0; i < size; i += kLanes) put(h, i, size, at(h, i, size) * factor);
}

}  // namespace dive::cpu::DIVE_ISA
