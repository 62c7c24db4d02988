// The engine without Python, for sanitizers: `make sanitize`. Small random decoders with every feature run at every
// instruction-set level of this machine. Every tensor is an allocation of its own and of its exact size, so that the
// address sanitizer sees a read one element too far. What the numbers should be is for the tests in Python to say;
// here they must be finite and the same, to the bit, however the work is divided.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cpu/decode.h"
#include "cpu/isa.h"
#include "engine/session.h"
#include "tests/engine_requests.h"
#include "tests/looping_stepper.h"

namespace {

using namespace dive::engine;
using namespace random_decoder;

constexpr int kModels = 32;

// A session whose device has a loop of so many steps.
Session looping_session(const Model& model, int rows, int steps) {
  auto stepper = dive::cpu::make_stepper(model.plan, rows, 1, levels().back());
  return Session(model.plan, std::make_unique<LoopingStepper>(model.plan, std::move(stepper), steps), rows);
}

void tokens_do_not_depend_on_the_team_or_the_batch() {
  for (int seed = 0; seed < kModels; ++seed) {
    const Model model(seed);
    const std::vector<Request> requests = requests_for(model, 6);
    // The portable kernels hide nothing from a sanitizer, masked loads of the others do; so half of all models run
    // there.
    const Isa isa = levels()[seed % 2 ? seed / 2 % levels().size() : 0];
    const std::string where = "model " + std::to_string(seed) + ", " + dive::cpu::isa_name(isa);
    const std::vector<Result> found = decode(model, requests, {3, 1, isa});
    for (const Result& result : found) {
      expect(result.finish != Finish::kUnfinished && !result.tokens.empty(), where + ": a request did not end");
      for (const std::int64_t t : result.tokens)
        expect(t >= 0 && t < model.plan.vocabulary, where + ": a token is none");
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

// Runs the session to its end under a callback that throws at every third token.
void run_interrupted(Session& session) {
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
}

void a_callback_that_throws_ends_the_run_and_nothing_else() {
  const Model model(1);
  const std::vector<Request> requests = requests_for(model, 7);
  const std::vector<Result> expected = decode(model, requests, {4, 2, levels().back()});
  Session session = session_of(model, {4, 2, levels().back()});
  for (const Request& request : requests) submit(session, model, request);
  run_interrupted(session);
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
  expect(early.finish == Finish::kUnfinished && early.tokens.size() == 5,
         "the outcome so far is not what it should be");
  session.run({}, 0);
  const Result late = session.take(1);
  expect(late.tokens.size() == 40 && std::equal(early.tokens.begin(), early.tokens.end(), late.tokens.begin()),
         "a look at the outcome changed it");
}

void another_thread_cancels() {
  const Model model(3);
  for (int turn = 0; turn < 5; ++turn) {
    const Team team{3, 2, levels().back()};
    Session session = turn < 3 ? session_of(model, team) : looping_session(model, 3, 50);
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

void a_devices_own_loop_gives_the_same_results() {
  for (int seed = 0; seed < kModels; ++seed) {
    const Model model(seed);
    std::vector<Request> requests = requests_for(model, 6);
    // In some models every row can loop, in others some cannot.
    if (seed % 3) {
      for (Request& request : requests) request.stop = nullptr, request.search = {};
    }
    const std::vector<Result> expected = decode(model, requests, {3, 1, levels().back()});
    for (const int steps : {1, 3, 100}) {
      Session session = looping_session(model, 3, steps);
      for (const Request& request : requests) submit(session, model, request);
      std::vector<std::vector<std::int64_t>> told(expected.size());
      Session::Callbacks callbacks;
      callbacks.token = [&](std::int64_t result, std::int64_t token) { told[result].push_back(token); };
      session.run(callbacks, 0);
      const std::string where = "model " + std::to_string(seed) + ", loops of " + std::to_string(steps);
      const std::vector<Result> found = taken(session, requests);
      expect(same(expected, found), where + ": other results");
      for (std::size_t i = 0, result = 0; i < requests.size(); result += requests[i++].streams.size()) {
        if (requests[i].search.beams > 1) continue;
        expect(told[result] == found[result].tokens, where + ": other tokens were told");
      }
    }
  }
}

void a_callback_that_throws_ends_a_devices_loop() {
  const Model model(1);
  std::vector<Request> requests = requests_for(model, 7);
  for (Request& request : requests) request.stop = nullptr, request.search = {};
  const std::vector<Result> expected = decode(model, requests, {4, 2, levels().back()});
  Session session = looping_session(model, 4, 50);
  for (const Request& request : requests) submit(session, model, request);
  run_interrupted(session);
  expect(same(expected, taken(session, requests)), "interrupted loops give other tokens");
}

}  // namespace

int main() {
  for (const Isa isa : levels()) std::printf("level %s\n", dive::cpu::isa_name(isa));
  run_tests({
      {"tokens do not depend on the team or the batch", tokens_do_not_depend_on_the_team_or_the_batch},
      {"logits are bit-equal for all teams", logits_are_bit_equal_for_all_teams},
      {"a callback that throws ends the run and nothing else", a_callback_that_throws_ends_the_run_and_nothing_else},
      {"an unfinished outcome is a copy", an_unfinished_outcome_is_a_copy},
      {"another thread cancels", another_thread_cancels},
      {"sessions of two threads take turns", sessions_of_two_threads_take_turns},
      {"exceptions of workers arrive", exceptions_of_workers_arrive},
      {"a device's own loop gives the same results", a_devices_own_loop_gives_the_same_results},
      {"a callback that throws ends a device's loop", a_callback_that_throws_ends_a_devices_loop},
  });
}
