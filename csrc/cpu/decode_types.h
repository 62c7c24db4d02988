// What the functions of decode.h work on. B batch rows, K columns and N rows of a weight matrix, H heads, G key/value
// heads, E head size, S cached positions.
#pragma once

#include <cstdint>

#include "cpu/dtype.h"

namespace dive::cpu {

struct Weight {
  const void* data;          // [N][K]
  DType dtype;               // of data, where scales is null
  const float* scales;       // [N]: data is int8 and row n stands for data[n] * scales[n]; or null
  std::int64_t rows, columns;
  std::int64_t row_stride;   // in elements
  const float* bias;         // [N] or null
};

// One row's cache in one layer: [G][capacity][E] elements of the shape's dtype.
struct CacheRow {
  void* keys;
  void* values;
  std::int64_t head_stride;  // capacity * E
  std::int64_t first;        // the first position attended to
  std::int64_t length;       // positions held, the current one included
};

struct AttentionShape {
  int heads, kv_heads, head_size;
  DType cache_dtype;
  float scale;    // of q . k
  float softcap;  // c * tanh(score / c); 0: none
};

enum class GatedActivation { kSilu, kGeluTanh, kGelu };

}  // namespace dive::cpu
