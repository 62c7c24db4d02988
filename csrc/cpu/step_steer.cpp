#include "cpu/step_steer.h"

#include <algorithm>
#include <cmath>

namespace dive::cpu {
namespace {

// Keeps the root mean square of a zero row from dividing by zero, as in the steering op.
constexpr float kInputRmsEps = 1e-12f;

float activated(Activation activation, float x) {
  switch (activation) {
    case Activation::kSilu:
      return x / (1.0f + std::exp(-x));
    case Activation::kIdentity:
      return x;
    case Activation::kRelu:
      return x < 0.0f ? 0.0f : x;
    case Activation::kGelu:
      return 0.5f * x * (1.0f + std::erf(x * 0.70710678118654752f));
    case Activation::kTanh:
      return std::tanh(x);
  }
  return x;
}

// Four sums side by side: one would wait for every addition.
float dot(const float* a, const float* b, std::int64_t n) {
  float total[4] = {};
  std::int64_t i = 0;
  for (; i + 4 <= n; i += 4) {
    for (int j = 0; j < 4; ++j) total[j] += a[i + j] * b[i + j];
  }
  for (; i < n; ++i) total[0] += a[i] * b[i];
  return (total[0] + total[1]) + (total[2] + total[3]);
}

// |h| / |h + d|; equal sums give exactly 1.
float kept_length(float before, float after) {
  if (before == after) return 1.0f;
  return std::sqrt(before) / (after > 0.0f ? std::sqrt(after) : 1.0f);
}

}  // namespace

StepSteering::StepSteering(const engine::Plan& plan, int max_rows, int threads)
    : plan_(plan), ones_(plan.hidden_size, 1.0f) {
  if (plan.adapters.empty()) return;
  std::int64_t rank = 0;
  for (const engine::Adapter& adapter : plan.adapters) {
    for (const auto* places : {&adapter.attention, &adapter.block}) {
      for (const auto& steering : *places) rank = std::max(rank, steering ? steering->rank : 0);
    }
  }
  private_.resize(threads);
  for (Private& own : private_) {
    own.states.resize(max_rows * plan.hidden_size);
    own.inputs.resize(max_rows * plan.hidden_size);
    own.inner.resize(max_rows * rank);
  }
  inner_.resize(max_rows * rank);
  push_.resize(max_rows * plan.hidden_size);
}

void StepSteering::group(const std::vector<engine::StepRow>& rows) {
  groups_.clear();
  // Adapters of one row act in its order, so the n-th ones of all rows come before the next.
  for (std::size_t turn = 0;; ++turn) {
    const std::size_t first = groups_.size();
    bool any = false;
    for (std::size_t b = 0; b < rows.size(); ++b) {
      const std::vector<int>& adapters = *rows[b].adapters;
      if (turn >= adapters.size()) continue;
      any = true;
      auto found = std::find_if(groups_.begin() + first, groups_.end(),
                                [&](const Group& group) { return group.adapter == adapters[turn]; });
      if (found == groups_.end()) found = groups_.insert(found, {adapters[turn], {}});
      found->rows.push_back(static_cast<int>(b));
    }
    if (!any) return;
  }
}

void StepSteering::apply(const Worker& worker, std::size_t layer, SteerPlace place, float* stream) {
  for (const Group& group : groups_) {
    const engine::Adapter& adapter = plan_.adapters[group.adapter];
    const auto& steering = (place == SteerPlace::kBlock ? adapter.block : adapter.attention)[layer];
    if (steering) steer(worker, *steering, group.rows, stream);
  }
}

void StepSteering::steer(const Worker& worker, const engine::Steering& steering, const std::vector<int>& rows,
                         float* stream) {
  const std::int64_t D = plan_.hidden_size, R = steering.rank;
  const int M = static_cast<int>(rows.size());
  const Worker alone{0, 1, worker.isa, nullptr};
  Private& own = private_[worker.index];
  if (R) {
    for (int i = 0; i < M; ++i) std::copy_n(stream + rows[i] * D, D, own.states.data() + i * D);
    const float* inputs = own.states.data();
    if (steering.normalize_input) {
      rms_norm(alone, inputs, ones_.data(), kInputRmsEps, M, D, own.inputs.data());
      inputs = own.inputs.data();
    }
    const Weight *down = &steering.down, *up = &steering.up;
    float *inner = inner_.data(), *push = push_.data();
    project(worker, &down, 1, inputs, M, &inner);
    worker.sync();
    std::transform(inner, inner + M * R, own.inner.data(), [&](float x) { return activated(steering.activation, x); });
    project(worker, &up, 1, own.inner.data(), M, &push);
    // The next group's push is written behind a barrier of its own, so this is the last one here.
    worker.sync();
  }
  for (int i = 0; i < M; ++i) {
    float* h = stream + rows[i] * D;
    float scale = steering.alpha;
    if (steering.gate_direction) {
      scale *= 1.0f / (1.0f + std::exp(-(dot(h, steering.gate_direction, D) + steering.gate_offset)));
    }
    const float before = steering.preserve_norm ? dot(h, h, D) : 0.0f;
    for (std::int64_t d = 0; d < D; ++d) {
      const float push = (R ? push_[i * D + d] : 0.0f) + (steering.static_push ? steering.static_push[d] : 0.0f);
      // A push of zero leaves every bit, that of -0 too.
      if (push != 0.0f) h[d] += scale * push;
    }
    if (steering.preserve_norm) {
      const float factor = kept_length(before, dot(h, h, D));
      for (std::int64_t d = 0; d < D; ++d) h[d] *= factor;
    }
  }
}

}  // namespace dive::cpu
