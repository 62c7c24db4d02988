// The engine without Python, for sanitizers: `make sanitize`. Small random decoders with every feature run at every
// instruction-set level of this machine. Every tensor is an allocation of its own and of its exact size, so that the
// address sanitizer sees a read one element too far. What the numbers should be is for the tests in Python to say;
// here they must be finite and the same, to the bit, however the work is divided.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <new>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "cpu/decode.h"
#include "cpu/isa.h"
#include "cpu/step.h"
#include "engine/check.h"
#include "engine/plan.h"
#include "engine/session.h"
#include "engine/stop_strings.h"
#include "tests/random_decoder.h"

namespace {

using namespace dive::engine;
using namespace random_decoder;
using dive::cpu::Isa;

struct Team {
  int rows, threads;
  Isa isa;
};

Session session_of(const Model& model, Team team) {
  return Session(model.plan, dive::cpu::make_stepper(model.plan, team.rows, team.threads, team.isa), team.rows);
}

// The prompt's cache lives only until it was handed over.
void submit(Session& session, const Model& model, Request request) {
  const Plan& plan = model.plan;
  Random random{std::mt19937_64(request.streams[0])};
  Memory memory;
  std::vector<PrefilledLayer> layers;
  for (std::size_t l = 0; request.prefilled > 0 && l < plan.layers.size(); ++l) {
    const std::int64_t stride = plan.head_size + random.below(3), head_stride = request.prefilled * stride;
    const std::int64_t count = (plan.kv_heads - 1) * head_stride + (request.prefilled - 1) * stride + plan.head_size;
    const void* keys = memory.elements(random, count, plan.cache_dtype, 1);
    layers.push_back({keys, memory.elements(random, count, plan.cache_dtype, 1), head_stride, stride, head_stride, stride});
  }
  session.submit(std::move(request), layers);
}

// Every way of choosing tokens, prompts of several cache blocks and of one token, every combination of adapters. Among
// each five are one of three results, one that stop strings end and, if there are tokens enough, a search.
std::vector<Request> requests_for(const Model& model, int count) {
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

std::vector<Result> taken(Session& session, const std::vector<Request>& requests) {
  std::vector<Result> results;
  for (const Request& request : requests) {
    for (std::size_t i = 0; i < request.streams.size(); ++i) {
      results.push_back(session.take(static_cast<std::int64_t>(results.size())));
    }
  }
  return results;
}

std::vector<Result> decode(const Model& model, const std::vector<Request>& requests, Team team) {
  Session session = session_of(model, team);
  for (const Request& request : requests) submit(session, model, request);
  session.run({}, 0);
  return taken(session, requests);
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
}

bool same(const std::vector<Result>& a, const std::vector<Result>& b) {
  bool equal = a.size() == b.size();
  for (std::size_t i = 0; equal && i < a.size(); ++i) {
    equal = a[i].tokens == b[i].tokens && same_bits(a[i].log_probs, b[i].log_probs) && a[i].finish == b[i].finish;
  }
  return equal;
}

const std::vector<Isa>& levels() {
  static const std::vector<Isa> usable = dive::cpu::usable_isas();
  return usable;
}

constexpr int kModels = 32;

void tokens_do_not_depend_on_the_team_or_the_batch() {
  for (int seed = 0; seed < kModels; ++seed) {
    const Model model(seed);
    const std::vector<Request> requests = requests_for(model, 6);
    // The portable kernels hide nothing from a sanitizer, masked loads of the others do; so half of all models run there.
    const Isa isa = levels()[seed % 2 ? seed / 2 % levels().size() : 0];
    const std::string where = "model " + std::to_string(seed) + ", " + dive::cpu::isa_name(isa);
    const std::vector<Result> found = decode(model, requests, {3, 1, isa});
    for (const Result& result : found) {
      expect(result.finish != Finish::kUnfinished && !result.tokens.empty(), where + ": a request did not end");
      for (const std::int64_t t : result.tokens) expect(t >= 0 && t < model.plan.vocabulary, where + ": a token is none");
      for (const float p : result.log_probs) expect(std::isfinite(p), where + ": a log-probability is not finite");
    }
    expect(same(found, decode(model, requests, {4, 2, isa})), where + ": two threads differ");
    expect(same(found, decode(model, requests, {11, 3, isa})), where + ": three threads and all rows at once differ");
  }
}

void logits_are_bit_equal_for_all_teams() {
  for (const Isa isa : levels()) {
    for (int seed = 100; seed < 106; ++seed) {
      const Model model(seed);
      const std::int64_t V = model.plan.vocabulary, steps = 5;
      std::vector<Request> requests = requests_for(model, 4);
      for (Request& request : requests) {
        request.max_new_tokens = steps + 3;
        request.min_new_tokens = 0;
        request.search = {};
        request.streams.resize(1);
        for (std::int64_t i = 0; i < steps; ++i) request.forced.push_back((7 * i + 1) % V);
      }
      std::vector<float> before;
      for (const int threads : {1, 2, 4}) {
        std::vector<float> logits(requests.size() * steps * V);
        for (std::size_t i = 0; i < requests.size(); ++i) requests[i].forced_logits = logits.data() + i * steps * V;
        const std::vector<Result> found = decode(model, requests, {threads, threads, isa});
        for (const Result& result : found) {
          expect(std::equal(requests[0].forced.begin(), requests[0].forced.end(), result.tokens.begin()),
                 "forced tokens were not taken");
        }
        for (const float x : logits) expect(std::isfinite(x), "a logit is not finite");
        expect(before.empty() || same_bits(before, logits), "logits depend on the number of threads");
        before = logits;
      }
    }
  }
}

void a_callback_that_throws_ends_the_run_and_nothing_else() {
  const Model model(1);
  const std::vector<Request> requests = requests_for(model, 7);
  const std::vector<Result> expected = decode(model, requests, {4, 2, levels().back()});
  Session session = session_of(model, {4, 2, levels().back()});
  for (const Request& request : requests) submit(session, model, request);
  int calls = 0, thrown = 0;
  Session::Callbacks callbacks;
  callbacks.token = [&](std::int64_t, std::int64_t) {
    if (++calls % 3 == 0) throw std::runtime_error("enough");
  };
  for (bool done = false; !done;) {
    try {
      session.run(callbacks, 0);
      done = true;
    } catch (const std::runtime_error&) {
      ++thrown;
    }
  }
  expect(thrown > 3, "the callback's exception did not arrive");
  expect(same(expected, taken(session, requests)), "interrupted runs give other tokens");
}

void an_unfinished_outcome_is_a_copy() {
  const Model model(2);
  std::vector<Request> requests = requests_for(model, 2);
  requests[0].eos.clear(), requests[1].eos.clear();
  requests[0].max_new_tokens = 5, requests[1].max_new_tokens = 40;
  requests[0].min_new_tokens = requests[1].min_new_tokens = 0;
  Session session = session_of(model, {2, 2, levels().back()});
  for (const Request& request : requests) submit(session, model, request);
  session.run({}, 1);
  const Result early = session.take(1);
  expect(early.finish == Finish::kUnfinished && early.tokens.size() == 5, "the outcome so far is not what it should be");
  session.run({}, 0);
  const Result late = session.take(1);
  expect(late.tokens.size() == 40 && std::equal(early.tokens.begin(), early.tokens.end(), late.tokens.begin()),
         "a look at the outcome changed it");
}

void another_thread_cancels() {
  const Model model(3);
  for (int turn = 0; turn < 5; ++turn) {
    Session session = session_of(model, {3, 2, levels().back()});
    // Rows under way and waiting ones, or a search that has not begun.
    const std::vector<Request> requests = requests_for(model, turn % 2 ? 3 : 5);
    for (Request request : requests) {
      request.eos.clear();
      request.stop = nullptr;
      request.max_new_tokens = 1 << 20;
      submit(session, model, std::move(request));
    }
    std::atomic<bool> begun{false};
    std::thread other([&] {
      while (!begun) std::this_thread::yield();
      session.cancel();
    });
    Session::Callbacks callbacks;
    callbacks.token = [&](std::int64_t, std::int64_t) { begun = true; };
    session.run(callbacks, 0);
    other.join();
    for (const Result& result : taken(session, requests)) {
      expect(result.finish == Finish::kCancelled, "a request was not cancelled");
    }
  }
}

void sessions_of_two_threads_take_turns() {
  const Model model(4);
  const std::vector<Request> requests = requests_for(model, 4);
  const std::vector<Result> expected = decode(model, requests, {3, 1, levels().back()});
  std::vector<Result> found[2];
  std::thread other([&] { found[0] = decode(model, requests, {5, 3, levels().back()}); });
  found[1] = decode(model, requests, {4, 2, levels().back()});
  other.join();
  expect(same(expected, found[0]) && same(expected, found[1]), "sessions disturb each other");
}

void exceptions_of_workers_arrive() {
  for (const int thrower : {0, 1, 2}) {
    bool arrived = false;
    try {
      dive::cpu::run_team(3, levels().back(), [&](const dive::cpu::Worker& worker) {
        worker.sync();
        if (worker.index == thrower) throw std::bad_alloc();
      });
    } catch (const std::bad_alloc&) {
      arrived = true;
    }
    expect(arrived, "a worker's exception did not arrive");
  }
}

void refused(const std::string& part, const std::function<void()>& body) {
  try {
    body();
  } catch (const std::invalid_argument& error) {
    expect(std::string(error.what()).find(part) != std::string::npos, part + ": the message is " + error.what());
    return;
  }
  expect(false, part + ": was not refused");
}

void bad_plans_are_refused() {
  const Model model(5);
  const auto bad = [&](const std::string& part, const std::function<void(Plan&)>& change) {
    Plan plan = model.plan;
    change(plan);
    refused(part, [&] { check(plan); });
  };
  constexpr std::int64_t kHuge = std::int64_t{1} << 62;
  bad("hidden_size", [](Plan& p) { p.hidden_size = 0; });
  bad("hidden_size", [](Plan& p) { p.hidden_size = kHuge; });
  bad("vocabulary", [](Plan& p) { p.vocabulary = -1; });
  bad("rows of the embedding", [](Plan& p) { p.vocabulary += 1; });
  bad("kv_heads", [](Plan& p) { p.kv_heads = 0; });
  bad("head_size", [](Plan& p) { p.head_size += 1; });
  bad("heads * head_size", [](Plan& p) { p.heads = p.head_size = 1 << 30; });
  bad("layer 0: q_proj is [", [](Plan& p) { p.layers[0].q_proj.rows += 1; });
  bad("layer 0: down_proj is [", [](Plan& p) { p.layers[0].down_proj.columns = kHuge; });
  bad("layer 0: k_proj has no data", [](Plan& p) { p.layers[0].k_proj.data = nullptr; });
  bad("the head row stride", [](Plan& p) { p.head.row_stride = p.hidden_size - 1; });
  bad("row stride", [](Plan& p) { p.layers[0].gate_proj.row_stride = kHuge; });
  bad("dtype", [](Plan& p) { p.layers[0].up_proj.dtype = static_cast<DType>(3); });
  bad("aligned", [](Plan& p) {
    p.head.dtype = DType::kFloat32;
    p.head.scales = nullptr;
    p.head.data = static_cast<const char*>(p.head.data) + 2;
  });
  bad("end of memory", [](Plan& p) { p.final_norm.weight = reinterpret_cast<const float*>(~std::uintptr_t{3}); });
  bad("the final norm has no data", [](Plan& p) { p.final_norm.weight = nullptr; });
  bad("eps", [](Plan& p) { p.final_norm.eps = std::nanf(""); });
  bad("eps", [](Plan& p) { p.layers[0].input.eps = -1; });
  bad("layer 0: rope", [](Plan& p) { p.layers[0].rope = static_cast<int>(p.ropes.size()); });
  bad("layer 0: window", [](Plan& p) { p.layers[0].window = -1; });
  bad("number of frequencies", [](Plan& p) { p.ropes[0].inverse_frequency.pop_back(); });
  bad("frequency", [](Plan& p) { p.ropes[0].inverse_frequency[0] = INFINITY; });
  bad("activation", [](Plan& p) { p.activation = static_cast<dive::cpu::GatedActivation>(-1); });
  bad("cache_dtype", [](Plan& p) { p.cache_dtype = static_cast<DType>(9); });
  bad("attention_scale", [](Plan& p) { p.attention_scale = INFINITY; });
  bad("logit_softcap", [](Plan& p) { p.logit_softcap = -1; });
  bad("number of layers", [](Plan& p) { p.layers.clear(); });
  const auto bad_steering = [&](const std::string& part, const std::function<void(Plan&, Steering&)>& change) {
    bad(part, [&](Plan& p) {
      p.adapters.assign(1, {});
      p.adapters[0].attention.resize(p.layers.size());
      p.adapters[0].block.resize(p.layers.size());
      p.adapters[0].block.back() = Steering{};
      change(p, *p.adapters[0].block.back());
    });
  };
  bad_steering("number of layers", [](Plan& p, Steering&) { p.adapters[0].attention.pop_back(); });
  bad_steering("rank", [](Plan&, Steering& s) { s.rank = -1; });
  bad_steering("matrices is [0, 0]", [](Plan&, Steering& s) { s.rank = 4; });
  bad_steering("gaps", [](Plan& p, Steering& s) {
    s.rank = 1;
    const std::int64_t padded = (p.hidden_size + dive::cpu::kRankPanel - 1) / dive::cpu::kRankPanel * dive::cpu::kRankPanel;
    s.matrices = {p.final_norm.weight, DType::kFloat32, nullptr, 2, padded, padded + 1, nullptr};
  });
  bad_steering("activation", [](Plan&, Steering& s) { s.activation = static_cast<dive::cpu::Activation>(5); });
  for (const auto& [rows, threads] : {std::pair{0, 1}, {65, 1}, {1, 0}, {1, -1}, {1, 1 << 20}}) {
    refused(rows == 1 ? "threads" : "max_rows", [&, rows = rows, threads = threads] {
      dive::cpu::make_stepper(model.plan, rows, threads, levels()[0]);
    });
  }
}

void bad_requests_are_refused() {
  const Model model(6);
  Session session = session_of(model, {2, 1, levels().back()});
  const auto bad = [&](const std::string& part, const std::function<void(Request&)>& change) {
    Request request;
    request.prompt = {1};
    request.streams = {0};
    change(request);
    refused(part, [&] { session.submit(request, {}); });
  };
  bad("prompt", [](Request& r) { r.prompt.clear(); });
  bad("prompt", [&](Request& r) { r.prompt = {model.plan.vocabulary}; });
  bad("eos", [](Request& r) { r.eos = {-1}; });
  bad("adapter", [](Request& r) { r.adapters = {99}; });
  bad("max_new_tokens", [](Request& r) { r.max_new_tokens = 0; });
  bad("max_new_tokens", [](Request& r) { r.max_new_tokens = std::int64_t{1} << 40; });
  bad("min_new_tokens", [](Request& r) { r.min_new_tokens = 2; });
  bad("forced tokens", [](Request& r) { r.forced = {1, 1}; });
  bad("prefilled", [](Request& r) { r.prefilled = -1; });
  bad("prefilled layers", [](Request& r) { r.prefilled = 3; });
  bad("rope_offset", [](Request& r) { r.rope_offset = std::int64_t{1} << 62; });
  bad("temperature", [](Request& r) { r.sampling.temperature = std::nanf(""); });
  bad("top_k", [](Request& r) { r.sampling.top_k = -1; });
  bad("top_p", [](Request& r) { r.sampling.top_p = 0; });
  bad("min_p", [](Request& r) { r.sampling.min_p = 1.5f; });
  bad("beams", [](Request& r) { r.search.beams = 0; });
  bad("beams", [](Request& r) { r.search.beams = 3; });
  bad("results", [](Request& r) { r.streams.clear(); });
  bad("length_penalty", [](Request& r) { r.search.length_penalty = INFINITY; });
  bad("stop", [](Request& r) { r.stop = std::make_shared<StopStrings>(); });
  bad("stop", [](Request& r) {
    r.stop = std::make_shared<StopStrings>(StopStrings{std::make_shared<TokenTexts>(), {""}});
  });
  bad("repetition_penalty", [](Request& r) { r.sampling.repetition_penalty = 0; });
  Request request;
  request.prompt = {1};
  request.streams = {0};
  request.prefilled = 2;
  refused("keys has no data", [&] {
    session.submit(request, std::vector<PrefilledLayer>(model.plan.layers.size(), {nullptr, nullptr, 0, 64, 0, 64}));
  });
  session.run({}, 0);
  expect(session.steps() == 0, "a refused request ran");
}

}  // namespace

int main() {
  const std::pair<const char*, void (*)()> tests[] = {
      {"tokens do not depend on the team or the batch", tokens_do_not_depend_on_the_team_or_the_batch},
      {"logits are bit-equal for all teams", logits_are_bit_equal_for_all_teams},
      {"a callback that throws ends the run and nothing else", a_callback_that_throws_ends_the_run_and_nothing_else},
      {"an unfinished outcome is a copy", an_unfinished_outcome_is_a_copy},
      {"another thread cancels", another_thread_cancels},
      {"sessions of two threads take turns", sessions_of_two_threads_take_turns},
      {"exceptions of workers arrive", exceptions_of_workers_arrive},
      {"bad plans are refused", bad_plans_are_refused},
      {"bad requests are refused", bad_requests_are_refused},
  };
  for (const Isa isa : levels()) std::printf("level %s\n", dive::cpu::isa_name(isa));
  for (const auto& [name, test] : tests) {
    const auto start = std::chrono::steady_clock::now();
    test();
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    std::printf("%5.1f s  %s\n", seconds.count(), name);
    std::fflush(stdout);
  }
}
