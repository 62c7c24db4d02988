// Plans, sessions and what they are given.
#include <algorithm>
#include <atomic>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "bindings/bindings.h"
#include "cpu/isa.h"
#include "cpu/step.h"
#include "cuda/step.h"
#include "engine/check.h"
#include "engine/draws.h"
#include "engine/plan.h"
#include "engine/sampler.h"
#include "engine/session.h"

namespace dive::bindings {
namespace {

// (address, dtype, rows, columns, row stride, address of the bias, address of int8 scales)
using WeightTuple =
    std::tuple<std::uintptr_t, int, std::int64_t, std::int64_t, std::int64_t, std::uintptr_t, std::uintptr_t>;
// (address, eps)
using NormTuple = std::tuple<std::uintptr_t, float>;

dive::cpu::Weight to_weight(const WeightTuple& tuple) {
  const auto [address, dtype, rows, columns, stride, bias, scales] = tuple;
  return {pointer<void>(address), static_cast<dive::cpu::DType>(dtype), pointer<float>(scales), rows, columns, stride,
          pointer<float>(bias)};
}

dive::engine::Norm to_norm(const NormTuple& tuple) { return {pointer<float>(std::get<0>(tuple)), std::get<1>(tuple)}; }

dive::engine::Layer to_layer(const py::dict& d) {
  const auto weight = [&](const char* name) { return to_weight(d[name].cast<WeightTuple>()); };
  const auto norm = [&](const char* name) { return to_norm(d[name].cast<NormTuple>()); };
  return {norm("input"),
          norm("post_attention"),
          norm("mlp"),
          norm("post_mlp"),
          norm("q_norm"),
          norm("k_norm"),
          weight("q"),
          weight("k"),
          weight("v"),
          weight("o"),
          weight("gate"),
          weight("up"),
          weight("down"),
          d["rope"].cast<int>(),
          d["window"].cast<std::int64_t>()};
}

std::optional<dive::engine::Steering> to_steering(const py::object& object) {
  if (object.is_none()) return std::nullopt;
  const py::dict d = object;
  dive::engine::Steering s;
  s.rank = d["rank"].cast<std::int64_t>();
  if (s.rank > 0) {
    s.matrices = to_weight(d["matrices"].cast<WeightTuple>());
    s.bias = pointer<float>(d["bias"].cast<std::uintptr_t>());
  }
  s.static_push = pointer<float>(d["static"].cast<std::uintptr_t>());
  s.alpha = d["alpha"].cast<float>();
  s.gate_direction = pointer<float>(d["gate_direction"].cast<std::uintptr_t>());
  s.gate_offset = d["gate_offset"].cast<float>();
  s.activation = static_cast<dive::cpu::Activation>(d["activation"].cast<int>());
  s.normalize_input = d["normalize_input"].cast<bool>();
  s.preserve_norm = d["preserve_norm"].cast<bool>();
  return s;
}

dive::engine::Adapter to_adapter(const py::dict& d) {
  dive::engine::Adapter adapter;
  for (const py::handle site : d["attention"])
    adapter.attention.push_back(to_steering(py::reinterpret_borrow<py::object>(site)));
  for (const py::handle site : d["block"])
    adapter.block.push_back(to_steering(py::reinterpret_borrow<py::object>(site)));
  return adapter;
}

std::shared_ptr<dive::engine::Plan> to_plan(const py::dict& d) {
  auto plan = std::make_shared<dive::engine::Plan>();
  plan->hidden_size = d["hidden_size"].cast<std::int64_t>();
  plan->intermediate_size = d["intermediate_size"].cast<std::int64_t>();
  plan->vocabulary = d["vocabulary"].cast<std::int64_t>();
  plan->heads = d["heads"].cast<int>();
  plan->kv_heads = d["kv_heads"].cast<int>();
  plan->head_size = d["head_size"].cast<int>();
  plan->attention_scale = d["attention_scale"].cast<float>();
  plan->attention_softcap = d["attention_softcap"].cast<float>();
  plan->logit_softcap = d["logit_softcap"].cast<float>();
  plan->activation = static_cast<dive::cpu::GatedActivation>(d["activation"].cast<int>());
  plan->cache_dtype = static_cast<dive::cpu::DType>(d["cache_dtype"].cast<int>());
  plan->embedding = to_weight(d["embedding"].cast<WeightTuple>());
  plan->embedding_scale = d["embedding_scale"].cast<float>();
  for (const auto& [frequency, scaling] : d["ropes"].cast<std::vector<std::tuple<std::vector<float>, float>>>()) {
    plan->ropes.push_back({frequency, scaling});
  }
  for (const py::handle layer : d["layers"]) plan->layers.push_back(to_layer(py::reinterpret_borrow<py::dict>(layer)));
  plan->final_norm = to_norm(d["final_norm"].cast<NormTuple>());
  plan->head = to_weight(d["head"].cast<WeightTuple>());
  for (const py::handle a : d["adapters"]) plan->adapters.push_back(to_adapter(py::reinterpret_borrow<py::dict>(a)));
  return plan;
}

dive::engine::BeamOptions::Early early_stopping_from_name(const std::string& name) {
  using Early = dive::engine::BeamOptions::Early;
  return name == "yes" ? Early::kYes : name == "never" ? Early::kNever : Early::kNo;
}

// What is of the wrong type is a TypeError, as it is where the interpreter itself converts arguments.
std::shared_ptr<dive::engine::Plan> checked_plan(const py::dict& values, const py::object&) {
  std::shared_ptr<dive::engine::Plan> plan;
  try {
    plan = to_plan(values);
  } catch (const py::cast_error& error) {
    throw py::type_error(std::string("plan: ") + error.what());
  }
  dive::engine::check(*plan);
  return plan;
}

// Session with what it stands on.
struct BoundSession {
  std::shared_ptr<dive::engine::Plan> plan;
  dive::engine::Session session;
  std::atomic<bool> busy{false};

