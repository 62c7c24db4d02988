// Between steer.cpp, which divides the rows, and steer_kernel.cpp, which computes them.
#pragma once

#include <cstdint>

#include "cpu/steer.h"

namespace dive::cpu {

// At 16 rows the R x D matrices are read once for 16 rows, and the rows themselves (D = 4096: 256 KiB as float32) stay
// in a core's L2 from their first use to their last.
inline constexpr int kSteerBlockRows = 16;

// Columns that products take at a time: 16 rows of them are 32 KiB, which L1 holds.
inline constexpr std::int64_t kSteerPanel = 512;

// Rows that share one adapter, or adapter -1: rows that are left alone.
struct SteerBlock {
  const std::int64_t* rows;
  int count;
  std::int64_t adapter;
};

// Sums over the rows of one chunk; null where not wanted. Rows of D are padded_size(D) long, of R padded_size(R).
struct SteerPartials {
  float* down;  // [R, D]
  float* up;    // [R, D]: transposed
  float* bias;
  float* static_push;
  float* gate_direction;
  float* norm_weight;
  double* alpha;  // a sum over D and T in one number
  double* gate_offset;
};

// A whole number of the widest vectors. These functions are static because this header is compiled at every level.
static inline std::int64_t padded_size(std::int64_t size) { return (size + 15) / 16 * 16; }

// Rows whose length is a multiple of 4 KiB would all fall on the same cache sets; one more line spreads them.
static inline std::int64_t row_stride(std::int64_t hidden_size) { return padded_size(hidden_size) + 16; }

// Floats of working memory for a block of `count` rows.
static inline std::int64_t steer_forward_scratch(const SteerInputs& inputs, int count) {
  return count * (row_stride(inputs.hidden_size) + kSteerPanel + padded_size(inputs.rank));
}

static inline std::int64_t steer_backward_scratch(const SteerInputs& inputs, int count) {
  return count * (3 * row_stride(inputs.hidden_size) + kSteerPanel + 3 * padded_size(inputs.rank)) +
         row_stride(inputs.hidden_size);
}

// `up_transposed` is [R, D] with rows of padded_size(D), zero in the padding; the forward pass works without it too
// (null), the backward pass needs it where R > 0. Scratch and partials are aligned to nothing.
DIVE_DECLARE_VARIANTS(void steer_forward_block(const SteerInputs& inputs, const SteerOutputs& outputs,
                                               const SteerBlock& block, const float* up_transposed, float* scratch))
DIVE_DECLARE_VARIANTS(void steer_backward_block(const SteerInputs& inputs, const SteerGradients& gradients,
                                                const SteerBlock& block, const float* up_transposed,
                                                const SteerPartials& partials, float* scratch))

}  // namespace dive::cpu
