// What does not fit is refused where it enters the engine, with the part's name.
#include "engine/check.h"

#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cpu/step.h"
#include "engine/plan.h"
#include "engine/session.h"
#include "engine/stop_strings.h"
#include "tests/engine_requests.h"

namespace {

using namespace dive::engine;
using namespace random_decoder;

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
  const float scales[1] = {};
  bad("row stride of int8", [&](Plan& p) {
    p.head.scales = scales;
    p.head.row_stride = dive::cpu::int8_stride(p.hidden_size) + 1;
  });
  bad("columns of int8", [&](Plan& p) {
    p.intermediate_size = (1 << 17) + 4;
    for (Layer& layer : p.layers) {
      layer.gate_proj.rows = layer.up_proj.rows = p.intermediate_size;
      layer.down_proj.columns = layer.down_proj.row_stride = p.intermediate_size;
      layer.down_proj.scales = scales;
    }
  });
  bad("the embedding is int8", [&](Plan& p) {
    p.embedding.scales = scales;
    p.embedding.row_stride = dive::cpu::int8_stride(p.hidden_size);
  });
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
    const std::int64_t padded =
        (p.hidden_size + dive::cpu::kRankPanel - 1) / dive::cpu::kRankPanel * dive::cpu::kRankPanel;
    s.matrices = {p.final_norm.weight, DType::kFloat32, nullptr, 2, padded, padded + 1, nullptr};
  });
  bad_steering("activation", [](Plan&, Steering& s) { s.activation = static_cast<dive::cpu::Activation>(5); });
  for (const auto& [rows, threads] : {std::pair{0, 1}, {65, 1}, {1, 0}, {1, -1}, {1, 1 << 20}}) {
    refused(rows == 1 ? "threads" : "max_rows",
            [&, rows = rows, threads = threads] { dive::cpu::make_stepper(model.plan, rows, threads, levels()[0]); });
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
  bad("stop",
      [](Request& r) { r.stop = std::make_shared<StopStrings>(StopStrings{std::make_shared<TokenTexts>(), {""}}); });
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
  run_tests({{"bad plans are refused", bad_plans_are_refused}, {"bad requests are refused", bad_requests_are_refused}});
}
