#include "cpu/steer.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/steer_kernel.h"
#include "cpu/thread_pool.h"

namespace dive::cpu {
namespace {

// A thread is woken for at least this many multiplications: 30 to 60 microseconds of a core, against about ten for
// waking it.
constexpr std::int64_t kWorkPerThread = std::int64_t{1} << 20;

// From here on transposing `up` costs less than reading it with a horizontal sum per result does.
constexpr std::int64_t kTransposeRows = 48;

// Partial sums of the backward pass: a chunk has at least this many rows, and all together stay under this memory.
constexpr std::int64_t kChunkRows = 128;
constexpr std::int64_t kMaxChunks = 32;
constexpr std::int64_t kMaxPartialBytes = std::int64_t{128} << 20;

// Rows sorted by adapter (those left alone last, each group in its order) and cut into blocks of one adapter.
struct Plan {
  std::vector<std::int64_t> order;
  std::vector<std::int64_t> rows_of;  // per adapter
  std::vector<SteerBlock> blocks;
  std::size_t pushed = 0;  // so many blocks have an adapter; they come first
};

bool pushes(const SteerInputs& in) { return in.rank > 0 || in.static_push != nullptr; }

std::int64_t adapter_at(const SteerInputs& in, std::int64_t row) {
  if (!pushes(in) || (in.mask && !in.mask[row])) return -1;
  if (!in.adapter_index) return 0;
  const std::int64_t index = in.adapter_index[row];
  if (index < -1 || index >= in.adapters) {
    throw std::out_of_range("adapter_index: expected -1 to " + std::to_string(in.adapters - 1) + ", got " +
                            std::to_string(index) + " in row " + std::to_string(row));
  }
  return index;
}

Plan make_plan(const SteerInputs& in, std::int64_t block_rows) {
  Plan plan;
  plan.rows_of.assign(static_cast<std::size_t>(in.adapters), 0);
  std::int64_t alone = 0;
  for (std::int64_t row = 0; row < in.rows; ++row) {
    const std::int64_t adapter = adapter_at(in, row);
    ++(adapter < 0 ? alone : plan.rows_of[adapter]);
  }
  std::vector<std::int64_t> next(plan.rows_of.size() + 1, 0);  // where each group's next row goes; the last: left alone
  for (std::size_t group = 0; group + 1 < next.size(); ++group) next[group + 1] = next[group] + plan.rows_of[group];
  plan.order.resize(static_cast<std::size_t>(in.rows));
  const auto cut = [&](std::int64_t begin, std::int64_t count, std::int64_t adapter) {
    for (std::int64_t first = 0; first < count; first += block_rows) {
      const int used = static_cast<int>(std::min(block_rows, count - first));
      plan.blocks.push_back({plan.order.data() + begin + first, used, adapter});
    }
  };
  for (std::size_t group = 0; group + 1 < next.size(); ++group) {
    cut(next[group], plan.rows_of[group], static_cast<std::int64_t>(group));
  }
  plan.pushed = plan.blocks.size();
  cut(next.back(), alone, -1);
  for (std::int64_t row = 0; row < in.rows; ++row) {
    const std::int64_t adapter = adapter_at(in, row);
    plan.order[static_cast<std::size_t>(next[adapter < 0 ? next.size() - 1 : adapter]++)] = row;
  }
  return plan;
}

int threads_for(const SteerInputs& in, std::int64_t products, std::size_t pieces, int threads) {
  const std::int64_t work = in.rows * in.hidden_size * (8 + products * in.rank);
  const std::int64_t most = std::min<std::int64_t>(threads, static_cast<std::int64_t>(pieces));
  return static_cast<int>(std::clamp<std::int64_t>(work / kWorkPerThread, 1, std::max<std::int64_t>(most, 1)));
}

// This thread's working memory. It is kept, because fresh pages would cost a decoding step more than its arithmetic.
float* scratch(std::int64_t floats) {
  thread_local std::unique_ptr<float[]> memory;
  thread_local std::int64_t size = 0;
  if (floats > size) {
    memory.reset(new float[static_cast<std::size_t>(floats)]);
    size = floats;
  }
  return memory.get();
}

// up [D, R] as [R, D] with rows of padded_size(D), in squares that fit the cache either way.
std::unique_ptr<float[]> transposed(const float* up, std::int64_t D, std::int64_t R) {
  const std::int64_t stride = padded_size(D);
  std::unique_ptr<float[]> result(new float[static_cast<std::size_t>(R * stride)]);
  for (std::int64_t d0 = 0; d0 < D; d0 += 16) {
    const std::int64_t d1 = std::min(d0 + 16, D);
    for (std::int64_t r = 0; r < R; ++r) {
      for (std::int64_t d = d0; d < d1; ++d) result[r * stride + d] = up[d * R + r];
    }
  }
  for (std::int64_t r = 0; r < R; ++r) std::fill(&result[r * stride + D], &result[r * stride] + stride, 0.0f);
  return result;
}

// Calls body(0) ... body(pieces - 1) on `threads` threads, each taking the next piece when it is free.
template <typename Body>
void share(int threads, std::size_t pieces, const Body& body) {
  std::atomic<std::size_t> next{0};
  parallel(threads, [&](int) {
    for (std::size_t piece = next++; piece < pieces; piece = next++) body(piece);
  });
}

// The partial sums of all chunks, one after the other; every array is as long as in SteerPartials.
class Partials {
 public:
  Partials(const SteerInputs& in, const SteerGradients& out, std::int64_t chunks) {
    const std::int64_t D = padded_size(in.hidden_size), R = padded_size(in.rank);
    const auto reserve = [&](const float* wanted, std::int64_t floats) {
      const std::int64_t offset = size_;
      if (wanted) size_ += floats;
      return wanted ? offset : -1;
    };
    down_ = reserve(out.down, in.rank * D);
    up_ = reserve(out.up, in.rank * D);
    bias_ = reserve(out.bias, R);
    static_push_ = reserve(out.static_push, D);
    gate_direction_ = reserve(out.gate_direction, D);
    norm_weight_ = reserve(out.norm_weight, D);
    const std::int64_t most = size_ ? kMaxPartialBytes / (4 * size_) : kMaxChunks;
    chunks_ = std::min(chunks, std::clamp<std::int64_t>(most, 1, kMaxChunks));
    vectors_.reset(new float[static_cast<std::size_t>(chunks_ * size_)]);
    numbers_.assign(static_cast<std::size_t>(2 * chunks_), 0.0);
    wants_alpha_ = out.alpha != nullptr;
    wants_gate_offset_ = out.gate_offset != nullptr;
  }

