#include "cpu/decode.h"

#include <algorithm>
#include <exception>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#include "cpu/decode_kernel.h"
#include "cpu/spin.h"
#include "cpu/thread_pool.h"

namespace dive::cpu {
namespace {

// Looks before a waiting worker offers its core to others, about 50 microseconds: longer than most phases of a step,
// shorter than a scheduler's slice, which is what an absent worker costs where threads outnumber cores.
constexpr int kLooks = 2000;

// Rows of weights that stay together: four outputs are 16 bytes, and finer shares would meet in more cache lines; of
// int8 weights those that share a cache line.
std::int64_t row_unit(const Weight* const* weights, int count) {
  const bool int8 = std::any_of(weights, weights + count, [](const Weight* weight) { return weight->scales; });
  return int8 ? kInt8Rows : 4;
}

// Elementwise work is divided at whole vectors of the widest level.
constexpr std::int64_t kElementUnit = 16;

// A row's positions are attended to in pieces of whole blocks, and in at most this many pieces (one more where the
// first position is inside a block): enough of them for all workers, few enough that merging costs little. The pieces
// depend on the row alone, and so does its result.
constexpr std::int64_t kMostPieces = 16;

struct Range {
  std::int64_t begin, end;
};

Range share(const Worker& worker, std::int64_t count, std::int64_t unit = 1) {
  const std::int64_t units = (count + unit - 1) / unit;
  return {std::min(units * worker.index / worker.count * unit, count),
          std::min(units * (worker.index + 1) / worker.count * unit, count)};
}

// The pieces of a row: they begin at multiples of `positions`, the first of them at row.first.
struct Pieces {
  std::int64_t positions, count;

  explicit Pieces(const CacheRow& row) {
    const std::int64_t span = kMostPieces * kCacheBlock;
    positions = (row.length - row.first + span - 1) / span * kCacheBlock;
    count = (row.length - 1) / positions - row.first / positions + 1;
  }

  std::int64_t end(std::int64_t begin, const CacheRow& row) const {
    return std::min((begin / positions + 1) * positions, row.length);
  }
};

// The team's memory, large enough. Everyone sees the same size before the first sync, since only what stands between
// the two may change it.
float* shared_scratch(const Worker& worker, std::int64_t floats) {
  thread_local AlignedFloats own;
  AlignedFloats& memory = worker.scratch ? *worker.scratch : own;
  const auto size = static_cast<std::size_t>(floats);
  if (memory.size() < size) {
    worker.sync();
    if (worker.index == 0) {
      try {
        memory.resize(size + size / 2);
      } catch (const std::bad_alloc&) {
      }
    }
    worker.sync();
    // All of them or none, or those who go on would wait for the others.
    if (memory.size() < size) throw std::bad_alloc();
  }
  return memory.data();
}

}  // namespace

void Barrier::wait() {
  const unsigned phase = phase_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == count_) {
    arrived_.store(0, std::memory_order_relaxed);
    phase_.store(phase + 1, std::memory_order_release);
    return;
  }
  for (int looks = 0; phase_.load(std::memory_order_acquire) == phase; ++looks) {
    if (looks < kLooks) {
      pause();
    } else {
      std::this_thread::yield();
    }
  }
}

void run_team(int threads, Isa isa, const std::function<void(const Worker&)>& body) {
  thread_local AlignedFloats scratch;
  AlignedFloats* const shared = &scratch;
  Barrier barrier(threads);
  std::mutex mutex;
  std::exception_ptr error;
  parallel_together(threads, [&](int index) {
    try {
      body({index, threads, isa, &barrier, shared});
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex);
      if (!error) error = std::current_exception();
    }
  });
  if (error) std::rethrow_exception(error);
}

namespace {

// Calls body(i, begin, end) for every matrix i of which the worker has rows.
template <class Body>
void for_shares(const Worker& worker, const Weight* const* weights, int count, Body body) {
  const std::int64_t unit = row_unit(weights, count);
  std::int64_t units = 0;
  for (int i = 0; i < count; ++i) units += (weights[i]->rows + unit - 1) / unit;
  const Range mine = share(worker, units);
  std::int64_t first = 0;  // of this matrix, among all units
  for (int i = 0; i < count; ++i) {
    const std::int64_t after = first + (weights[i]->rows + unit - 1) / unit;
    const std::int64_t begin = std::max(mine.begin, first), end = std::min(mine.end, after);
    if (begin < end) body(i, (begin - first) * unit, std::min((end - first) * unit, weights[i]->rows));
    first = after;
  }
}

const void* row_of(const Weight& weight, std::int64_t n) {
  const std::int64_t element = weight.scales ? 1 : size_of(weight.dtype);
  return static_cast<const std::byte*>(weight.data) + n * weight.row_stride * element;
}

}  // namespace

std::int64_t inputs_size(Isa isa, int batch, std::int64_t columns) {
  return DIVE_DISPATCH(isa, paired_size, batch, columns) + DIVE_DISPATCH(isa, int8_size, batch, columns);
}

