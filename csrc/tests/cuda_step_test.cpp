// The CUDA step without a GPU (cuda_on_host/cuda_runtime.h says what that is worth): its logits beside the CPU step's,
// on small random decoders with every feature; and that they depend on nothing but the row.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cpu/isa.h"
#include "cpu/step.h"
#include "cuda/loop.h"
#include "cuda/step.h"
#include "cuda_on_host/control.h"
#include "engine/session.h"
#include "tests/engine_requests.h"
#include "tests/looping_stepper.h"
#include "tests/random_decoder.h"

namespace {

using namespace random_decoder;
using dive::cuda::StepForm;

constexpr int kSteps = kThreadSanitizer ? 2 : 4;

// Rows with prompts of different lengths, behind none, one or several cache blocks, and every combination of adapters.
struct Prompts {
  Memory memory{{.unit = 8, .dtype = DType::kFloat32}};
  std::vector<Request> requests;
  std::vector<std::vector<PrefilledLayer>> layers;
  std::vector<float> logits;

  Prompts(const Model& model, int count, std::uint64_t seed) {
    const Plan& plan = model.plan;
    Random random{std::mt19937_64(seed)};
    logits.resize(static_cast<std::size_t>(count) * kSteps * plan.vocabulary);
    for (int i = 0; i < count; ++i) {
      Request request;
      request.prompt = {random.below(plan.vocabulary)};
      request.prefilled = i % 4 == 0 ? 0 : random.below(i % 4 == 1 ? 300 : 70);
      // More than as many pieces as there can be, of one tile each.
      if (i % 4 == 3 && seed % 4 == 3) request.prefilled = 2048 + random.below(200);
      request.rope_offset = random.below(20) - 10;
      for (std::size_t a = 0; a < plan.adapters.size(); ++a) {
        if (random.coin()) request.adapters.push_back(static_cast<int>(a));
      }
      request.streams = {0};
      request.max_new_tokens = kSteps;
      for (int step = 0; step < kSteps; ++step) request.forced.push_back(random.below(plan.vocabulary));
      request.forced_logits = logits.data() + static_cast<std::size_t>(i) * kSteps * plan.vocabulary;
      std::vector<PrefilledLayer> own;
      for (std::size_t l = 0; request.prefilled > 0 && l < plan.layers.size(); ++l) {
        const std::int64_t stride = plan.head_size, head = request.prefilled * stride, size = plan.kv_heads * head;
        const void* const keys = memory.elements(random, size, plan.cache_dtype, 1);
        own.push_back({keys, memory.elements(random, size, plan.cache_dtype, 1), head, stride, head, stride});
      }
      requests.push_back(std::move(request));
      layers.push_back(std::move(own));
    }
  }

  std::vector<float> decode(const Model& model, std::unique_ptr<Stepper> stepper, int max_rows) {
    std::fill(logits.begin(), logits.end(), NAN);
    Session session(model.plan, std::move(stepper), max_rows);
    for (std::size_t i = 0; i < requests.size(); ++i) session.submit(requests[i], layers[i]);
    session.run({}, 0);
    return logits;
  }
};

Model model_of(std::uint64_t seed, std::int64_t hidden_size = 0, int head_size = 0, int group = 0) {
  const auto dtype = static_cast<DType>(seed % 3);
  return Model(seed, {.unit = 8, .dtype = dtype, .hidden_size = hidden_size, .head_size = head_size, .group = group});
}

// |a - b| over the largest |b|.
double difference(const std::vector<float>& a, const std::vector<float>& b) {
  double largest = 0, error = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    largest = std::max(largest, std::fabs(static_cast<double>(b[i])));
    const double d = std::fabs(static_cast<double>(a[i]) - b[i]);
    error = std::isnan(d) ? INFINITY : std::max(error, d);
  }
  return error / largest;
}

void expect_the_cpu_steps_logits(std::uint64_t seed, int rows, std::int64_t hidden_size = 0, int head_size = 0,
                                 int group = 0) {
  // Where weights have half precision, so have the numbers that they multiply, unlike on the CPU: 2^-9 and 2^-12 a
  // rounding, some tens of them on the way.
  const double allowed[] = {2e-5, 5e-2, 8e-3};
  const Model model = model_of(seed, hidden_size, head_size, group);
  Prompts prompts(model, rows, seed);
  const std::vector<float> expected =
      prompts.decode(model, dive::cpu::make_stepper(model.plan, rows, 1, dive::cpu::best_isa()), rows);
  for (const StepForm form : {StepForm::kBest, StepForm::kPlain}) {
    dive_host_cuda_seed(seed);
    const std::vector<float> found = prompts.decode(model, dive::cuda::make_stepper(model.plan, rows, 0, form), rows);
    const double error = difference(found, expected);
    expect(error <= allowed[seed % 3], "seed " + std::to_string(seed) + ", hidden size " + std::to_string(hidden_size) +
                                           ", head size " + std::to_string(head_size) + ", group " +
                                           std::to_string(group) + (form == StepForm::kBest ? "" : ", plain") +
                                           ": logits differ by " + std::to_string(error));
  }
}