  std::int64_t chunks() const { return chunks_; }

  SteerPartials cleared(std::int64_t chunk) {
    float* base = vectors_.get() + chunk * size_;
    std::fill(base, base + size_, 0.0f);
    const auto at = [&](std::int64_t offset) { return offset < 0 ? nullptr : base + offset; };
    double* numbers = numbers_.data() + 2 * chunk;
    return {at(down_),
            at(up_),
            at(bias_),
            at(static_push_),
            at(gate_direction_),
            at(norm_weight_),
            wants_alpha_ ? numbers : nullptr,
            wants_gate_offset_ ? numbers + 1 : nullptr};
  }

  // Adds all chunks into the first, in their order; columns may be shared among threads, for each has its own sum.
  void add_up(int threads) {
    constexpr std::int64_t kColumns = 4096;
    share(threads, static_cast<std::size_t>((size_ + kColumns - 1) / kColumns), [&](std::size_t piece) {
      const std::int64_t begin = static_cast<std::int64_t>(piece) * kColumns, end = std::min(begin + kColumns, size_);
      for (std::int64_t chunk = 1; chunk < chunks_; ++chunk) {
        const float* other = vectors_.get() + chunk * size_;
        for (std::int64_t i = begin; i < end; ++i) vectors_[i] += other[i];
      }
    });
    for (std::int64_t chunk = 1; chunk < chunks_; ++chunk) {
      numbers_[0] += numbers_[2 * chunk];
      numbers_[1] += numbers_[2 * chunk + 1];
    }
  }