namespace {

// Every worker makes the forms for itself: less than a microsecond a row, as much as waiting for another's share takes.
Inputs inputs_of(const Worker& worker, const Weight* const* weights, int count, const float* x, int batch) {
  thread_local AlignedFloats own;
  const std::int64_t columns = weights[0]->columns;
  const auto size = static_cast<std::size_t>(inputs_size(worker.isa, batch, columns));
  AlignedFloats& memory = worker.inputs ? *worker.inputs : own;
  if (memory.size() < size) memory.resize(size);
  Inputs found{x, nullptr, nullptr};
  for (int i = 0; i < count; ++i) {
    if (weights[i]->scales && !found.int8) {
      float* const int8 = memory.data() + DIVE_DISPATCH(worker.isa, paired_size, batch, columns);
      DIVE_DISPATCH(worker.isa, arrange_int8, x, batch, columns, int8);
      found.int8 = int8;
    } else if (!weights[i]->scales && weights[i]->dtype == DType::kBFloat16 && !found.paired) {
      DIVE_DISPATCH(worker.isa, arrange_pairs, x, batch, columns, memory.data());
      found.paired = memory.data();
    }
  }
  return found;
}

}  // namespace

const void* first_read(const Worker& worker, const Weight* const* weights, int count) {
  const void* found = nullptr;
  for_shares(worker, weights, count, [&](int i, std::int64_t begin, std::int64_t) {
    if (!found) found = row_of(*weights[i], begin);
  });
  return found;
}

void project(const Worker& worker, const Weight* const* weights, int count, const float* x, int batch,
             float* const* outputs, bool accumulate, const void* next) {
  const Inputs numbers = inputs_of(worker, weights, count, x, batch);
  for_shares(worker, weights, count, [&](int i, std::int64_t begin, std::int64_t end) {
    const void* after = next;
    if (end == weights[i]->rows && i + 1 < count) after = weights[i + 1]->data;
    DIVE_DISPATCH(worker.isa, project_rows, *weights[i], begin, end, numbers, batch, outputs[i], accumulate, after);
  });
}

void project_gated(const Worker& worker, GatedActivation activation, const Weight& gate, const Weight& up,
                   const float* x, int batch, float* outputs, const void* next) {
  const Weight* const weights[] = {&gate, &up};
  const Inputs numbers = inputs_of(worker, weights, 2, x, batch);
  const Range mine = share(worker, gate.rows, row_unit(weights, 2));
  DIVE_DISPATCH(worker.isa, project_gated_rows, gate, up, mine.begin, mine.end, numbers, batch, activation, outputs,
                next);
}

void quantize_int8(const Weight& weight, std::int8_t* out, float* scales, Isa isa, int threads) {
  parallel(threads, [&](int index) {
    const Range mine = share({index, threads, isa, nullptr}, weight.rows, kInt8Rows);
    DIVE_DISPATCH(isa, quantize_rows, weight, mine.begin, mine.end, out, scales);
  });
}

void rms_norm(const Worker& worker, const float* x, const float* weight, float eps, std::int64_t rows,
              std::int64_t size, float* out) {
  const Range mine = share(worker, rows);
  for (std::int64_t i = mine.begin; i < mine.end; ++i) {
    DIVE_DISPATCH(worker.isa, norm_row, x + i * size, weight, eps, size, out + i * size);
  }
}

void rope(const Worker& worker, float* x, const float* cos, const float* sin, int batch, int heads, int head_size) {
  const Range mine = share(worker, std::int64_t{batch} * heads);
  for (std::int64_t i = mine.begin; i < mine.end; ++i) {
    const std::int64_t angle = i / heads * head_size;
    DIVE_DISPATCH(worker.isa, rotate_head, x + i * head_size, cos + angle, sin + angle, head_size);
  }
}

void append_to_cache(const Worker& worker, const AttentionShape& shape, const float* keys, const float* values,
                     const CacheRow* rows, int batch) {
  const Range mine = share(worker, std::int64_t{batch} * shape.kv_heads);
  const std::int64_t E = shape.head_size, width = size_of(shape.cache_dtype);
  for (std::int64_t i = mine.begin; i < mine.end; ++i) {
    const CacheRow& row = rows[i / shape.kv_heads];
    const std::int64_t last = row.length - 1;
    std::byte* const to =
        row.blocks[last / kCacheBlock] + width * E * (i % shape.kv_heads * kCacheBlock + last % kCacheBlock);
    const DType dtype = shape.cache_dtype;
    DIVE_DISPATCH(worker.isa, narrow_range, keys + i * E, E, dtype, to + row.keys);
    DIVE_DISPATCH(worker.isa, narrow_range, values + i * E, E, dtype, to + row.values);
  }
}

