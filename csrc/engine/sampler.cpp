#include "engine/sampler.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <utility>
#include <vector>

#include "engine/draws.h"

namespace dive::engine {
namespace {

constexpr float kNever = -std::numeric_limits<float>::infinity();

// The draw walks over sums of this many weights, then over the weights of one of them.
constexpr std::int64_t kBlock = 256;

struct Candidate {
  std::int64_t token;
  float weight;  // proportional to its probability
};

bool likelier(const Candidate& a, const Candidate& b) {
  return a.weight != b.weight ? a.weight > b.weight : a.token < b.token;
}

std::int64_t largest(const float* logits, std::int64_t vocabulary) {
  std::int64_t best = 0;
  for (std::int64_t v = 1; v < vocabulary; ++v) {
    if (logits[v] > logits[best]) best = v;
  }
  return best;
}

// The logit of the k-th likeliest token.
float kth_largest(const float* logits, std::int64_t vocabulary, std::int64_t k) {
  std::vector<float> sorted(logits, logits + vocabulary);
  std::replace_if(sorted.begin(), sorted.end(), [](float x) { return std::isnan(x); }, kNever);
  std::nth_element(sorted.begin(), sorted.begin() + (k - 1), sorted.end(), std::greater<float>());
  return sorted[k - 1];
}

// exp((logit - top) / temperature), 0 below `lowest`; and the sums of blocks of them.
struct Weights {
  std::vector<float> each;
  std::vector<double> blocks;
  double total = 0;

  Weights(const float* logits, std::int64_t vocabulary, float top, float temperature, float lowest)
      : each(vocabulary), blocks((vocabulary + kBlock - 1) / kBlock) {
    const float factor = inverse_of_temperature(temperature);
    for (std::int64_t v = 0; v < vocabulary; ++v) {
      const float weight = exp_of_negative((logits[v] - top) * factor);
      each[v] = logits[v] >= lowest ? weight : 0.0f;
    }
    for (std::size_t b = 0; b < blocks.size(); ++b) {
      const std::int64_t end = std::min<std::int64_t>(vocabulary, (b + 1) * kBlock);
      for (std::int64_t v = b * kBlock; v < end; ++v) blocks[b] += each[v];
      total += blocks[b];
    }
  }
};

// Sorts only as far as the mass asks for: the tokens that matter are mostly few among tens of thousands.
void keep_top_p(std::vector<Candidate>& kept, double wanted) {
  double mass = 0;
  std::size_t sorted = 0;
  for (std::size_t width = 64; sorted < kept.size(); width *= 8) {
    const std::size_t end = std::min(kept.size(), sorted + width);
    if (end < kept.size()) std::nth_element(kept.begin() + sorted, kept.begin() + end, kept.end(), likelier);
    std::sort(kept.begin() + sorted, kept.begin() + end, likelier);
    for (; sorted < end; ++sorted) {
      mass += kept[sorted].weight;
      if (mass >= wanted) {
        kept.resize(sorted + 1);
        return;
      }
    }
  }
}

std::int64_t draw(const std::vector<Candidate>& kept, double u) {
  double total = 0, passed = 0;
  for (const Candidate& c : kept) total += c.weight;
  for (const Candidate& c : kept) {
    passed += c.weight;
    if (passed > u * total) return c.token;
  }
  return kept.back().token;
}

std::int64_t draw(const Weights& weights, double u) {
  const std::int64_t vocabulary = static_cast<std::int64_t>(weights.each.size());
  double passed = 0;
  std::int64_t last = 0;
  for (std::size_t b = 0; b < weights.blocks.size(); ++b) {
    if (passed + weights.blocks[b] <= u * weights.total) {
      passed += weights.blocks[b];
      continue;
    }
    const std::int64_t end = std::min<std::int64_t>(vocabulary, (b + 1) * kBlock);
    for (std::int64_t v = b * kBlock; v < end; ++v) {
      passed += weights.each[v];
      if (weights.each[v] > 0.0f) last = v;
      if (passed > u * weights.total) return v;
    }
  }
  return last;
}

std::int64_t sampled(const Sampling& sampling, const float* logits, std::int64_t vocabulary, float top, double u) {
  float lowest = kNever;
  if (sampling.top_k > 0 && sampling.top_k < vocabulary) lowest = kth_largest(logits, vocabulary, sampling.top_k);
  const Weights weights(logits, vocabulary, top, sampling.temperature, lowest);
  if (sampling.top_p >= 1 && sampling.min_p <= 0) return draw(weights, u);
  // All tokens below this weight together hold less than what top_p leaves out, and the likeliest token weighs 1.
  const double left_out = sampling.top_p < 1 ? (1.0 - sampling.top_p) * weights.total : 0.0;
  const double least = std::max<double>(left_out / vocabulary, sampling.min_p);
  std::vector<Candidate> kept;
  for (std::int64_t v = 0; v < vocabulary; ++v) {
    if (weights.each[v] > 0.0f && weights.each[v] >= least) kept.push_back({v, weights.each[v]});
  }
  if (sampling.top_p < 1) {
    keep_top_p(kept, sampling.top_p * weights.total);
    // Draws walk through the vocabulary in its own order, which a device need not sort for.
    std::sort(kept.begin(), kept.end(), [](const Candidate& a, const Candidate& b) { return a.token < b.token; });
  }
  return draw(kept, u);
}

}  // namespace

double log_sum_exp(const float* logits, std::int64_t vocabulary, float top) {
  double total = 0;
  for (std::int64_t v = 0; v < vocabulary; ++v) {
    if (logits[v] <= top) total += std::exp(logits[v] - top);
  }
  return top + std::log(total);
}

Choice choose(const Sampling& sampling, float* logits, std::int64_t vocabulary, std::int64_t likeliest,
              const std::vector<std::int64_t>& seen, const std::vector<std::int64_t>& barred, std::uint64_t step,
              bool wants_log_prob) {
  double lse = 0;
  std::vector<std::pair<std::int64_t, float>> changed;
  if (wants_log_prob) lse = log_sum_exp(logits, vocabulary, logits[likeliest]);
  const bool penalized = sampling.repetition_penalty != 1.0f;
  const auto change = [&](std::int64_t token, float value) {
    if (wants_log_prob) changed.emplace_back(token, logits[token]);
    logits[token] = value;
  };
  if (penalized) {
    for (const std::int64_t token : seen) {
      const float x = logits[token];
      change(token, x < 0 ? x * sampling.repetition_penalty : x / sampling.repetition_penalty);
    }
  }
  for (const std::int64_t token : barred) change(token, kNever);
  std::int64_t token = penalized || !barred.empty() ? largest(logits, vocabulary) : likeliest;
  // An infinite logit, or nothing but barred tokens, leaves no weights to draw by.
  if (sampling.temperature > 0 && std::isfinite(logits[token])) {
    token = sampled(sampling, logits, vocabulary, logits[token], uniform(sampling.seed, sampling.stream, step));
  }
  float logit = logits[token];
  for (auto it = changed.rbegin(); it != changed.rend(); ++it) {
    if (it->first == token) logit = it->second;
  }
  return {token, static_cast<float>(logit - lse)};
}

}  // namespace dive::engine
