// The arithmetic of one decoding step for a small batch: projections, norms, rope, attention over a cache, activations.
// Nothing here knows what a model is. B batch rows, K columns and N rows of a weight matrix, D hidden size, H heads,
// G key/value heads, E head size, S cached positions.
//
// Every function that takes a Worker is called by all workers of a team with the same arguments; each does its share,
// and worker.sync() must stand between a function that writes and one that reads what was written. A row's result
// depends neither on the rows beside it nor on the number of workers, to the bit. Activations are float32.
//
// rms_norm, rope and append_to_cache divide n rows or heads in the same way, so that nothing need stand between them
// where n is the same: norm, rope and append of the same B * G heads.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <vector>

#include "cpu/aligned.h"
#include "cpu/decode_types.h"
#include "cpu/dtype.h"
#include "cpu/isa.h"

namespace dive::cpu {

// All workers wait here for the last one; spinning, because the phases of a step are microseconds long.
class Barrier {
 public:
  explicit Barrier(int count) : count_(count) {}
  void wait();

 private:
  const int count_;
  // Apart, or every arrival would take the line away from those who watch the phase.
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<unsigned> phase_{0};
};

struct Worker {
  int index, count;
  Isa isa;
  Barrier* barrier;
  AlignedFloats* scratch = nullptr;  // the team's; null: the calling thread's own
  // This worker's own, of inputs_size() for the largest projection; null: the calling thread's, made when it is needed.
  AlignedFloats* inputs = nullptr;

  void sync() const {
    if (count > 1) barrier->wait();
  }
};

// Runs body(worker) on `threads` threads within one parallel_together() call. The first exception of a body is thrown
// here; a body may throw where no sync follows, or where all of the team's do.
void run_team(int threads, Isa isa, const std::function<void(const Worker&)>& body);

// Floats that a worker needs for the forms in which `batch` rows of K columns are read beside some kinds of weights.
std::int64_t inputs_size(Isa isa, int batch, std::int64_t columns);

// outputs[i][b][n] = sum over k of x[b][k] * weights[i][n][k] + bias[n]: `count` matrices over the same x, each read
// once. x is [B][K], outputs[i] is [B][weights[i]->rows], all contiguous; 1 <= B <= 64. With `accumulate` that is added
// to what outputs hold. `next` is first_read() of what the worker computes after this, or null.
void project(const Worker& worker, const Weight* const* weights, int count, const float* x, int batch,
             float* const* outputs, bool accumulate = false, const void* next = nullptr);

// Where the worker's share of those matrices begins, null if it has none.
const void* first_read(const Worker& worker, const Weight* const* weights, int count);

// outputs[b][n] = act(x[b] . gate[n] + gate.bias[n]) * (x[b] . up[n] + up.bias[n]), bit-equal to project() followed by
// gated_activation(), without a sync between them.
void project_gated(const Worker& worker, GatedActivation activation, const Weight& gate, const Weight& up,
                   const float* x, int batch, float* outputs, const void* next = nullptr);

// Per row of the matrix: scales[n] = max |row| / 127, out[n][k] = round(row[k] / scales[n]) in the order that Weight
// asks for; zeros where the row is zero. `out` has room for whole cache lines.
void quantize_int8(const Weight& weight, std::int8_t* out, float* scales, Isa isa, int threads);

// out[i][d] = x[i][d] / sqrt(mean(x[i]^2) + eps) * weight[d]; i < rows. out may be x.
void rms_norm(const Worker& worker, const float* x, const float* weight, float eps, std::int64_t rows,
              std::int64_t size, float* out);

// x[b][h] = x[b][h] * cos[b] + rotate_half(x[b][h]) * sin[b], rotate_half((x1, x2)) = (-x2, x1); x is [B][heads][E],
// cos and sin are [B][E].
void rope(const Worker& worker, float* x, const float* cos, const float* sin, int batch, int heads, int head_size);

// Writes keys and values [B][G][E] at position length - 1 of every row's cache.
void append_to_cache(const Worker& worker, const AttentionShape& shape, const float* keys, const float* values,
                     const CacheRow* rows, int batch);

// out[b][h] = sum over s in [first, length) of softmax(scale * q[b][h] . keys[s][h / (H / G)]) values[s]; q and out are
// [B][H][E]. All workers of a team must call it: there are syncs inside.
void attention(const Worker& worker, const AttentionShape& shape, const float* q, const CacheRow* rows, int batch,
               float* out);

// out[i] = act(gate[i]) * up[i]; i < count. out may be gate.
void gated_activation(const Worker& worker, GatedActivation activation, const float* gate, const float* up,
                      std::int64_t count, float* out);

// out[i] = a[i] + b[i]. out may be either.
void add(const Worker& worker, const float* a, const float* b, std::int64_t count, float* out);

// x[i] = cap * tanh(x[i] / cap).
void softcap(const Worker& worker, float* x, std::int64_t count, float cap);

// out[b] = embedding row tokens[b], widened, times scale.
void embed(const Worker& worker, const Weight& embedding, const std::int64_t* tokens, int batch, float scale,
           float* out);

// found[b] = the first index of the largest of logits[b][0 .. vocabulary); a NaN counts as the largest.
void argmax(const Worker& worker, const float* logits, int batch, std::int64_t vocabulary, std::int64_t* found);

// The sum, modulo 2^32, of the 32-bit words of whole cache lines: reads memory as fast as it can be read, which is the
// limit that project() is measured against.
std::uint32_t read_memory(const void* data, std::int64_t bytes, Isa isa, int threads);

// A number that tells contents of whole cache lines apart, by their words and by where these stand: any change of one
// word, and but for chances of about 2^-32 of several. The same for every level and number of threads.
std::uint64_t digest_memory(const void* data, std::int64_t bytes, Isa isa, int threads);

}  // namespace dive::cpu
