#include "cpu/step_steer.h"

#include <algorithm>

#include "cpu/step_steer_kernel.h"

namespace dive::cpu {
namespace {

// An adapter's ranks are dealt out in this many pieces, whose products are summed pair by pair, so that a row's result
// does not depend on who computed which. With one worker per piece or fewer, and a power of two of them, each leaves
// one sum, else every piece its own.
constexpr int kPieces = 8;

int count_nodes(int threads) {
  const bool divides = threads <= kPieces && kPieces % threads == 0;
  return divides ? threads : kPieces;
}

// The blocks of ranks before piece `piece`.
std::int64_t blocks_before(const engine::Steering& steering, int piece) {
  return piece * ((steering.rank + kRankBlock - 1) / kRankBlock) / kPieces;
}

bool has_ranks(const engine::Steering& steering, int first, int count) {
  return blocks_before(steering, first) < blocks_before(steering, first + count);
}

// Where piece `piece` begins in memory.
const void* address_of(const engine::Steering& steering, int piece) {
  const Weight& matrices = steering.matrices;
  const std::int64_t rank = std::min(blocks_before(steering, piece) * kRankBlock, steering.rank);
  return static_cast<const std::byte*>(matrices.data) + 2 * rank * matrices.columns * size_of(matrices.dtype);
}

// Inlined early, or GCC would drop the call of a function that computes nothing.
[[gnu::always_inline]] inline void ask_for(const float* numbers, std::int64_t count) {
  constexpr std::int64_t kLine = 64 / sizeof(float);
  if (!numbers) return;
  for (std::int64_t i = 0; i < count; i += kLine) __builtin_prefetch(numbers + i);
}

// Multiplications up to which every worker computes a product for itself: some hundred nanoseconds, as much as waiting
// for another one's half takes.
constexpr std::int64_t kLittle = 4096;

}  // namespace

StepSteering::StepSteering(const engine::Plan& plan, int max_rows, int threads)
    : plan_(plan), nodes_(count_nodes(threads)) {
  if (plan.adapters.empty()) return;
  private_.resize(threads);
  parts_.resize(threads);
  const std::int64_t size = max_rows * plan.hidden_size;
  for (Private& own : private_) {
    own.inputs.resize(size);
    own.products.resize(size);
    own.spare.resize(3 * size);  // a sum for every halving of 8 pieces
  }
  for (AlignedFloats& products : products_) products.resize(nodes_ * size);
}

void StepSteering::group(const std::vector<engine::StepRow>& rows) {
  turns_.clear();
  for (std::size_t turn = 0;; ++turn) {
    std::vector<Group> groups;
    for (std::size_t b = 0; b < rows.size(); ++b) {
      const std::vector<int>& adapters = *rows[b].adapters;
      if (turn >= adapters.size()) continue;
      auto found = std::find_if(groups.begin(), groups.end(),
                                [&](const Group& group) { return group.adapter == adapters[turn]; });
      if (found == groups.end()) found = groups.insert(found, {adapters[turn], {}});
      found->rows.push_back(static_cast<int>(b));
    }
    if (groups.empty()) return;
    turns_.push_back(std::move(groups));
  }
}

void StepSteering::gather(const std::vector<Group>& groups, std::size_t layer, SteerPlace place,
                          std::vector<Part>& parts) const {
  parts.clear();
  for (const Group& group : groups) {
    const engine::Adapter& adapter = plan_.adapters[group.adapter];
    const auto& steering = (place == SteerPlace::kBlock ? adapter.block : adapter.attention)[layer];
    if (steering) parts.push_back({&*steering, &group.rows});
  }
}

const void* StepSteering::first_read(const Worker& worker, std::size_t layer, SteerPlace place, const void* next) {
  if (turns_.empty()) return next;
  std::vector<Part>& parts = parts_[worker.index];
  gather(turns_.front(), layer, place, parts);
  // The vectors, which every worker reads, come while it computes what is steered.
  for (const Part& part : parts) {
    ask_for(part.steering->static_push, plan_.hidden_size);
    ask_for(part.steering->gate_direction, plan_.hidden_size);
    ask_for(part.steering->bias, part.steering->rank);
  }
  return first_read(division(worker, parts), parts, 0, next);
}

void StepSteering::apply(const Worker& worker, std::size_t layer, SteerPlace place, float* stream, const void* next) {
  if (turns_.empty()) return;
  std::vector<Part>& parts = parts_[worker.index];
  for (const std::vector<Group>& groups : turns_) {
    gather(groups, layer, place, parts);
    if (!parts.empty()) steer(worker, parts, stream, next);
  }
}

StepSteering::Division StepSteering::division(const Worker& worker, const std::vector<Part>& parts) const {
  std::int64_t multiplications = 0;
  for (const Part& part : parts) {
    const auto rows = static_cast<std::int64_t>(part.rows->size());
    multiplications += part.steering->rank * plan_.hidden_size * rows;
  }
  if (worker.count == 1 || multiplications <= kLittle) return {1, kPieces, 0, 1};
  const auto first = [&](int index) { return (index * nodes_ + worker.count - 1) / worker.count; };
  return {nodes_, kPieces / nodes_, first(worker.index), first(worker.index + 1)};
}

// Of parts `part` and after.
const void* StepSteering::first_read(const Division& mine, const std::vector<Part>& parts, std::size_t part,
                                     const void* next) {
  for (; part < parts.size(); ++part) {
    const engine::Steering& s = *parts[part].steering;
    if (s.rank && has_ranks(s, mine.begin * mine.pieces, (mine.end - mine.begin) * mine.pieces)) {
      return address_of(s, mine.begin * mine.pieces);
    }
  }
  return next;
}

// out = the product's pieces first ... first + count - 1, a power of two of them that hold ranks.
void StepSteering::multiply(const Job& job, int first, int count, float* spare, float* out) const {
  const engine::Steering& s = *job.part->steering;
  const int rows = static_cast<int>(job.part->rows->size()), half = count / 2;
  if (count == 1) {
    DIVE_DISPATCH(job.isa, push_products, s.matrices, s.bias, s.activation, blocks_before(s, first),
                  blocks_before(s, first + 1), job.inputs, rows, plan_.hidden_size, out, job.end, job.next);
    return;
  }
  const bool left = has_ranks(s, first, half), right = has_ranks(s, first + half, half);
  if (left) multiply(job, first, half, spare, out);
  if (!right) return;
  const std::int64_t size = rows * plan_.hidden_size;
  multiply(job, first + half, half, spare + size, left ? spare : out);
  if (left) add({0, 1, job.isa, nullptr}, out, spare, size, out);
}

// Workers meet once, however many adapters there are.
void StepSteering::steer(const Worker& worker, const std::vector<Part>& parts, float* stream, const void* next) {
  const std::int64_t D = plan_.hidden_size;
  Private& own = private_[worker.index];
  const Division mine = division(worker, parts);
  const bool shared = mine.nodes > 1;
  // In turns, so that one who writes has met everyone after they read what was there before.
  float* const products = shared ? products_[own.turn ^= 1].data() : own.products.data();
  std::int64_t rows = 0;
  for (const Part& part : parts) rows += static_cast<std::int64_t>(part.rows->size());

  std::int64_t row = 0;  // of all parts' rows, one after the other
  for (std::size_t p = 0; p < parts.size(); ++p) {
    const engine::Steering& s = *parts[p].steering;
    if (s.rank && mine.begin < mine.end) {
      float* input = own.inputs.data();
      for (const int b : *parts[p].rows) {
        const float* h = stream + b * D;
        if (s.normalize_input) {
          DIVE_DISPATCH(worker.isa, normalize_input_row, h, D, input);
        } else {
          std::copy_n(h, D, input);
        }
        input += D;
      }
      const Job job{&parts[p], worker.isa, own.inputs.data(), address_of(s, mine.end * mine.pieces),
                    first_read(mine, parts, p + 1, next)};
      for (int node = mine.begin; node < mine.end; ++node) {
        if (!has_ranks(s, node * mine.pieces, mine.pieces)) continue;
        multiply(job, node * mine.pieces, mine.pieces, own.spare.data(), products + (node * rows + row) * D);
      }
    }
    row += static_cast<std::int64_t>(parts[p].rows->size());
  }
  if (shared) worker.sync();

  row = 0;
  for (const Part& part : parts) {
    const engine::Steering& s = *part.steering;
    const RowPush push{s.static_push, s.alpha, s.gate_direction, s.gate_offset, s.preserve_norm};
    for (const int b : *part.rows) {
      const float* found[kPieces];
      for (int node = 0; node < mine.nodes; ++node) {
        const bool there = has_ranks(s, node * mine.pieces, mine.pieces);
        found[node] = there ? products + (node * rows + row) * D : nullptr;
      }
      DIVE_DISPATCH(worker.isa, push_row, push, found, s.rank ? mine.nodes : 0, D, stream + b * D);
      ++row;
    }
  }
}

}  // namespace dive::cpu