void attention(const Worker& worker, const AttentionShape& shape, const float* q, const CacheRow* rows, int batch,
               float* out) {
  const std::int64_t E = shape.head_size, G = shape.kv_heads;
  const std::int64_t shared = shape.heads / shape.kv_heads, partial = partial_size(shape.head_size);
  std::int64_t positions = 0, pieces = 0;
  for (int b = 0; b < batch; ++b) {
    positions += rows[b].length - rows[b].first;
    pieces += Pieces(rows[b]).count;
  }
  float* const partials = shared_scratch(worker, pieces * shape.heads * partial);

  // Pieces lie in the order [row][head][piece]. They are computed block by block, whose heads are side by side in
  // memory, and dealt out by positions: those whose middle lies in a worker's share.
  std::int64_t before = 0;
  float* to = partials;
  for (int b = 0; b < batch; ++b) {
    const CacheRow& row = rows[b];
    const Pieces split(row);
    std::int64_t piece = 0;
    for (std::int64_t s = row.first, end; s < row.length; s = end, ++piece) {
      end = split.end(s, row);
      for (int g = 0; g < G; ++g) {
        if ((2 * before + end - s) * worker.count / (2 * positions * G) == worker.index) {
          DIVE_DISPATCH(worker.isa, attend_positions, shape, q + (b * shape.heads + g * shared) * E, row, g, s, end,
                        to + (g * split.count + piece) * shared * partial);
        }
        before += end - s;
      }
    }
    to += split.count * shape.heads * partial;
  }
  worker.sync();

  const Range mine = share(worker, std::int64_t{batch} * shape.heads);
  const float* from = partials;
  std::int64_t first = 0;  // head of row b, among all
  for (int b = 0; b < batch; ++b) {
    const std::int64_t count = Pieces(rows[b]).count;
    for (std::int64_t i = std::max(mine.begin, first); i < std::min(mine.end, first + shape.heads); ++i) {
      const std::int64_t h = i - first;
      const float* head = from + (h / shared * count * shared + h % shared) * partial;
      DIVE_DISPATCH(worker.isa, merge_partials, head, shared * partial, static_cast<int>(count), shape.head_size,
                    out + i * E);
    }
    from += count * shape.heads * partial;
    first += shape.heads;
  }
}

void gated_activation(const Worker& worker, GatedActivation activation, const float* gate, const float* up,
                      std::int64_t count, float* out) {
  const Range mine = share(worker, count, kElementUnit);
  const std::int64_t i = mine.begin;
  DIVE_DISPATCH(worker.isa, gate_range, activation, gate + i, up + i, mine.end - i, out + i);
}

void add(const Worker& worker, const float* a, const float* b, std::int64_t count, float* out) {
  const Range mine = share(worker, count, kElementUnit);
  const std::int64_t i = mine.begin;
  DIVE_DISPATCH(worker.isa, add_range, a + i, b + i, mine.end - i, out + i);
}

void softcap(const Worker& worker, float* x, std::int64_t count, float cap) {
  const Range mine = share(worker, count, kElementUnit);
  DIVE_DISPATCH(worker.isa, softcap_range, x + mine.begin, mine.end - mine.begin, cap);
}

void embed(const Worker& worker, const Weight& embedding, const std::int64_t* tokens, int batch, float scale,
           float* out) {
  const Range mine = share(worker, batch);
  for (std::int64_t b = mine.begin; b < mine.end; ++b) {
    DIVE_DISPATCH(worker.isa, embed_row, embedding, tokens[b], scale, out + b * embedding.columns);
  }
}

void argmax(const Worker& worker, const float* logits, int batch, std::int64_t vocabulary, std::int64_t* found) {
  const Range mine = share(worker, batch);
  for (std::int64_t b = mine.begin; b < mine.end; ++b) {
    found[b] = DIVE_DISPATCH(worker.isa, argmax_range, logits + b * vocabulary, vocabulary);
  }
}

std::uint32_t read_memory(const void* data, std::int64_t bytes, Isa isa, int threads) {
  constexpr std::int64_t kLine = 64;
  std::atomic<std::uint32_t> total{0};
  parallel_together(threads, [&](int index) {
    const Range mine = share({index, threads, isa, nullptr}, bytes / kLine);
    const char* begin = static_cast<const char*>(data) + mine.begin * kLine;
    total += DIVE_DISPATCH(isa, read_range, begin, (mine.end - mine.begin) * kLine);
  });
  return total;
}

std::uint64_t digest_memory(const void* data, std::int64_t bytes, Isa isa, int threads) {
  constexpr std::int64_t kPiece = 1 << 20;
  std::atomic<std::uint64_t> total{0};
  parallel_together(threads, [&](int index) {
    const Range mine = share({index, threads, isa, nullptr}, (bytes + kPiece - 1) / kPiece);
    for (std::int64_t piece = mine.begin; piece < mine.end; ++piece) {
      const char* begin = static_cast<const char*>(data) + piece * kPiece;
      total += DIVE_DISPATCH(isa, digest_range, begin, std::min(kPiece, bytes - piece * kPiece), piece);
    }
  });
  return total;
}

}  // namespace dive::cpu