void logits_are_the_cpu_steps() {
  for (std::uint64_t seed = 0; seed < (kThreadSanitizer ? 3 : 12); ++seed) expect_the_cpu_steps_logits(seed, 5);
}

// Sizes that leave the last blocks of a cluster without a column: of 8 blocks, and of 16 in Qwen2.5-0.5B,
// SmolLM2-360M and Gemma3-1B.
void steering_adds_nothing_of_blocks_without_columns() {
  for (const std::int64_t hidden_size : {400, 896, 960, 1152}) expect_the_cpu_steps_logits(0, 2, hidden_size);
}

// Sizes of heads as models have them, larger than those drawn, and more rows. (Of decoders drawn at random, some answer
// a rounding with hundreds of times as much; these do not.)
void heads_and_batches_are_as_large_as_models_have_them() {
  constexpr struct {
    std::uint64_t seed;
    int head_size, rows;
  } kCases[] = {{0, 256, 9}, {1, 64, 16}, {2, 128, 33}, {4, 80, 64}, {6, 96, 17}, {8, 112, 12}};
  for (const auto& [seed, head_size, rows] : kCases) expect_the_cpu_steps_logits(seed, rows, 0, head_size);
}

// Query heads that share keys and values: more of them than are drawn, as in Qwen2.5 and Llama; and on a device whose
// blocks have too little memory for the form that takes eight at a time.
void many_heads_share_keys_and_values() {
  for (const std::size_t shared : {std::size_t{99} << 10, std::size_t{227} << 10}) {
    dive_host_cuda_device().sharedMemPerBlockOptin = shared;
    expect_the_cpu_steps_logits(1, 3, 0, 64, 7);
    expect_the_cpu_steps_logits(2, 2, 0, 128, 8);
    expect_the_cpu_steps_logits(4, 2, 0, 256, 6);
  }
}

void logits_depend_on_the_row_alone() {
  for (std::uint64_t seed = 0; seed < 3; ++seed) {
    const Model model = model_of(seed);
    Prompts prompts(model, 11, seed);
    const std::vector<float> together = prompts.decode(model, dive::cuda::make_stepper(model.plan, 11, 0), 11);
    dive_host_cuda_seed(seed + 100);
    const std::vector<float> apart = prompts.decode(model, dive::cuda::make_stepper(model.plan, 2, 0), 2);
    const bool same = std::memcmp(together.data(), apart.data(), together.size() * sizeof(float)) == 0;
    expect(same, "seed " + std::to_string(seed) + ": logits depend on the batch or on the order of threads");
  }
}

// Whose adapters are one, beside those of rows that have more of them in turn.
void logits_do_not_depend_on_how_many_adapters_others_have() {
  for (std::uint64_t seed = 0; seed < 12; ++seed) {
    const Model model = model_of(seed, 64);
    Prompts prompts(model, 4, seed);
    for (int i = 0; i < 4; ++i) prompts.requests[i].adapters.assign(i, 0);
    const std::vector<float> together = prompts.decode(model, dive::cuda::make_stepper(model.plan, 4, 0), 4);
    const std::vector<float> apart = prompts.decode(model, dive::cuda::make_stepper(model.plan, 1, 0), 1);
    const bool same = std::memcmp(together.data(), apart.data(), together.size() * sizeof(float)) == 0;
    expect(same, "seed " + std::to_string(seed) + ": logits depend on other rows' adapters");
  }
}

// What comes of requests of every kind that a device takes by itself, and of some that it does not.
std::vector<Result> results_of(const Model& model, const std::vector<Request>& requests,
                               std::unique_ptr<Stepper> stepper, int max_rows,
                               const Session::Callbacks& callbacks = {}) {
  Session session(model.plan, std::move(stepper), max_rows);
  for (const Request& request : requests) submit(session, model, request);
  for (bool done = false; !done;) {
    try {
      session.run(callbacks, 0);
      done = true;
    } catch (const std::length_error&) {
    }
  }
  return taken(session, requests);
}

// As `same`, but for the last bits of log-probabilities, whose sums are taken in another order.
bool alike(const std::vector<Result>& a, const std::vector<Result>& b) {
  bool equal = a.size() == b.size();
  for (std::size_t i = 0; equal && i < a.size(); ++i) {
    equal = a[i].tokens == b[i].tokens && a[i].finish == b[i].finish && a[i].log_probs.size() == b[i].log_probs.size();
    for (std::size_t t = 0; equal && t < a[i].log_probs.size(); ++t) {
      equal = std::fabs(a[i].log_probs[t] - b[i].log_probs[t]) <= 1e-5f * std::max(1.0f, std::fabs(a[i].log_probs[t]));
    }
  }
  return equal;
}

