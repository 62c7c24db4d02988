// One decoding step's kernels, as the host starts them. All memory is the device's; activations that a product reads are
// in the dtype of its weights, everything else is float32. Nothing here allocates or waits, so that a step can be
// captured into a graph; what changes from step to step is read from memory.
//
// A row's result does not depend on the rows beside it, to the bit: sums are taken in an order that depends on sizes
// alone, and there are no float atomics.
//
// B batch rows, D hidden size, K columns and N rows of a matrix, H heads, G key/value heads, E head size, V vocabulary,
// R adapter rank. Sizes that a product runs over (D, H E, the MLP's) and E are multiples of 8: 16 bytes of half-precision
// numbers.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "cpu/decode_types.h"
#include "cpu/dtype.h"
#include "cpu/steer.h"

namespace dive::cuda {

using cpu::DType;

// Rows of activations that products read: B rounded up to this. What the rows behind B hold does not matter.
inline constexpr int kRowTile = 8;
inline constexpr int kMostRows = 64;

// Positions of a row are attended to in pieces of whole cache blocks, at most this many, by a block of threads each.
inline constexpr int kMostPieces = 16;

// What a step runs, one per row, written by the host.
struct Row {
  std::int64_t token;
  std::int32_t position;  // of the token in the cache: as many lie before it
  std::int32_t rope_position;
};

struct Matrix {
  const void* data;      // [N][K]
  const float* bias;     // [N] or null
  std::int64_t stride;   // elements from row to row
  std::int32_t rows, columns;
};

// A norm's weight and eps; a null weight: there is no such norm.
struct NormWeight {
  const float* weight;
  float eps;
};

// outputs[i][b][n] = x[b] . matrices[i][n] + bias[n] for up to three matrices over the same x [B][K].
cudaError_t project(cudaStream_t stream, DType dtype, const Matrix* matrices, int count, const void* x, int batch,
                    float* const* outputs);

// out[b][n] = act(x[b] . gate[n]) * (x[b] . up[n]), in the dtype.
cudaError_t project_gated(cudaStream_t stream, DType dtype, cpu::GatedActivation activation, const Matrix& gate,
                          const Matrix& up, const void* x, int batch, void* out);

// stream[b] = embedding row of the row's token, times scale; and the angles of its position: cosine and sine
// [ropes][B][E / 2], frequencies [ropes][E / 2], scaling [ropes].
struct Begin {
  const Row* rows;
  const void* embedding;  // [V][D]
  std::int64_t embedding_stride;
  float embedding_scale;
  int hidden_size;
  float* residual;  // [B][D]
  const float *frequencies, *scaling;
  int ropes, half_head;
  float *cosine, *sine;
  int most_rows;  // the B of cosine and sine
};
cudaError_t begin(cudaStream_t stream, DType dtype, const Begin& arguments, int batch);

// residual[b] += post(update[b]); normed[b] = norm(residual[b]) in the dtype. A null update adds nothing; without a norm
// nothing is written to normed.
struct AddNorm {
  float* residual;      // [B][D]
  const float* update;  // [B][D] or null
  NormWeight post, norm;
  void* normed;  // [B][D]
  int hidden_size;
};
cudaError_t add_norm(cudaStream_t stream, DType dtype, const AddNorm& arguments, int batch);

// Attention over the cache, the current position included, which is added to it: the heads' norms and rope, keys and
// values into the cache, softmax(scale * q . k) v. Piece by piece, and whoever of a key/value head's blocks ends last
// brings the pieces together.
struct Attention {
  const Row* rows;
  const float *q, *k, *v;                // [B][H][E], [B][G][E], as projected
  NormWeight q_norm, k_norm;             // over E
  const float *cosine, *sine;            // [B][E / 2] of the layer's rope
  std::byte* const* const* tables;       // [B] -> the row's blocks
  std::int64_t keys, values;             // bytes from a block's start, see cpu::CacheRow
  int heads, kv_heads, head_size, window;
  float scale, softcap;
  float* pieces;                         // [B][H][kMostPieces][E + 2]
  unsigned* tickets;                     // [B][H], 0 before and after
  void* out;                             // [B][H][E] in the dtype, which is the cache's too
};
cudaError_t attention(cudaStream_t stream, DType dtype, const Attention& arguments, int batch);

// An adapter at one place; absent where rank < 0. `matrices` are stored as cpu::kRankBlock says, columns apart.
struct Steering {
  std::int32_t rank;
  std::int32_t columns;
  const void* matrices;
  DType dtype;
  cpu::Activation activation;
  const float *bias, *static_push, *gate_direction;
  float alpha, gate_offset;
  bool normalize_input, preserve_norm;
};

// residual[b] = steer(residual[b] + post(update[b])), normed[b] = norm of that: two kernels, the first product and the
// rest. Row b is steered by steerings[adapters[b]], not at all where that is -1.
struct Steer {
  float* residual;
  const float* update;  // or null
  NormWeight post, norm;
  void* normed;
  int hidden_size, most_rank;
  const Steering* steerings;
  std::int64_t steerings_stride;  // from one adapter's to the next's
  const std::int32_t* adapters;   // [B]
  float* hidden;                  // [B][D]: h, between the kernels
  float* activated;               // [B][most_rank]
  float* gates;                   // [B]: alpha, times the gate where there is one
  unsigned* tickets;              // [B], 0 before and after
};
cudaError_t steer(cudaStream_t stream, DType dtype, const Steer& arguments, int batch);

// Caps the logits [B][V] and finds the first index of each row's largest; a NaN counts as the largest.
cudaError_t finish(cudaStream_t stream, float* logits, std::int64_t vocabulary, float softcap, std::int64_t* likeliest,
                   int batch);

// Copies [heads][positions][row_bytes] with strides in bytes; row_bytes is a multiple of 16 and so is all else.
cudaError_t copy_heads(cudaStream_t stream, const void* from, std::int64_t from_head, std::int64_t from_position,
                       void* to, std::int64_t to_head, int heads, int positions, std::int64_t row_bytes);

}  // namespace dive::cuda
