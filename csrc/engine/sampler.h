// From logits to a token.
#pragma once

#include <cstdint>
#include <vector>

namespace dive::engine {

// The order is the one of transformers: repetition penalty, EOS barred below the minimum length, temperature, top-k,
// top-p, min-p.
struct Sampling {
  float temperature = 0;   // 0: the first of the largest logits
  std::int64_t top_k = 0;  // 0: all; ties with the k-th stay
  float top_p = 1;         // the fewest tokens, likeliest first, whose probabilities reach top_p
  float min_p = 0;         // at least this share of the likeliest token's probability
  float repetition_penalty = 1;
  std::uint64_t seed = 0, stream = 0;  // (seed, stream, step) alone decide a draw
};

// log(sum of e^logits); `top` is the largest of them.
double log_sum_exp(const float* logits, std::int64_t vocabulary, float top);

struct Choice {
  std::int64_t token;
  float log_prob;  // of the token under the logits as they came
};

// `logits` [V] may be changed; `likeliest` is the first index of the largest. `seen` holds the tokens that the penalty
// applies to, each once; `barred` those that must not come.
Choice choose(const Sampling& sampling, float* logits, std::int64_t vocabulary, std::int64_t likeliest,
              const std::vector<std::int64_t>& seen, const std::vector<std::int64_t>& barred, std::uint64_t step,
              bool wants_log_prob);

}  // namespace dive::engine
