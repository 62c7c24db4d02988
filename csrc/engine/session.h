// The decoding loop: requests in, tokens out. Finished rows leave the batch at once and waiting requests take their
// place; a request's tokens depend on nothing but itself.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

#include "engine/kv_cache.h"
#include "engine/plan.h"
#include "engine/sampler.h"
#include "engine/stepper.h"

namespace dive::engine {

// One layer's keys or values of a prompt, [G][positions][E] with the given strides in elements; the last is unit.
struct PrefilledLayer {
  const void *keys, *values;
  std::int64_t keys_head_stride, keys_stride, values_head_stride, values_stride;
};

struct Request {
  std::vector<std::int64_t> prompt;  // what the repetition penalty sees; the last one is the first to be run
  std::int64_t prefilled = 0;        // positions already computed, all but the last token's
  std::int64_t rope_offset = 0;      // how far rope positions run ahead of the cache's
  std::vector<int> adapters;         // indices into Plan::adapters
  Sampling sampling;
  std::vector<std::int64_t> eos;
  std::int64_t min_new_tokens = 0, max_new_tokens = 1;
  bool log_probs = false;
  // Tokens to take in place of the sampler's, which go on behind them, and where the logits of those steps go: [n][V].
  std::vector<std::int64_t> forced;
  float* forced_logits = nullptr;
};

enum class Finish { kUnfinished, kEos, kLength, kCancelled };

struct Result {
  std::vector<std::int64_t> tokens;
  std::vector<float> log_probs;
  Finish finish = Finish::kUnfinished;
};

class Session {
 public:
  // At most `max_rows` requests run at the same time. The plan must outlive the session.
  Session(const Plan& plan, std::unique_ptr<Stepper> stepper, int max_rows);
  ~Session();

  // Takes a copy of the prompt's keys and values; returns the request's number, counted from 0.
  std::int64_t submit(Request request, const std::vector<PrefilledLayer>& layers);

  // Called on the thread of run(): `token` after every token, `poll` now and then, which may throw to end the run.
  struct Callbacks {
    std::function<void(std::int64_t request, std::int64_t token)> token;
    std::function<void()> poll;
  };

  // Runs until no request is left or, if `until_free` is not 0, until that many rows have nothing to do. Behind a
  // callback that threw, a further run goes on where this one ended.
  void run(const Callbacks& callbacks, int until_free);

  // From any thread: the run under way ends within a step, and its unfinished requests are cancelled.
  void cancel() { cancelled_.store(true, std::memory_order_relaxed); }

  // The outcome so far; finished requests give theirs away.
  Result take(std::int64_t request);

  std::int64_t steps() const { return steps_; }
  // Rows run in all steps together.
  std::int64_t rows_run() const { return rows_run_; }

 private:
  struct Row;

  void admit();
  void step();
  void sample(Row& row, float* logits, std::int64_t likeliest);
  bool advance(Row& row);
  void cancel_all();

  const Plan& plan_;
  std::unique_ptr<Stepper> stepper_;
  const int max_rows_;
  std::atomic<bool> cancelled_{false};
  std::deque<std::unique_ptr<Row>> waiting_;
  std::vector<std::unique_ptr<Row>> active_;
  std::vector<StepRow> step_rows_;
  std::vector<std::pair<std::int64_t, std::int64_t>> told_;  // (request, token) of a step
  std::vector<Result> results_;
  std::int64_t steps_ = 0, rows_run_ = 0;
};

}  // namespace dive::engine
