#include "cpu/step_steer.h"

#include <algorithm>

#include "cpu/step_steer_kernel.h"

namespace dive::cpu {
namespace {

// Multiplications up to which every worker computes a product for itself: some hundred nanoseconds, as much as waiting
// for another one's half takes.
constexpr std::int64_t kLittle = 16384;

// Room for whole vectors of every level.
std::int64_t padded(std::int64_t size) { return (size + 15) / 16 * 16; }

}  // namespace

StepSteering::StepSteering(const engine::Plan& plan, int max_rows, int threads) : plan_(plan) {
  if (plan.adapters.empty()) return;
  for (const engine::Adapter& adapter : plan.adapters) {
    for (const auto* places : {&adapter.attention, &adapter.block}) {
      for (const auto& steering : *places) rank_ = std::max(rank_, steering ? steering->rank : 0);
    }
  }
  private_.resize(threads);
  parts_.resize(threads);
  for (Private& own : private_) {
    own.inputs.resize(max_rows * plan.hidden_size);
    own.inner.resize(max_rows * rank_);
    own.activated.resize(max_rows * rank_);
    own.activated_row.resize(padded(rank_));
    own.products.resize(max_rows * plan.hidden_size);
  }
  inner_.resize(max_rows * rank_);
  products_.resize(max_rows * plan.hidden_size);
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

void StepSteering::apply(const Worker& worker, std::size_t layer, SteerPlace place, float* stream) {
  if (turns_.empty()) return;
  std::vector<Part>& parts = parts_[worker.index];
  for (const std::vector<Group>& groups : turns_) {
    parts.clear();
    for (const Group& group : groups) {
      const engine::Adapter& adapter = plan_.adapters[group.adapter];
      const auto& steering = (place == SteerPlace::kBlock ? adapter.block : adapter.attention)[layer];
      if (steering) parts.push_back({&*steering, &group.rows});
    }
    if (!parts.empty()) steer(worker, parts, stream);
  }
}

// All parts' first products, then all their second ones: workers meet twice however many adapters there are.
void StepSteering::steer(const Worker& worker, const std::vector<Part>& parts, float* stream) {
  const std::int64_t D = plan_.hidden_size;
  Private& own = private_[worker.index];
  std::int64_t multiplications = 0;
  for (const Part& part : parts) multiplications += part.steering->rank * D * static_cast<std::int64_t>(part.rows->size());
  const bool shared = worker.count > 1 && multiplications > kLittle;
  const Worker those = shared ? worker : Worker{0, 1, worker.isa, nullptr};
  float* const inner = shared ? inner_.data() : own.inner.data();
  float* const products = shared ? products_.data() : own.products.data();

  std::int64_t row = 0;  // of all parts' rows, one after the other
  for (const Part& part : parts) {
    const int count = static_cast<int>(part.rows->size());
    if (part.steering->rank) {
      float* const inputs = own.inputs.data() + row * D;
      for (int i = 0; i < count; ++i) {
        const float* h = stream + (*part.rows)[i] * D;
        if (part.steering->normalize_input) {
          DIVE_DISPATCH(worker.isa, normalize_input_row, h, D, inputs + i * D);
        } else {
          std::copy_n(h, D, inputs + i * D);
        }
      }
      const Weight* down = &part.steering->down;
      float* out = inner + row * rank_;
      project(those, &down, 1, inputs, count, &out);
    }
    row += count;
  }
  those.sync();

  row = 0;
  for (const Part& part : parts) {
    const std::int64_t R = part.steering->rank;
    const int count = static_cast<int>(part.rows->size());
    if (R) {
      // Row by row, because rows of R numbers need not be whole vectors.
      for (int i = 0; i < count; ++i) {
        DIVE_DISPATCH(worker.isa, activate_row, part.steering->activation, inner + row * rank_ + i * R, R,
                      own.activated_row.data());
        std::copy_n(own.activated_row.data(), R, own.activated.data() + i * R);
      }
      project_panels(those, part.steering->up, D, R, own.activated.data(), count, products + row * D);
    }
    row += count;
  }
  // Those who write to `products` next have met once more before, so that nothing need stand behind this.
  those.sync();

  row = 0;
  for (const Part& part : parts) {
    const engine::Steering& s = *part.steering;
    const RowPush push{s.static_push, s.alpha, s.gate_direction, s.gate_offset, s.preserve_norm};
    for (const int b : *part.rows) {
      DIVE_DISPATCH(worker.isa, push_row, push, s.rank ? products + row * D : nullptr, D, stream + b * D);
      ++row;
    }
  }
}

}  // namespace dive::cpu
