// Between step_steer.cpp, which brings rows and adapters together, and step_steer_kernel.cpp, which computes rows.
#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "cpu/steer.h"

namespace dive::cpu {

// An adapter's part in a row besides its two matrices; null means absent, as in steer.h.
struct RowPush {
  const float* static_push;  // [D]
  float alpha;
  const float* gate_direction;  // [D]
  float gate_offset;
  bool preserve_norm;
};

// out = phi(in); both hold a whole number of the widest vectors, of which n numbers matter.
DIVE_DECLARE_VARIANTS(void activate_row(Activation activation, const float* in, std::int64_t n, float* out))

// out = h / sqrt(mean(h^2) + 1e-12).
DIVE_DECLARE_VARIANTS(void normalize_input_row(const float* h, std::int64_t size, float* out))

// h becomes h', from the product of the two matrices; `product` is null where there are none.
DIVE_DECLARE_VARIANTS(void push_row(const RowPush& push, const float* product, std::int64_t size, float* h))

}  // namespace dive::cpu
