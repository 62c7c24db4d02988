// What the decoding loop asks of a device: one token more for a few rows.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "engine/kv_cache.h"

namespace dive::engine {

struct StepRow {
  std::int64_t token;     // the one to run
  std::int64_t position;  // of this token in the cache: as many positions lie before it
  std::int64_t rope_position;
  const KvCache* cache;
  const std::vector<int>* adapters;  // indices into Plan::adapters, in the order in which they act
};

class Stepper {
 public:
  virtual ~Stepper() = default;

  // Where it wants caches to lie; the session's caches are given back before the stepper goes.
  virtual CacheMemory& memory() { return host_memory(); }

  // Runs every row's token, which adds it to its cache, and calls with_logits(row, logits [V], the first index of the
  // largest) once for every row, perhaps from several threads at once. The logits may be changed. A row's result does
  // not depend on the others.
  virtual void step(
      const std::vector<StepRow>& rows,
      const std::function<void(std::size_t row, float* logits, std::int64_t likeliest)>& with_logits) = 0;
};

}  // namespace dive::engine
