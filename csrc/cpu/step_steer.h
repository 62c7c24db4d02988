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

  // Steers `stream` [B][D], every worker's own copy of the same numbers. Workers meet inside. `next` is what the worker
  // reads afterwards.
  void apply(const Worker& worker, std::size_t layer, SteerPlace place, float* stream, const void* next);

  // Before what is steered is computed: asks for the vectors of apply(), and says where the worker begins to read
  // there, `next` where it reads nothing.
  const void* first_read(const Worker& worker, std::size_t layer, SteerPlace place, const void* next);

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
    AlignedFloats inputs, products, spare;
    int turn = 0;  // which of the shared products is written next
  };

  // How the pieces of all parts are dealt out: `nodes` sums of `pieces` pieces each, of which this worker computes
  // [begin, end). One node: every worker computes it for itself, and they do not meet.
  struct Division {
    int nodes, pieces, begin, end;
  };

  // A part's products, and what memory is read where the worker's share of its matrices ends.
  struct Job {
    const Part* part;
    Isa isa;
    const float* inputs;  // [rows][D]
    const void* end;
    const void* next;
  };

  void gather(const std::vector<Group>& groups, std::size_t layer, SteerPlace place, std::vector<Part>& parts) const;
  Division division(const Worker& worker, const std::vector<Part>& parts) const;
  static const void* first_read(const Division& mine, const std::vector<Part>& parts, std::size_t part,
                                const void* next);
  void multiply(const Job& job, int first, int count, float* spare, float* out) const;
  void steer(const Worker& worker, const std::vector<Part>& parts, float* stream, const void* next);

  const engine::Plan& plan_;
  const int nodes_;                        // sums that the workers leave
  std::vector<std::vector<Group>> turns_;  // the n-th adapters of all rows, which act before the next
  std::vector<std::vector<Part>> parts_;   // every worker's own
  std::vector<Private> private_;
  AlignedFloats products_[2];  // shared: [nodes][B][D]
};

}  // namespace dive::cpu
