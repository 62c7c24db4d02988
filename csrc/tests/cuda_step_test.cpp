// The CUDA step without a GPU (cuda_on_host/cuda_runtime.h says what that is worth): its logits beside the CPU step's, on
// small random decoders with every feature; and that they depend on nothing but the row.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "cpu/isa.h"
#include "cpu/step.h"
#include "cuda/step.h"
#include "cuda_on_host/control.h"
#include "engine/session.h"
#include "tests/random_decoder.h"

namespace {

using namespace random_decoder;

constexpr int kSteps = 4;

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

Model model_of(std::uint64_t seed) {
  return Model(seed, {.unit = 8, .dtype = static_cast<DType>(seed % 3)});
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

void logits_are_the_cpu_steps() {
  // Where weights have half precision, so have the numbers that they multiply, unlike on the CPU: 2^-9 and 2^-12 a
  // rounding, some tens of them on the way.
  const double allowed[] = {2e-5, 5e-2, 8e-3};
  for (std::uint64_t seed = 0; seed < 12; ++seed) {
    const Model model = model_of(seed);
    Prompts prompts(model, 5, seed);
    const std::vector<float> expected =
        prompts.decode(model, dive::cpu::make_stepper(model.plan, 5, 1, dive::cpu::best_isa()), 5);
    dive_host_cuda_seed(seed);
    const std::vector<float> found = prompts.decode(model, dive::cuda::make_stepper(model.plan, 5, 0), 5);
    const double error = difference(found, expected);
    expect(error <= allowed[seed % 3], "seed " + std::to_string(seed) + ": logits differ by " + std::to_string(error));
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

}  // namespace

int main() {
  logits_are_the_cpu_steps();
  logits_depend_on_the_row_alone();
  expect(dive_host_cuda_live_bytes() == 0, "memory of the device is left");
  std::puts("cuda_step_test: passed");
}
