// Between step_steer.cpp, which brings rows and adapters together, and step_steer_kernel.cpp, which computes rows.
#pragma once

#include <cstdint>

#include "cpu/decode_types.h"
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

// out = h / sqrt(mean(h^2) + 1e-12).
DIVE_DECLARE_VARIANTS(void normalize_input_row(const float* h, std::int64_t size, float* out))

// out[i] = sum over r of phi(x[i] . down[r] + bias[r]) * up[:, r], for the ranks in blocks [begin, end) of R and the
// `count` rows of x [count][D]; end > begin. `matrices` are stored as kRankBlock says. At the address `share_end` the
// caller's share of them ends, and it reads from `next` on afterwards (null: it is not known).
DIVE_DECLARE_VARIANTS(void push_products(const Weight& matrices, const float* bias, Activation activation,
                                         std::int64_t begin, std::int64_t end, const float* x, int count,
                                         std::int64_t D, float* out, const void* share_end, const void* next))

// h becomes h', from the product of the two matrices, which is the sum of `count` <= 8 vectors, a power of two, pair by
// pair. One that is null counts as zeros.
DIVE_DECLARE_VARIANTS(void push_row(const RowPush& push, const float* const* products, int count, std::int64_t size,
                                    float* h))

}  // namespace dive::cpu
