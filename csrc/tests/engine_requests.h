// Requests of every kind on small random decoders, and sessions that run them, for tests of the loop.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "cpu/isa.h"
#include "cpu/step.h"
#include "engine/session.h"
#include "engine/stop_strings.h"
#include "tests/random_decoder.h"

namespace random_decoder {

using dive::cpu::Isa;

struct Team {
  int rows, threads;
  Isa isa;
};

inline Session session_of(const Model& model, Team team) {
  return Session(model.plan, dive::cpu::make_stepper(model.plan, team.rows, team.threads, team.isa), team.rows);
}

// The prompt's cache lives only until it was handed over.
inline void submit(Session& session, const Model& model, Request request) {
  const Plan& plan = model.plan;
  Random random{std::mt19937_64(request.streams[0])};
  Memory memory;
  std::vector<PrefilledLayer> layers;
  for (std::size_t l = 0; request.prefilled > 0 && l < plan.layers.size(); ++l) {
    const std::int64_t stride = plan.head_size + random.below(3) * model.shape.unit,
                       head_stride = request.prefilled * stride;
    const std::int64_t count = (plan.kv_heads - 1) * head_stride + (request.prefilled - 1) * stride + plan.head_size;
    const void* keys = memory.elements(random, count, plan.cache_dtype, 1);
    layers.push_back(
        {keys, memory.elements(random, count, plan.cache_dtype, 1), head_stride, stride, head_stride, stride});
  }
  session.submit(std::move(request), layers);
}

// Every way of choosing tokens, prompts of several cache blocks and of one token, every combination of adapters. Among
// each five are one of three results, one that stop strings end and, if there are tokens enough, a search.
inline std::vector<Request> requests_for(const Model& model, int count) {
  const Plan& plan = model.plan;
  Random random{std::mt19937_64(7)};
  const auto texts = std::make_shared<TokenTexts>();
  for (std::int64_t v = 0; v < plan.vocabulary; ++v) texts->of.push_back(std::string(1, 'a' + v % 7));
  const auto stop = std::make_shared<StopStrings>(StopStrings{texts, {"ab", "cde", "f"}});
  std::vector<Request> requests;
  for (int i = 0; i < count; ++i) {
    Request request;
    for (std::int64_t n = 1 + random.below(5); n > 0; --n) request.prompt.push_back(random.below(plan.vocabulary));
    request.prefilled = i % 3 == 0 ? 0 : random.below(150);
    request.rope_offset = random.below(20) - 10;
    for (std::size_t a = 0; a < plan.adapters.size(); ++a) {
      if (random.coin()) request.adapters.insert(request.adapters.begin(), static_cast<int>(a));
    }
    Sampling& s = request.sampling;
    s.seed = 5;
    const std::uint64_t stream = 10 * static_cast<std::uint64_t>(i);
    request.streams = {stream};
    if (i % 5 == 2) request.streams = {stream, stream + 1, stream + 2};
    if (i % 5 == 3) request.stop = stop;
    if (i % 4 != 0) {
      s.temperature = i % 4 == 3 ? 1e-42f : 0.8f;
      s.top_k = random.coin() ? 0 : 1 + random.below(plan.vocabulary + 5);
      s.top_p = random.coin() ? 1 : 0.7f;
      s.min_p = random.coin() ? 0 : 0.1f;
    }
    if (random.coin()) s.repetition_penalty = 1.3f;
    if (random.coin()) request.eos = {random.below(plan.vocabulary), random.below(plan.vocabulary)};
    request.max_new_tokens = 1 + random.below(30);
    request.min_new_tokens = random.below(request.max_new_tokens + 1);
    request.log_probs = random.coin();
    if (i % 5 == 4 && plan.vocabulary > 20) {
      request.search = {3, random.number(1, 1), static_cast<BeamOptions::Early>(random.below(3))};
      request.streams = {stream, stream + 1};
    }
    requests.push_back(std::move(request));
  }
  return requests;
}

inline std::vector<Result> taken(Session& session, const std::vector<Request>& requests) {
  std::vector<Result> results;
  for (const Request& request : requests) {
    for (std::size_t i = 0; i < request.streams.size(); ++i) {
      results.push_back(session.take(static_cast<std::int64_t>(results.size())));
    }
  }
  return results;
}

inline std::vector<Result> decode(const Model& model, const std::vector<Request>& requests, Team team) {
  Session session = session_of(model, team);
  for (const Request& request : requests) submit(session, model, request);
  session.run({}, 0);
  return taken(session, requests);
}

inline bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
}

inline bool same(const std::vector<Result>& a, const std::vector<Result>& b) {
  bool equal = a.size() == b.size();
  for (std::size_t i = 0; equal && i < a.size(); ++i) {
    equal = a[i].tokens == b[i].tokens && same_bits(a[i].log_probs, b[i].log_probs) && a[i].finish == b[i].finish;
  }
  return equal;
}

inline const std::vector<Isa>& levels() {
  static const std::vector<Isa> usable = dive::cpu::usable_isas();
  return usable;
}

// Runs the tests one after the other and says how long each took.
inline void run_tests(const std::vector<std::pair<const char*, void (*)()>>& tests) {
  for (const auto& [name, test] : tests) {
    const auto start = std::chrono::steady_clock::now();
    test();
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    std::printf("%5.1f s  %s\n", seconds.count(), name);
    std::fflush(stdout);
  }
}

}  // namespace random_decoder
