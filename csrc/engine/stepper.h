// What the decoding loop asks of a device: one token more for a few rows, or many, where it has a loop of its own.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#include "engine/kv_cache.h"
#include "engine/sampler.h"

namespace dive::engine {

struct StepRow {
  std::int64_t token;     // the one to run
  std::int64_t position;  // of this token in the cache: as many positions lie before it
  std::int64_t rope_position;
  const KvCache* cache;
  const std::vector<int>* adapters;  // indices into Plan::adapters, in the order in which they act
};

// EOS ids of a row that a device's loop can look for.
inline constexpr std::size_t kMostLoopEos = 16;

// A row that a device takes further by itself: how its tokens are chosen, and when it ends.
struct LoopRow {
  StepRow row;  // with room in its cache for all steps
  const Sampling* sampling;
  const std::vector<std::int64_t>* seen;  // see choose()
  const std::vector<std::int64_t>* eos;   // at most kMostLoopEos
  std::int64_t done, barred, most;  // tokens that it has; below `barred` of them no EOS comes, with `most` it ends
  bool wants_log_prob;
};

class Stepper {
 public:
  virtual ~Stepper() = default;

  // Where it wants caches to lie; the session's caches are given back before the stepper goes.
  virtual CacheMemory& memory() { return host_memory(); }

  // Runs every row's token, which adds it to its cache, and calls with_logits(row, logits [V], the first index of the
  // largest) once for every row, perhaps from several threads at once. The logits may be changed. A row's result does
  // not depend on the others.
  virtual void step(const std::vector<StepRow>& rows,
                    const std::function<void(std::size_t row, float* logits, std::int64_t likeliest)>& with_logits) = 0;

  // The steps that loop() can take at a time; 0: it has no such loop.
  virtual int most_loop_steps() const { return 0; }

  // Where the loop runs, in words.
  virtual const char* loop_form() const { return "on the host"; }

  // Takes as many steps, fewer where a row ends before: that step is the last. taken(choices [rows]) is called once for
  // every step, in order, at the latest when the loop has ended; wants_stop() now and then, and where it is true the
  // loop ends within a step. Both on this thread; neither may throw.
  virtual void loop(const std::vector<LoopRow>&, int, const std::function<void(const Choice*)>&,
                    const std::function<bool()>&) {}
};

}  // namespace dive::engine
