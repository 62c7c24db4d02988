// Steering within a decoding step: rows with the same adapter go through its two matrices together.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/aligned.h"
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

  // A group at one place of one layer.
  struct Part {
    const engine::Steering* steering;
    const std::vector<int>* rows;
  };

  // Every worker's own. Products are there too, for parts so small that each worker computes them whole.
  struct Private {
    AlignedFloats inputs, inner, activated, activated_row, products;
  };

  void steer(const Worker& worker, const std::vector<Part>& parts, float* stream);

  const engine::Plan& plan_;
  std::int64_t rank_ = 0;                  // the largest
  std::vector<std::vector<Group>> turns_;  // the n-th adapters of all rows, which act before the next
  std::vector<std::vector<Part>> parts_;   // every worker's own
  std::vector<Private> private_;
  AlignedFloats inner_, products_;    // shared: [B][R], [B][D]
};

}  // namespace dive::cpu