  // After add_up().
  void write(const SteerInputs& in, const SteerGradients& out) const {
    const std::int64_t D = in.hidden_size, R = in.rank, stride = padded_size(D);
    const auto copy = [&](std::int64_t offset, float* target, std::int64_t rows, std::int64_t columns) {
      for (std::int64_t row = 0; target && row < rows; ++row) {
        std::copy_n(vectors_.get() + offset + row * stride, columns, target + row * columns);
      }
    };
    copy(down_, out.down, R, D);
    copy(bias_, out.bias, 1, R);
    copy(static_push_, out.static_push, 1, D);
    copy(gate_direction_, out.gate_direction, 1, D);
    copy(norm_weight_, out.norm_weight, 1, D);
    for (std::int64_t d0 = 0; out.up && d0 < D; d0 += 16) {
      for (std::int64_t r = 0; r < R; ++r) {
        for (std::int64_t d = d0; d < std::min(d0 + 16, D); ++d) out.up[d * R + r] = vectors_[up_ + r * stride + d];
      }
    }
    if (out.alpha) *out.alpha = static_cast<float>(numbers_[0]);
    if (out.gate_offset) *out.gate_offset = static_cast<float>(numbers_[1]);
  }

 private:
  std::int64_t down_, up_, bias_, static_push_, gate_direction_, norm_weight_;  // offsets in a chunk; -1: not wanted
  std::int64_t size_ = 0, chunks_ = 1;
  bool wants_alpha_, wants_gate_offset_;
  std::unique_ptr<float[]> vectors_;
  std::vector<double> numbers_;  // alpha and gate_offset of each chunk
};

}  // namespace

void steer_forward(const SteerInputs& inputs, const SteerOutputs& outputs, Isa isa, int threads) {
  const int used = threads_for(inputs, 2, static_cast<std::size_t>(inputs.rows), threads);
  const Plan plan = make_plan(inputs, std::clamp<std::int64_t>((inputs.rows + used - 1) / used, 1, kSteerBlockRows));
  const std::int64_t D = inputs.hidden_size, R = inputs.rank;
  std::vector<std::unique_ptr<float[]>> up(static_cast<std::size_t>(inputs.adapters));
  for (std::size_t adapter = 0; R && adapter < up.size(); ++adapter) {
    if (plan.rows_of[adapter] >= kTransposeRows) up[adapter] = transposed(inputs.up + adapter * D * R, D, R);
  }
  share(used, plan.blocks.size(), [&](std::size_t piece) {
    const SteerBlock& block = plan.blocks[piece];
    const float* up_transposed = block.adapter < 0 ? nullptr : up[block.adapter].get();
    float* memory = scratch(steer_forward_scratch(inputs, block.count));
    DIVE_DISPATCH(isa, steer_forward_block, inputs, outputs, block, up_transposed, memory);
  });
}

void steer_backward(const SteerInputs& inputs, const SteerGradients& gradients, Isa isa, int threads) {
  const Plan plan = make_plan(inputs, kSteerBlockRows);
  Partials partials(inputs, gradients, std::max<std::int64_t>(1, inputs.rows / kChunkRows));
  const std::size_t chunks = static_cast<std::size_t>(partials.chunks());
  std::unique_ptr<float[]> up;
  if (inputs.rank) up = transposed(inputs.up, inputs.hidden_size, inputs.rank);
  const int used = threads_for(inputs, 5, chunks, threads);
  share(used, chunks, [&](std::size_t chunk) {
    const SteerPartials sums = partials.cleared(static_cast<std::int64_t>(chunk));
    float* memory = scratch(steer_backward_scratch(inputs, kSteerBlockRows));
    const auto run = [&](std::size_t first, std::size_t count) {
      for (std::size_t i = first + count * chunk / chunks; i < first + count * (chunk + 1) / chunks; ++i) {
        DIVE_DISPATCH(isa, steer_backward_block, inputs, gradients, plan.blocks[i], up.get(), sums, memory);
      }
    };
    // Each chunk has its share of both kinds of rows, for those left alone cost less.
    run(0, plan.pushed);
    run(plan.pushed, plan.blocks.size() - plan.pushed);
  });
  partials.add_up(used);
  partials.write(inputs, gradients);
}

}  // namespace dive::cpu