void the_devices_loop_gives_what_the_hosts_sampler_gives() {
  int calls = 0;
  for (std::uint64_t seed = 0; seed < 4; ++seed) {
    const Model model = model_of(seed);
    std::vector<Request> requests = requests_for(model, 5);
    for (Request& request : requests) {
      request.max_new_tokens = std::min<std::int64_t>(request.max_new_tokens, 5);
      request.min_new_tokens = std::min(request.min_new_tokens, request.max_new_tokens);
      if (seed) request.stop = nullptr, request.search = {};
    }
    const auto stepper = [&](StepForm form) { return dive::cuda::make_stepper(model.plan, 3, 0, form); };
    Session::Callbacks throwing;
    throwing.token = [&](std::int64_t, std::int64_t) {
      if (++calls % 5 == 0) throw std::length_error("enough");
    };
    for (const StepForm form : {StepForm::kBest, StepForm::kPlain}) {
      const std::string where = "seed " + std::to_string(seed) + (form == StepForm::kBest ? "" : ", plain");
      dive_host_cuda_seed(seed);
      const std::vector<Result> expected =
          results_of(model, requests, std::make_unique<LoopingStepper>(model.plan, stepper(form), 5), 3);
      dive_host_cuda_seed(seed + 50);
      const Session::Callbacks callbacks = seed % 2 ? throwing : Session::Callbacks{};
      expect(alike(expected, results_of(model, requests, stepper(form), 3, callbacks)), where + ": other results");
    }
  }
  expect(calls > 5, "no token was told");
}

void a_loop_ends_where_it_is_asked_to() {
  const Model model = model_of(1);
  Session session(model.plan, dive::cuda::make_stepper(model.plan, 2, 0, StepForm::kPlain), 2);
  Request request;
  request.prompt = {0};
  request.streams = {0};
  request.max_new_tokens = 100;
  submit(session, model, request);
  int told = 0;
  Session::Callbacks callbacks;
  callbacks.token = [&](std::int64_t, std::int64_t) {
    if (++told == 3) session.cancel();
  };
  session.run(callbacks, 0);
  const Result result = session.take(0);
  expect(result.finish == Finish::kCancelled && result.tokens.size() <= 5, "a loop went on after it was cancelled");
}

// A device that writes one thing whenever the host looks, in the order of advance_kernel, so that the host sees it
// between any two.
class SlowDevice {
 public:
  SlowDevice(const dive::cuda::Advance& arguments, int steps) {
    for (int n = 1; n <= steps; ++n) {
      writes_.push_back([=] { arguments.told[(n - 1) * arguments.most_rows] = {n, 0}; });
      if (n == steps) writes_.push_back([=] { arguments.progress->over = 1; });
      writes_.push_back([=] { arguments.progress->steps = n; });
    }
  }

  void launch(const SlowDevice&) const {}
  void wait() const {
    while (!idle()) continue;
  }
  bool idle() const {
    if (done_ == writes_.size()) return true;
    writes_[done_++]();
    return false;
  }

 private:
  std::vector<std::function<void()>> writes_;
  mutable std::size_t done_ = 0;
};

void every_step_of_a_loop_is_told() {
  constexpr int kLength = 3;
  dive::cuda::Loop loop(1, 8);
  const std::vector<std::int64_t> eos;
  const Sampling sampling{};
  LoopRow row{};
  row.sampling = &sampling;
  row.eos = &eos;
  const dive::cuda::OwnStream stream;
  loop.start(stream, {row}, 1, kLength);
  const SlowDevice device(loop.arguments(nullptr, nullptr, nullptr, nullptr), kLength);
  std::vector<std::int64_t> told;
  loop.run(device, device, true, 1, [&](const Choice* choice) { told.push_back(choice->token); }, [] { return false; });
  expect(told == std::vector<std::int64_t>{1, 2, 3}, std::to_string(told.size()) + " of 3 steps were told");
}