  // A session belongs to one call at a time, but for cancel(): run() gives the interpreter to other threads, and its
  // callback could call back.
  class Turn {
   public:
    explicit Turn(BoundSession& session) : busy_(session.busy) {
      if (busy_.exchange(true))
        throw std::runtime_error("session: a call of it is under way; only cancel() may be called");
    }
    ~Turn() { busy_.store(false); }
    Turn(const Turn&) = delete;

   private:
    std::atomic<bool>& busy_;
  };
};

}  // namespace

void bind_engine(py::module_ m) {
  using namespace dive::engine;
  py::class_<Plan, std::shared_ptr<Plan>>(m, "Plan", "What a decoder is; see csrc/engine/plan.h.")
      .def(py::init(&checked_plan), "values"_a, "kept"_a, py::keep_alive<1, 3>(),
           "`kept` holds the tensors that `values` points into; it lives as long as the plan and its sessions.");
  py::class_<TokenTexts, std::shared_ptr<TokenTexts>>(m, "TokenTexts", "The bytes that each token adds to a text.")
      .def(py::init([](const std::vector<py::bytes>& texts) { return TokenTexts{{texts.begin(), texts.end()}}; }));
  py::class_<StopStrings, std::shared_ptr<StopStrings>>(m, "StopStrings",
                                                        "What ends a row; csrc/engine/stop_strings.h.")
      .def(py::init([](std::shared_ptr<TokenTexts> texts, std::vector<std::string> strings) {
             return StopStrings{std::move(texts), std::move(strings)};
           }),
           "texts"_a, "strings"_a);
  py::class_<BoundSession>(m, "Session", "The decoding loop; see csrc/engine/session.h.")
      .def(py::init([](std::shared_ptr<Plan> plan, int max_rows, int threads, const std::string& isa,
                       std::optional<int> device) {
             const py::gil_scoped_release release;
             auto stepper = device ? dive::cuda::make_stepper(*plan, max_rows, *device)
                                   : dive::cpu::make_stepper(*plan, max_rows, threads, dive::cpu::isa_from_name(isa));
             return new BoundSession{plan, Session(*plan, std::move(stepper), max_rows)};
           }),
           py::kw_only(), "plan"_a, "max_rows"_a, "threads"_a, "isa"_a, "device"_a, py::keep_alive<1, 2>(),
           "On that CUDA device, which all of the plan's pointers belong to, or on the CPU where it is None.")
      .def(
          "submit",
          [](BoundSession& self, std::vector<std::int64_t> prompt, std::int64_t prefilled, std::int64_t rope_offset,
             std::vector<int> adapters, float temperature, std::int64_t top_k, float top_p, float min_p,
             float repetition_penalty, std::uint64_t seed, std::vector<std::uint64_t> streams, int beams,
             float length_penalty, const std::string& early_stopping, std::vector<std::int64_t> eos,
             const std::shared_ptr<StopStrings>& stop, std::int64_t min_new_tokens, std::int64_t max_new_tokens,
             bool log_probs, std::vector<std::int64_t> forced, Address forced_logits,
             const std::vector<std::tuple<Address, Address, std::int64_t, std::int64_t, std::int64_t, std::int64_t>>&
                 layers) {
            Request request{std::move(prompt),
                            prefilled,
                            rope_offset,
                            std::move(adapters),
                            {temperature, top_k, top_p, min_p, repetition_penalty, seed},
                            std::move(streams),
                            {beams, length_penalty, early_stopping_from_name(early_stopping)},
                            std::move(eos),
                            stop,
                            min_new_tokens,
                            max_new_tokens,
                            log_probs,
                            std::move(forced),
                            pointer<float>(forced_logits)};
            std::vector<PrefilledLayer> found;
            for (const auto& [keys, values, keys_head, keys_position, values_head, values_position] : layers) {
              found.push_back(
                  {pointer<void>(keys), pointer<void>(values), keys_head, keys_position, values_head, values_position});
            }
            const BoundSession::Turn turn(self);
            const py::gil_scoped_release release;
            return self.session.submit(std::move(request), found);
          },
          py::kw_only(), "prompt"_a, "prefilled"_a, "rope_offset"_a, "adapters"_a, "temperature"_a, "top_k"_a,
          "top_p"_a, "min_p"_a, "repetition_penalty"_a, "seed"_a, "streams"_a, "beams"_a, "length_penalty"_a,
          "early_stopping"_a, "eos"_a, "stop"_a.none(true), "min_new_tokens"_a, "max_new_tokens"_a, "log_probs"_a,
          "forced"_a, "forced_logits"_a, "layers"_a)
      .def(
          "run",
          [](BoundSession& self, const py::object& on_token, const py::object& cancelled, int until_free) {
            Session::Callbacks callbacks;
            if (!on_token.is_none()) {
              callbacks.token = [&](std::int64_t result, std::int64_t token) {
                const py::gil_scoped_acquire acquire;
                on_token(result, token);
              };
            }
            callbacks.poll = [&] {
              const py::gil_scoped_acquire acquire;
              if (PyErr_CheckSignals() != 0) throw py::error_already_set();
              if (!cancelled.is_none() && cancelled().cast<bool>()) self.session.cancel();
            };
            const BoundSession::Turn turn(self);
            const py::gil_scoped_release release;
            self.session.run(callbacks, until_free);
          },
          py::kw_only(), "on_token"_a, "cancelled"_a, "until_free"_a)
      .def("cancel", [](BoundSession& self) { self.session.cancel(); })
      .def("take",
           [](BoundSession& self, std::int64_t number) {
             const BoundSession::Turn turn(self);
             Result result = self.session.take(number);
             const char* names[] = {"unfinished", "eos", "length", "cancelled", "stop"};
             return py::make_tuple(result.tokens, result.log_probs, names[static_cast<int>(result.finish)]);
           })
      .def_property_readonly("steps",
                             [](BoundSession& self) {
                               const BoundSession::Turn turn(self);
                               return self.session.steps();
                             })
      .def_property_readonly("rows_run",
                             [](BoundSession& self) {
                               const BoundSession::Turn turn(self);
                               return self.session.rows_run();
                             })
      .def_property_readonly("loop_form", [](BoundSession& self) { return self.session.loop_form(); })
      // Also for the callbacks of run(), which come on its own thread.
      .def_property_readonly("cache_blocks", [](BoundSession& self) {
        const BlockPool& pool = self.session.pool();
        return py::dict("bytes"_a = pool.block_bytes(), "held"_a = pool.blocks_held(), "made"_a = pool.blocks_made());
      });
  m.def(
      "sample",
      [](Address logits, std::int64_t vocabulary, float temperature, std::int64_t top_k, float top_p, float min_p,
         std::uint64_t seed, std::uint64_t stream, std::int64_t draws) {
        check(Sampling{temperature, top_k, top_p, min_p, 1.0f, seed, stream});
        if (logits == 0 || vocabulary < 1 || draws < 0)
          throw std::invalid_argument("sample: needs logits and draws >= 0");
        std::vector<std::int64_t> tokens(draws);
        const py::gil_scoped_release release;
        std::vector<float> copy;
        const float* first = pointer<float>(logits);
        const std::int64_t likeliest = std::max_element(first, first + vocabulary) - first;
        for (std::int64_t i = 0; i < draws; ++i) {
          copy.assign(first, first + vocabulary);
          const Sampling sampling{temperature, top_k, top_p, min_p, 1.0f, seed, stream};
          tokens[i] = choose(sampling, copy.data(), vocabulary, likeliest, {}, {}, i, false).token;
        }
        return tokens;
      },
      py::kw_only(), "logits"_a, "vocabulary"_a, "temperature"_a, "top_k"_a, "top_p"_a, "min_p"_a, "seed"_a, "stream"_a,
      "draws"_a, "Tokens that steps 0 ... draws - 1 of a stream would draw from the same logits [V].");
  m.def(
      "refusal_of_cuda", [](const Plan& plan) { return dive::cuda::refusal(plan); }, "plan"_a,
      "Why no CUDA device can run the plan, empty where one could.");
  m.def("uniform", &uniform, "seed"_a, "stream"_a, "step"_a, "The number in [0, 1) that a step of a stream draws.");
}

}  // namespace dive::bindings
