// Steering within a decoding step: rows with the same adapter go through its two matrices together.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/decode.h"
#include "engine/plan.h"
#include "engine/stepper.h"

namespace dive::cpu {

enum class SteerPlace { kAttention, kBlock };

class StepSteering {
 public:
  StepSteering(const engine::Plan& plan, int max_rows, int threads);

  // Which rows of the coming step share which adapter.
  void group(const std::vector<engine::StepRow>& rows);

  // Steers `stream` [B][D], every worker's own copy of the same numbers. Workers meet inside.
  void apply(const Worker& worker, std::size_t layer, SteerPlace place, float* stream);

 private:
  struct Group {
    int adapter;
    std::vector<int> rows;
  };

  // Every worker's own: the group's rows, their inputs, factors and activations.
  struct Private {
    std::vector<float> states, inputs, inner;
  };

  void steer(const Worker& worker, const engine::Steering& steering, const std::vector<int>& rows, float* stream);

  const engine::Plan& plan_;
  std::vector<float> ones_;
  std::vector<Group> groups_;
  std::vector<Private> private_;
  std::vector<float> inner_, push_;  // shared: [B][R], [B][D]
};

}  // namespace dive::cpu
