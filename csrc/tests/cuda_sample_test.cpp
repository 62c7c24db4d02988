// The device's sampler beside the host's, without a GPU: the same token for the same logits, in every way of choosing.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "cuda/kernels.h"
#include "cuda_on_host/control.h"
#include "engine/sampler.h"
#include "tests/random_decoder.h"

namespace {

using namespace dive::cuda;
using dive::engine::Choice;
using dive::engine::Sampling;
using random_decoder::expect;
using random_decoder::Random;

constexpr int kRows = 3;

struct Case {
  Sampling sampling;
  std::vector<std::int64_t> seen, eos;
  std::int64_t done, barred, most;
  std::vector<float> logits;
  bool wants_log_prob;
};

// Logits with ties, in a few widths; every option now and then, at its extremes too.
Case random_case(Random& random, std::int64_t V) {
  Case c;
  const float spread = random.coin() ? 8 : random.coin() ? 0.5f : 60;
  const bool ties = random.below(3) == 0;
  for (std::int64_t v = 0; v < V; ++v) {
    const float x = random.number(0, spread);
    c.logits.push_back(ties ? std::round(x) : x);
  }
  if (random.below(6) == 0) c.logits[random.below(V)] = -INFINITY;
  if (random.below(12) == 0) std::fill(c.logits.begin(), c.logits.end(), 1.5f);
  Sampling& s = c.sampling;
  const float temperatures[] = {0, 0.3f, 1, 2.5f, 1e-42f};
  s.temperature = temperatures[random.below(5)];
  if (random.coin()) s.top_k = 1 + random.below(V + 3);
  const float shares[] = {1, 0.9f, 0.5f, 1e-6f, 0.999999f};
  s.top_p = shares[random.below(5)];
  if (random.below(3) == 0) s.min_p = random.coin() ? 0.05f : 1.0f;
  if (random.below(3) == 0) s.repetition_penalty = random.coin() ? 1.4f : 0.8f;
  s.seed = static_cast<std::uint64_t>(random.bits());
  s.stream = static_cast<std::uint64_t>(random.below(100));
  if (s.repetition_penalty != 1.0f) {
    for (std::int64_t n = random.below(V + 1); n > 0; --n) c.seen.push_back(random.below(V));
    std::sort(c.seen.begin(), c.seen.end());
    c.seen.erase(std::unique(c.seen.begin(), c.seen.end()), c.seen.end());
  }
  for (std::int64_t n = random.below(4); n > 0; --n) c.eos.push_back(random.below(V));
  c.done = random.below(50);
  c.barred = c.done + random.below(3) - 1;
  c.most = c.done + 1 + random.below(2);
  c.wants_log_prob = random.coin();
  return c;
}

Chooser chooser_of(const Case& c) {
  Chooser chooser{};
  chooser.temperature = c.sampling.temperature;
  chooser.top_p = c.sampling.top_p;
  chooser.min_p = c.sampling.min_p;
  chooser.repetition_penalty = c.sampling.repetition_penalty;
  chooser.top_k = c.sampling.top_k;
  chooser.seed = c.sampling.seed;
  chooser.stream = c.sampling.stream;
  chooser.done = c.done;
  chooser.barred = c.barred;
  chooser.most = c.most;
  std::copy(c.eos.begin(), c.eos.end(), chooser.eos);
  chooser.eos_count = static_cast<std::int32_t>(c.eos.size());
  chooser.wants_log_prob = c.wants_log_prob;
  return chooser;
}

// The host's, with what it needs to know of the logits.
Choice expected(const Case& c) {
  static const std::vector<std::int64_t> none;
  std::vector<float> logits = c.logits;
  const std::int64_t likeliest = std::max_element(logits.begin(), logits.end()) - logits.begin();
  return choose(c.sampling, logits.data(), static_cast<std::int64_t>(logits.size()), likeliest, c.seen,
                c.done < c.barred ? c.eos : none, static_cast<std::uint64_t>(c.done), c.wants_log_prob);
}

void one_step(std::uint64_t seed, std::int64_t V) {
  Random random{std::mt19937_64(seed)};
  std::vector<Case> cases;
  std::vector<float> logits;
  std::vector<std::uint8_t> seen;
  std::vector<Chooser> choosers;
  for (int b = 0; b < kRows; ++b) {
    cases.push_back(random_case(random, V));
    logits.insert(logits.end(), cases[b].logits.begin(), cases[b].logits.end());
    std::vector<std::uint8_t> marks(V);
    for (const std::int64_t token : cases[b].seen) marks[token] = 1;
    seen.insert(seen.end(), marks.begin(), marks.end());
    choosers.push_back(chooser_of(cases[b]));
  }
  choosers.push_back({});  // a row that stands for nothing
  logits.resize(logits.size() + V, NAN);
  seen.resize(seen.size() + V);
  const int batch = kRows + 1;
  std::vector<Row> rows(batch, Row{1, 7, 9});
  std::vector<std::int64_t> likeliest(batch);
  std::vector<Best> pieces(batch * kMostVocabularyPieces);
  std::vector<unsigned> tickets(batch + 1);
  std::vector<Told> told(batch);
  LoopState state{0, 5, 0};
  Progress progress{0, 0};
  std::int32_t wanted_stop = seed % 7 == 0;
  dive_host_cuda_seed(seed);
  expect(finish(nullptr, {logits.data(), V, 0, pieces.data(), tickets.data(), likeliest.data()}, batch) == cudaSuccess,
         "finish");
  const Advance arguments{
      rows.data(), choosers.data(), logits.data(),          V,         likeliest.data(), seen.data(), told.data(),
      batch,       &state,          tickets.data() + batch, &progress, &wanted_stop,     0,           false};
  expect(advance(nullptr, arguments, batch) == cudaSuccess, "advance");

  bool ended = false;
  for (int b = 0; b < kRows; ++b) {
    const Case& c = cases[b];
    const std::string where =
        "seed " + std::to_string(seed) + ", V " + std::to_string(V) + ", row " + std::to_string(b);
    const Choice choice = expected(c);
    expect(told[b].token == choice.token,
           where + ": token " + std::to_string(told[b].token) + ", the host's is " + std::to_string(choice.token));
    if (c.wants_log_prob) {
      const bool both_none = std::isinf(choice.log_prob) && choice.log_prob == told[b].log_prob;
      const float error = both_none ? 0 : std::fabs(told[b].log_prob - choice.log_prob);
      expect(error <= 1e-6f * std::max(1.0f, std::fabs(choice.log_prob)), where + ": another log-probability");
    }
    expect(rows[b].token == choice.token && rows[b].position == 8 && rows[b].rope_position == 10, where + ": its row");
    expect(choosers[b].done == c.done + 1 && seen[b * V + choice.token] == 1, where + ": its state");
    ended |= c.done + 1 == c.most || std::find(c.eos.begin(), c.eos.end(), choice.token) != c.eos.end();
  }
  expect(rows[kRows].token == 1 && rows[kRows].position == 7, "a row that stands for nothing was moved");
  expect(state.steps == 1 && progress.steps == 1, "the step was not counted");
  expect(progress.over == (ended || wanted_stop), "the loop's end");
  for (const unsigned ticket : tickets) expect(ticket == 0, "a ticket is left");
}

void frequencies_match_probabilities() {
  const std::int64_t V = 40;
  Random random{std::mt19937_64(3)};
  Case c = random_case(random, V);
  c.sampling = {};
  c.sampling.temperature = 1;
  c.sampling.top_p = 0.8f;
  c.eos.clear(), c.seen.clear(), c.barred = 0;
  for (float& x : c.logits) x = random.number(0, 2);
  // By sorting, in double precision.
  std::vector<std::int64_t> order(V);
  for (std::int64_t v = 0; v < V; ++v) order[v] = v;
  std::sort(order.begin(), order.end(), [&](auto a, auto b) { return c.logits[a] > c.logits[b]; });
  std::vector<double> p(V);
  double total = 0, kept = 0;
  for (std::int64_t v = 0; v < V; ++v) total += p[v] = std::exp(static_cast<double>(c.logits[v]));
  double passed = 0;
  for (const std::int64_t v : order) {
    const bool inside = passed < 0.8f * total;
    passed += p[v];
    if (inside) kept += p[v];
    if (!inside) p[v] = 0;
  }
  const int draws = 4000, batch = 50;
  std::vector<int> counts(V);
  std::vector<std::int64_t> likeliest(batch, order[0]);
  for (int first = 0; first < draws; first += batch) {
    std::vector<float> logits;
    std::vector<Chooser> choosers;
    for (int b = 0; b < batch; ++b) {
      c.done = first + b;
      c.most = c.done + 9;
      choosers.push_back(chooser_of(c));
      logits.insert(logits.end(), c.logits.begin(), c.logits.end());
    }
    std::vector<Row> rows(batch);
    std::vector<Told> told(batch);
    LoopState state{0, 5, 0};
    Progress progress{0, 0};
    const std::int32_t wanted_stop = 0;
    unsigned ticket = 0;
    const Advance arguments{
        rows.data(), choosers.data(), logits.data(), V,         likeliest.data(), nullptr, told.data(),
        batch,       &state,          &ticket,       &progress, &wanted_stop,     0,       false};
    expect(advance(nullptr, arguments, batch) == cudaSuccess, "advance");
    for (const Told& t : told) ++counts[t.token];
  }
  double chi_square = 0;
  int degrees = -1;
  for (std::int64_t v = 0; v < V; ++v) {
    if (p[v] == 0) {
      expect(counts[v] == 0, "a token outside top_p was drawn");
      continue;
    }
    const double wanted = draws * p[v] / kept;
    chi_square += (counts[v] - wanted) * (counts[v] - wanted) / wanted;
    ++degrees;
  }
  // Five standard deviations above its mean.
  expect(chi_square < degrees + 5 * std::sqrt(2.0 * degrees), "chi-square " + std::to_string(chi_square));
}

}  // namespace

int main() {
  if (kThreadSanitizer) {
    for (std::uint64_t seed = 0; seed < 6; ++seed) one_step(seed, 1 + static_cast<std::int64_t>(seed * 61));
    return 0;
  }
  for (std::uint64_t seed = 0; seed < 48; ++seed) one_step(seed, 1 + static_cast<std::int64_t>(seed * seed % 1500));
  for (std::uint64_t seed = 200; seed < 202; ++seed) one_step(seed, 33000);
  frequencies_match_probabilities();
  std::puts("cuda_sample_test: passed");
}
