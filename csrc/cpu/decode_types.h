// What the functions of decode.h work on. B batch rows, K columns and N rows of a weight matrix, H heads, G key/value
// heads, E head size, S cached positions.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/dtype.h"

namespace dive::cpu {

// int8 weights lie in cache lines of 16 rows at 4 columns: [ceil(N / 16)][ceil(K / 4)][16][4], zeros beyond N and K. So
// a line of them is what one instruction multiplies with 4 numbers.
inline constexpr int kInt8Rows = 16, kInt8Columns = 4;
static inline std::int64_t int8_stride(std::int64_t columns) {
  return (columns + kInt8Columns - 1) / kInt8Columns * kInt8Columns;
}

struct Weight {
  const void* data;     // [N][K], or int8
  DType dtype;          // of data, where scales is null
  const float* scales;  // [N]: data is int8 and its row n stands for itself times scales[n]; or null
  std::int64_t rows, columns;
  std::int64_t row_stride;  // in elements; int8_stride(columns) of int8
  const float* bias;        // [N] or null
};

// Rows of activations for a projection, also in the forms in which kernels read them beside some kinds of weights (see
// decode_pairs.h, decode_int8.h); null where no such weight is there, or where the level reads the numbers as they are.
struct Inputs {
  const float* plain;   // [B][K]
  const float* paired;  // for bfloat16 weights
  const float* int8;    // for int8 weights
};

// An adapter's two matrices are stored in the order in which a step reads them, block of ranks by block of ranks: that
// many rows of `down` [ranks][padded D], then their columns of `up` as [padded D / kRankPanel][ranks][kRankPanel],
// zeros in the padding. So a worker's share is one stream, which is asked for ahead as those of weights are.
inline constexpr int kRankBlock = 8;
inline constexpr int kRankPanel = 16;

// Positions in a block of a cache. What attention holds of one at a time, 64 keys and values of 128 floats, is 64 KiB.
inline constexpr int kCacheBlock = 64;

// One row's cache in one layer. Position s is in blocks[s / kCacheBlock], which holds keys and values as
// [G][kCacheBlock][E] elements of the shape's dtype, each that many bytes behind the block's start.
struct CacheRow {
  std::byte* const* blocks;
  std::int64_t keys, values;
  std::int64_t first;   // the first position attended to
  std::int64_t length;  // positions held, the current one included
};

struct AttentionShape {
  int heads, kv_heads, head_size;
  DType cache_dtype;
  float scale;    // of q . k
  float softcap;  // c * tanh(score / c); 0: none
};

enum class GatedActivation { kSilu, kGeluTanh, kGelu };

}  // namespace dive::cpu