// Every call of the runtime fails once: an error that names it, and nothing is left behind.
void every_failure_arrives() {
  const Model model = model_of(4);
  std::vector<Request> requests = requests_for(model, 3);
  for (Request& request : requests) {
    request.stop = nullptr, request.search = {};
    request.max_new_tokens = 1;
    request.min_new_tokens = 0;
    request.streams.resize(1);
    request.sampling = {};
    request.sampling.repetition_penalty = 1.2f;
  }
  const std::size_t before = dive_host_cuda_live_bytes();
  std::uint64_t index = 0;
  for (bool failed = true; failed; ++index) {
    dive_host_cuda_fail(index, cudaErrorUnknown);
    std::string message;
    try {
      results_of(model, requests, dive::cuda::make_stepper(model.plan, 3, 0), 3);
    } catch (const std::runtime_error& error) {
      message = error.what();
    }
    failed = dive_host_cuda_failed();
    dive_host_cuda_fail(0, cudaSuccess);
    // Of what only frees or asks whether a driver can repeat, a failure is not seen.
    if (failed && !message.empty()) {
      expect(message.starts_with("CUDA: ") && message.find("cudaErrorUnknown") != std::string::npos, message);
    }
    expect(dive_host_cuda_live_bytes() == before, "failure " + std::to_string(index) + " leaves memory: " + message);
  }
  expect(index > 50, "too few calls were made to fail");
}

// Where one call fails while a session makes room for longer rows and more adapters, the next run ends as if none had.
void a_run_goes_on_behind_a_failure() {
  const Model model = model_of(0, 64);
  std::vector<Result> results;
  // What failed, behind which the session ran again; empty where the call of this index was not reached.
  const auto run = [&](std::uint64_t index, cudaError_t error) -> std::string {
    Session session(model.plan, dive::cuda::make_stepper(model.plan, 2, 0), 2);
    int count = 0;
    const auto submit_one = [&](int adapters, std::int64_t prefilled) {
      Request request;
      request.prompt = {0};
      request.prefilled = prefilled;
      request.streams = {static_cast<std::uint64_t>(count++)};
      request.max_new_tokens = 1;
      request.adapters.assign(adapters, 0);
      submit(session, model, request);
    };
    submit_one(1, 0);
    session.run({}, 0);
    submit_one(3, 0);
    submit_one(0, 1100);
    dive_host_cuda_fail(index, error);
    std::string message;
    try {
      session.run({}, 0);
    } catch (const std::runtime_error& failure) {
      message = failure.what();
    }
    dive_host_cuda_fail(0, cudaSuccess);
    // A device that fails while it works does not work again.
    if (message.starts_with("CUDA: running a step")) return message;
    if (!message.empty()) {
      expect(message.starts_with("CUDA: out of memory: "), "failure " + std::to_string(index) + ": " + message);
      session.run({}, 0);
    }
    expect(std::string(session.loop_form()) == "on the device", "failure " + std::to_string(index) + ": another loop");
    results.clear();
    for (int i = 0; i < count; ++i) results.push_back(session.take(i));
    return message;
  };
  run(0, cudaSuccess);
  const std::vector<Result> expected = results;
  std::uint64_t index = 1;
  for (; !run(index, cudaErrorMemoryAllocation).starts_with("CUDA: running a step"); ++index)
    expect(alike(expected, results), "failure " + std::to_string(index) + ": other results");
  expect(index > 50, "a run went on behind " + std::to_string(index) + " failures alone");
}

}  // namespace

// All of them, or with an argument such as 1/2 every second, beginning with the first: halves that take equally long.
int main(int count, char** arguments) {
  std::vector<std::pair<const char*, void (*)()>> tests = {
      {"logits are the CPU step's", logits_are_the_cpu_steps},
      {"logits do not depend on how many adapters others have", logits_do_not_depend_on_how_many_adapters_others_have},
      {"heads and batches are as large as models have them", heads_and_batches_are_as_large_as_models_have_them},
      {"the device's loop gives what the host's sampler gives", the_devices_loop_gives_what_the_hosts_sampler_gives},
      {"logits depend on the row alone", logits_depend_on_the_row_alone},
      {"a run goes on behind a failure", a_run_goes_on_behind_a_failure},
      {"steering adds nothing of blocks without columns", steering_adds_nothing_of_blocks_without_columns},
      {"every failure arrives", every_failure_arrives},
      {"many heads share keys and values", many_heads_share_keys_and_values},
      {"every step of a loop is told", every_step_of_a_loop_is_told},
      {"a loop ends where it is asked to", a_loop_ends_where_it_is_asked_to},
  };
  if (kThreadSanitizer) {
    tests = {{"logits are the CPU step's", logits_are_the_cpu_steps},
             {"a loop ends where it is asked to", a_loop_ends_where_it_is_asked_to}};
  }
  std::size_t part = 1, parts = 1;
  if (count > 1 && std::sscanf(arguments[1], "%zu/%zu", &part, &parts) == 2 && part > 0 && parts > 0) {
    std::size_t place = 0;
    std::erase_if(tests, [&](const auto&) { return place++ % parts != part - 1; });
  }
  run_tests(tests);
  expect(dive_host_cuda_live_bytes() == 0, "memory of the device is left");
  std::puts("cuda_step_test: passed");
}
