// One decoding step's kernels, as the host starts them. All memory is the device's; activations that a product reads
// are in the dtype of its weights, everything else is float32. Nothing here allocates or waits, so that a step can be
// captured into a graph; what changes from step to step is read from memory.
//
// A row's result does not depend on the rows beside it, to the bit: sums are taken in an order that depends on sizes
// alone, and there are no float atomics.
//
// B batch rows, D hidden size, K columns and N rows of a matrix, H heads, G key/value heads, E head size, V vocabulary,
// R adapter rank. Sizes that a product runs over (D, H E, the MLP's) and E are multiples of 8: 16 bytes of
// half-precision numbers.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "cpu/decode_types.h"
#include "cpu/dtype.h"
#include "cpu/steer.h"
#include "engine/kv_cache.h"
#include "engine/stepper.h"

namespace dive::cuda {

using cpu::DType;

// Rows of activations that a product multiplies at a time.
inline constexpr int kRowTile = 8;
inline constexpr int kMostRows = 64;

// Positions of a row are attended to in pieces as long as one or more cache blocks, at most this many.
inline constexpr int kMostPieces = 32;

// What a step runs, one per row, written by the host.
struct Row {
  std::int64_t token;
  std::int32_t position;  // of the token in the cache: as many lie before it
  std::int32_t rope_position;
};

struct Matrix {
  const void* data;     // [N][K]
  const float* bias;    // [N] or null
  std::int64_t stride;  // elements from row to row
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

// residual[b] += post(update[b]); normed[b] = norm(residual[b]) in the dtype. A null update adds nothing; without a
// norm nothing is written to normed.
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
  const float *q, *k, *v;           // [B][H][E], [B][G][E], as projected
  NormWeight q_norm, k_norm;        // over E
  const float *cosine, *sine;       // [B][E / 2] of the layer's rope
  std::byte* const* const* tables;  // [B] -> the row's blocks
  std::int64_t keys, values;        // bytes from a block's start, see cpu::CacheRow
  int heads, kv_heads, head_size, window;
  float scale, softcap;
  float* pieces;      // [B][H][kMostPieces][E + 4]
  unsigned* tickets;  // [B][H], 0 before and after
  void* out;          // [B][H][E] in the dtype, which is the cache's too
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

// residual[b] = steer(residual[b] + post(update[b])), normed[b] = norm of that, in the dtype. Row b is steered by
// steerings[adapters[b]], not at all where that is -1. A null update adds nothing; without a norm nothing is written to
// normed.
struct Steer {
  float* residual;      // [B][D]
  const float* update;  // [B][D] or null
  NormWeight post, norm;
  void* normed;  // [B][D]
  int hidden_size, most_rank;
  bool half;                      // the matrices of all adapters have half precision
  const Steering* steerings;      // null: no row is steered
  std::int64_t steerings_stride;  // from one adapter's to the next's
  const std::int32_t* adapters;   // [B]
  // For steer() alone.
  float* hidden;      // [B][D]: h, between the kernels
  float* activated;   // [B][most_rank]
  float* gates;       // [B]: alpha, times the gate where there is one
  unsigned* tickets;  // [B], 0 before and after
};

// In one kernel of clusters of `blocks` blocks. With a tile of kTileOfArrivals rows, all rows of a tile that are
// steered have the same adapter; with a tile of 1 each has its own. Results are the same, to the bit.
cudaError_t arrive(cudaStream_t stream, DType dtype, const Steer& arguments, int batch, int blocks, int tile);
inline constexpr int kTileOfArrivals = 8;

// The number of blocks for that, 0 where the device has no clusters.
cudaError_t blocks_of_arrivals(DType dtype, int hidden_size, int most_rank, int device, int* blocks);

// In two kernels, the first product and the rest, for devices without clusters; steerings are not null.
cudaError_t steer(cudaStream_t stream, DType dtype, const Steer& arguments, int batch);

// Caps the logits [B][V] and finds the first index of each row's largest; a NaN counts as the largest. Piece by piece,
// and whoever of a row's blocks ends last brings the pieces together.
struct Best {
  float logit;
  std::int32_t index;
};
struct Finish {
  float* logits;
  std::int64_t vocabulary;
  float softcap;            // 0: none
  Best* pieces;             // [B][kMostVocabularyPieces]
  unsigned* tickets;        // [B], 0 before and after
  std::int64_t* likeliest;  // [B]
};
inline constexpr int kMostVocabularyPieces = 32;
cudaError_t finish(cudaStream_t stream, const Finish& arguments, int batch);

// How a row goes on by itself, as engine::LoopRow says. A row that stands for nothing has most = 0.
struct Chooser {
  float temperature, top_p, min_p, repetition_penalty;
  std::int64_t top_k;
  std::uint64_t seed, stream;
  std::int64_t done, barred, most;
  std::int64_t eos[engine::kMostLoopEos];
  std::int32_t eos_count;
  bool wants_log_prob;
};

// What the host is told of a row's step, and of the loop, in memory of its own.
struct Told {
  std::int64_t token;
  float log_prob;
};
struct Progress {
  std::int32_t steps;  // whose tokens are all there
  std::int32_t over;   // no further step will come
};

// The loop's own, in the device's memory.
struct LoopState {
  std::int32_t steps, most_steps, ended;
};

// Every row's next token, into its Row and to the host; then whether there will be a further step. What the host asks
// for and is told lies in pinned memory, and is written so that whoever sees a progress sees the tokens before it.
struct Advance {
  Row* rows;
  Chooser* choosers;  // [B]
  float* logits;      // [B][V]; those of barred tokens are changed
  std::int64_t vocabulary;
  const std::int64_t* likeliest;  // [B]
  std::uint8_t* seen;             // [B][V]: not 0 where the penalty applies; null where no row has one
  Told* told;                     // [steps][most_rows]
  int most_rows;
  LoopState* state;
  unsigned* ticket;  // 0 before and after
  volatile Progress* progress;
  const volatile std::int32_t* wanted_stop;
  unsigned long long condition;  // of the WHILE node around the step, a cudaGraphConditionalHandle
  bool has_condition;
};
cudaError_t advance(cudaStream_t stream, const Advance& arguments, int batch);

// Copies [copies][heads][positions][row_bytes]; row_bytes, strides and addresses are multiples of 16.
cudaError_t copy_heads(cudaStream_t stream, const engine::HeadsCopy* copies, int count, int heads,
                       std::int64_t row_bytes);

}  // namespace dive::cuda
