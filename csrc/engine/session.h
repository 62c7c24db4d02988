// The decoding loop: requests in, tokens out. Finished rows leave the batch at once and waiting requests take their
// place; a request's tokens depend on nothing but itself.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "engine/kv_cache.h"
#include "engine/plan.h"
#include "engine/request.h"
#include "engine/stepper.h"
#include "engine/task.h"

namespace dive::engine {

class Session {
 public:
  // At most `max_rows` rows run at the same time. The plan must outlive the session.
  Session(const Plan& plan, std::unique_ptr<Stepper> stepper, int max_rows);

  // Takes a copy of the prompt's keys and values. Returns the number of its first result; the others, one per stream,
  // follow. Numbers count from 0.
  std::int64_t submit(Request request, const std::vector<PrefilledLayer>& layers);

  // Called on the thread of run(): `token` after every token of a sampled row; `poll` now and then, which may throw to
  // end the run.
  struct Callbacks {
    std::function<void(std::int64_t result, std::int64_t token)> token;
    std::function<void()> poll;
  };

  // Runs until no request is left or, if `until_free` is not 0, until that many rows have nothing to do. Behind a
  // callback that threw, a further run goes on where this one ended.
  void run(const Callbacks& callbacks, int until_free);

  // From any thread: the run under way ends within a step, and its unfinished requests are cancelled.
  void cancel() { cancelled_.store(true, std::memory_order_relaxed); }

  // The outcome so far; finished requests give theirs away.
  Result take(std::int64_t result);

  std::int64_t steps() const { return steps_; }
  // Rows run in all steps together.
  std::int64_t rows_run() const { return rows_run_; }
  const BlockPool& pool() const { return pool_; }
  const char* loop_form() const { return stepper_->loop_form(); }

 private:
  class Poll;

  void check_results(const Request& request) const;
  void admit();
  void step();
  bool loops() const;
  void loop(const Callbacks& callbacks, Poll& poll);
  void cancel_all();

  const Plan& plan_;
  std::unique_ptr<Stepper> stepper_;
  const int max_rows_;
  std::atomic<bool> cancelled_{false};
  BlockPool pool_;
  std::deque<Result> results_;  // tasks point into it
  std::deque<std::unique_ptr<Task>> waiting_;
  std::vector<std::unique_ptr<Task>> active_;
  int rows_taken_ = 0;  // by the active tasks
  Told told_;
  std::vector<StepRow> step_rows_;
  std::vector<std::pair<Task*, std::size_t>> owners_;  // of the rows of a step
  std::int64_t steps_ = 0, rows_run_ = 0;
};

}  // namespace dive::engine
