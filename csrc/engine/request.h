// What is asked of the decoding loop, and what comes back.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "engine/sampler.h"
#include "engine/stop_strings.h"

namespace dive::engine {

struct BeamOptions {
  int beams = 1;             // 1: no search
  float length_penalty = 1;  // hypotheses are ranked by log-probability / tokens^length_penalty
  // When a search with enough finished hypotheses ends: at once; when the best running one is no better as it is; or
  // when it cannot become better.
  enum class Early { kNo, kYes, kNever } early = Early::kNo;
};

struct Request {
  std::vector<std::int64_t> prompt;  // what the repetition penalty sees; the last one is the first to be run
  std::int64_t prefilled = 0;        // positions already computed, all but the last token's
  std::int64_t rope_offset = 0;      // how far rope positions run ahead of the cache's
  std::vector<int> adapters;         // indices into Plan::adapters
  Sampling sampling;
  std::vector<std::uint64_t> streams;  // one result each, drawn from its own stream; a search returns as many results
  BeamOptions search;
  std::vector<std::int64_t> eos;
  std::shared_ptr<const StopStrings> stop;  // null: none
  std::int64_t min_new_tokens = 0, max_new_tokens = 1;
  bool log_probs = false;
  // Tokens to take in place of the sampler's, which go on behind them, and where the logits of those steps go: [n][V].
  std::vector<std::int64_t> forced;
  float* forced_logits = nullptr;
};

enum class Finish { kUnfinished, kEos, kLength, kCancelled, kStop };

struct Result {
  std::vector<std::int64_t> tokens;
  std::vector<float> log_probs;
  Finish finish = Finish::kUnfinished;
};

}  // namespace dive::engine
