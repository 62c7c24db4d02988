#include "engine/sampler.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

namespace dive::engine {
namespace {

constexpr float kNever = -std::numeric_limits<float>::infinity();

struct Candidate {
  std::int64_t token;
  double weight;  // proportional to its probability
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

double log_of_sum_of_exp(const float* logits, std::int64_t vocabulary, float top) {
  double total = 0;
  for (std::int64_t v = 0; v < vocabulary; ++v) {
    if (logits[v] <= top) total += std::exp(logits[v] - top);
  }
  return top + std::log(total);
}

// The logit of the k-th likeliest token.
float kth_largest(const float* logits, std::int64_t vocabulary, std::int64_t k) {
  std::vector<float> sorted(logits, logits + vocabulary);
  std::replace_if(sorted.begin(), sorted.end(), [](float x) { return std::isnan(x); }, kNever);
  std::nth_element(sorted.begin(), sorted.begin() + (k - 1), sorted.end(), std::greater<float>());
  return sorted[k - 1];
}

std::vector<Candidate> candidates(const Sampling& sampling, const float* logits, std::int64_t vocabulary, float top) {
  float lowest = kNever;
  if (sampling.top_k > 0 && sampling.top_k < vocabulary) lowest = kth_largest(logits, vocabulary, sampling.top_k);
  std::vector<Candidate> kept;
  for (std::int64_t v = 0; v < vocabulary; ++v) {
    if (!(logits[v] >= lowest) || logits[v] == kNever) continue;
    kept.push_back({v, std::exp((logits[v] - top) / sampling.temperature)});
  }
  return kept;
}

// Sorts only as far as the mass asks for: the tokens that matter are mostly few among tens of thousands.
void keep_top_p(std::vector<Candidate>& kept, float top_p) {
  double total = 0, mass = 0;
  for (const Candidate& c : kept) total += c.weight;
  std::size_t sorted = 0;
  for (std::size_t width = 64; sorted < kept.size(); width *= 8) {
    const std::size_t end = std::min(kept.size(), sorted + width);
    if (end < kept.size()) std::nth_element(kept.begin() + sorted, kept.begin() + end, kept.end(), likelier);
    std::sort(kept.begin() + sorted, kept.begin() + end, likelier);
    for (; sorted < end; ++sorted) {
      mass += kept[sorted].weight;
      if (mass >= top_p * total) {
        kept.resize(sorted + 1);
        return;
      }
    }
  }
}

void keep_min_p(std::vector<Candidate>& kept, float min_p) {
  double most = 0;
  for (const Candidate& c : kept) most = std::max(most, c.weight);
  std::erase_if(kept, [&](const Candidate& c) { return c.weight < min_p * most; });
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

}  // namespace

double uniform(std::uint64_t seed, std::uint64_t stream, std::uint64_t step) {
  std::array<std::uint32_t, 4> counter{static_cast<std::uint32_t>(step), static_cast<std::uint32_t>(step >> 32),
                                       static_cast<std::uint32_t>(stream), static_cast<std::uint32_t>(stream >> 32)};
  std::uint32_t key0 = static_cast<std::uint32_t>(seed), key1 = static_cast<std::uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t a = std::uint64_t{0xD2511F53} * counter[0], b = std::uint64_t{0xCD9E8D57} * counter[2];
    counter = {static_cast<std::uint32_t>(b >> 32) ^ counter[1] ^ key0, static_cast<std::uint32_t>(b),
               static_cast<std::uint32_t>(a >> 32) ^ counter[3] ^ key1, static_cast<std::uint32_t>(a)};
    key0 += 0x9E3779B9;
    key1 += 0xBB67AE85;
  }
  const std::uint64_t bits = std::uint64_t{counter[0]} << 32 | counter[1];
  return static_cast<double>(bits >> 11) * 0x1p-53;
}

Choice choose(const Sampling& sampling, float* logits, std::int64_t vocabulary, std::int64_t likeliest,
              const std::vector<std::int64_t>& seen, const std::vector<std::int64_t>& barred, std::uint64_t step,
              bool wants_log_prob) {
  double lse = 0;
  std::vector<std::pair<std::int64_t, float>> changed;
  if (wants_log_prob) lse = log_of_sum_of_exp(logits, vocabulary, logits[likeliest]);
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
  if (sampling.temperature > 0 && logits[token] > kNever) {
    std::vector<Candidate> kept = candidates(sampling, logits, vocabulary, logits[token]);
    if (sampling.top_p < 1) keep_top_p(kept, sampling.top_p);
    if (sampling.min_p > 0) keep_min_p(kept, sampling.min_p);
    // An infinite logit leaves no weights to draw by.
    if (!kept.empty() && std::isfinite(logits[token])) {
      token = draw(kept, uniform(sampling.seed, sampling.stream, step));
    }
  }
  float logit = logits[token];
  for (auto it = changed.rbegin(); it != changed.rend(); ++it) {
    if (it->first == token) logit = it->second;
  }
  return {token, static_cast<float>(logit - lse)};
}

}  // namespace dive::engine
