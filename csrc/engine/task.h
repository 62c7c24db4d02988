// What runs in the batch for a request: a row that is sampled, or the beams of a search.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <unordered_set>
#include <utility>
#include <vector>

#include "engine/kv_cache.h"
#include "engine/plan.h"
#include "engine/request.h"
#include "engine/stepper.h"

namespace dive::engine {

class Task {
 public:
  virtual ~Task() = default;

  virtual int most_rows() const = 0;

  // Adds the rows of the coming step, with room in their caches for one position more.
  virtual void prepare(std::vector<StepRow>& rows) = 0;

  // The step's logits for the row that it added as the index-th. Called for several rows at once from several threads.
  virtual void see(std::size_t index, float* logits, std::int64_t likeliest) = 0;

  // Takes in what was seen; true where the task has ended.
  virtual bool advance() = 0;

  // Whether a device can go on with it for some steps by itself.
  virtual bool loops() const { return false; }

  // Of a task that loops, the steps until it has all its tokens.
  virtual std::int64_t most_steps() const { return 0; }

  // Of a task that loops, its one row, with room in its cache for so many steps.
  virtual LoopRow loop_row(std::int64_t) { return {}; }

  // Of a task that loops: takes in what the device chose; true where the task has ended.
  virtual bool take(const Choice&) { return true; }

  virtual void cancel() = 0;
};

// The distinct tokens of a text, kept only where a repetition penalty needs them.
class SeenTokens {
 public:
  explicit SeenTokens(const Request& request) : wanted_(request.sampling.repetition_penalty != 1.0f) {
    for (const std::int64_t token : request.prompt) add(token);
  }

  void add(std::int64_t token) {
    if (wanted_ && found_.insert(token).second) tokens_.push_back(token);
  }

  const std::vector<std::int64_t>& tokens() const { return tokens_; }

 private:
  bool wanted_;
  std::vector<std::int64_t> tokens_;
  std::unordered_set<std::int64_t> found_;
};

// Candidates that a step of a search looks at: enough for all beams to go on even where each could end in every way.
inline std::size_t candidates_of(const Request& request) {
  return std::max<std::size_t>(2, 1 + request.eos.size()) * request.search.beams;
}

// The tokens of a step: (the result's number, the token) each.
using Told = std::vector<std::pair<std::int64_t, std::int64_t>>;

// One result: the request's stream of that index. It adds its tokens to `told`, which must outlive it like `result`.
std::unique_ptr<Task> sample_row(const Plan& plan, std::shared_ptr<const Request> request, std::size_t stream,
                                 const KvCache& prompt, std::int64_t number, Result* result, Told* told);

// As many results as the request has streams, the best first.
std::unique_ptr<Task> search_beams(const Plan& plan, std::shared_ptr<const Request> request, const KvCache& prompt,
                                   std::vector<Result*> results);

}  // namespace dive::engine
