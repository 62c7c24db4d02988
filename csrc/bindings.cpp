// The Python module dive_fast._native: converts arguments and results, and holds no logic.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/decode.h"
#include "cpu/features.h"
#include "cpu/isa.h"
#include "cpu/linear_cross_entropy.h"
#include "cpu/steer.h"
#include "cpu/step.h"
#include "cuda/device.h"
#include "cuda/step.h"
#include "engine/check.h"
#include "engine/draws.h"
#include "engine/plan.h"
#include "engine/sampler.h"
#include "engine/session.h"

namespace py = pybind11;
using namespace py::literals;

namespace {

py::dict to_python(const dive::cuda::Status& status) {
  return py::dict("ok"_a = status.ok, "message"_a = status.message);
}

py::dict to_python(const dive::cuda::Device& device) {
  return py::dict("index"_a = device.index, "name"_a = device.name,
                  "capability"_a = py::make_tuple(device.major, device.minor), "total_memory"_a = device.total_memory,
                  "sm_count"_a = device.sm_count, "covered"_a = to_python(device.covered));
}

void bind_cpu(py::module_ m) {
  m.def("brand", &dive::cpu::brand, "Marketing name of the processor.");
  m.def("instruction_sets", &dive::cpu::instruction_sets,
        "Instruction sets usable at run time, named as in /proc/cpuinfo.");
  m.def(
      "kernel_levels",
      [] {
        std::vector<std::string> names;
        for (const dive::cpu::Isa isa : dive::cpu::usable_isas()) names.emplace_back(dive::cpu::isa_name(isa));
        return names;
      },
      "Levels that kernels can run at here, the best one last.");
  m.def(
      "cores",
      [] {
        const dive::cpu::Cores cores = dive::cpu::cores();
        return py::dict("logical"_a = cores.logical, "physical"_a = cores.physical);
      },
      "Hardware threads and distinct cores that the affinity mask allows.");
}

template <typename T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Tensors are given by address, 0 for None.
void bind_steer(py::module_ m) {
  using Address = std::uintptr_t;
  using dive::cpu::Activation;
  using dive::cpu::DType;
  using dive::cpu::SteerInputs;
  py::class_<SteerInputs>(m, "SteerInputs", "Arguments that both directions of steer share; see csrc/cpu/steer.h.")
      .def(py::init([](std::int64_t rows, std::int64_t hidden_size, std::int64_t rank, std::int64_t adapters, int dtype,
                       Address residual, std::int64_t residual_stride, Address update, std::int64_t update_stride,
                       Address down, Address up, Address bias, Address static_push, Address alpha,
                       Address gate_direction, Address gate_offset, Address mask, Address adapter_index,
                       Address norm_weight, bool round_before_norm_weight, int activation, bool normalize_input,
                       bool preserve_norm, float norm_eps) {
             return SteerInputs{rows,
                                hidden_size,
                                rank,
                                adapters,
                                static_cast<DType>(dtype),
                                pointer<void>(residual),
                                residual_stride,
                                pointer<void>(update),
                                update_stride,
                                pointer<float>(down),
                                pointer<float>(up),
                                pointer<float>(bias),
                                pointer<float>(static_push),
                                pointer<float>(alpha),
                                pointer<float>(gate_direction),
                                pointer<float>(gate_offset),
                                pointer<bool>(mask),
                                pointer<std::int32_t>(adapter_index),
                                pointer<float>(norm_weight),
                                round_before_norm_weight,
                                static_cast<Activation>(activation),
                                normalize_input,
                                preserve_norm,
                                norm_eps};
           }),
           py::kw_only(), "rows"_a, "hidden_size"_a, "rank"_a, "adapters"_a, "dtype"_a, "residual"_a,
           "residual_stride"_a, "update"_a, "update_stride"_a, "down"_a, "up"_a, "bias"_a, "static_push"_a, "alpha"_a,
           "gate_direction"_a, "gate_offset"_a, "mask"_a, "adapter_index"_a, "norm_weight"_a,
           "round_before_norm_weight"_a, "activation"_a, "normalize_input"_a, "preserve_norm"_a, "norm_eps"_a);
  m.def(
      "steer_forward",
      [](const SteerInputs& inputs, Address steered, Address normalized, Address pre_activation, const std::string& isa,
         int threads) {
        const py::gil_scoped_release release;
        dive::cpu::steer_forward(inputs,
                                 {pointer<void>(steered), pointer<void>(normalized), pointer<float>(pre_activation)},
                                 dive::cpu::isa_from_name(isa), threads);
      },
      py::kw_only(), "inputs"_a, "steered"_a, "normalized"_a, "pre_activation"_a, "isa"_a, "threads"_a);
  m.def(
      "steer_backward",
      [](const SteerInputs& inputs, Address grad_steered, std::int64_t grad_steered_stride, Address grad_normalized,
         std::int64_t grad_normalized_stride, Address pre_activation, Address residual, Address down, Address up,
         Address bias, Address static_push, Address alpha, Address gate_direction, Address gate_offset,
         Address norm_weight, const std::string& isa, int threads) {
        const py::gil_scoped_release release;
        dive::cpu::steer_backward(
            inputs,
            {pointer<void>(grad_steered), grad_steered_stride, pointer<void>(grad_normalized), grad_normalized_stride,
             pointer<float>(pre_activation), pointer<void>(residual), pointer<float>(down), pointer<float>(up),
             pointer<float>(bias), pointer<float>(static_push), pointer<float>(alpha), pointer<float>(gate_direction),
             pointer<float>(gate_offset), pointer<float>(norm_weight)},
            dive::cpu::isa_from_name(isa), threads);
      },
      py::kw_only(), "inputs"_a, "grad_steered"_a, "grad_steered_stride"_a, "grad_normalized"_a,
      "grad_normalized_stride"_a, "pre_activation"_a, "residual"_a, "down"_a, "up"_a, "bias"_a, "static_push"_a,
      "alpha"_a, "gate_direction"_a, "gate_offset"_a, "norm_weight"_a, "isa"_a, "threads"_a);
}

// Matrices are (address, row stride in elements, dtype).
void bind_linear_cross_entropy(py::module_ m) {
  using Address = std::uintptr_t;
  using MatrixTuple = std::tuple<Address, std::int64_t, int>;
  const auto matrix = [](const MatrixTuple& tuple) {
    const auto [address, stride, dtype] = tuple;
    return dive::cpu::Matrix{pointer<void>(address), stride, static_cast<dive::cpu::DType>(dtype)};
  };
  m.def(
      "linear_cross_entropy",
      [matrix](std::int64_t rows_counted, std::int64_t hidden_size, std::int64_t vocabulary, const MatrixTuple& hidden,
               const MatrixTuple& weight, Address rows, Address targets, Address ce_share, Address kl_share,
               Address bias, Address class_weights, double label_smoothing, double z_loss, double softcap,
               Address teacher_rows, const MatrixTuple& teacher_hidden, Address tail_mean_weight, Address tail_mass,
               Address tail_negative_entropy, Address top_indices, Address top_log_probs, std::int64_t top_count,
               Address ce, Address kl, Address lse, Address log_prob, Address entropy, Address correct,
               Address gradient, std::int64_t max_workspace_bytes, int threads, const std::string& isa) {
        dive::cpu::LinearCrossEntropy problem;
        problem.rows_counted = rows_counted;
        problem.hidden_size = hidden_size;
        problem.vocabulary = vocabulary;
        problem.hidden = matrix(hidden);
        problem.weight = matrix(weight);
        problem.rows = pointer<const std::int64_t>(rows);
        problem.targets = pointer<const std::int64_t>(targets);
        problem.ce_share = pointer<const float>(ce_share);
        problem.kl_share = pointer<const float>(kl_share);
        problem.bias = pointer<const float>(bias);
        problem.class_weights = pointer<const float>(class_weights);
        problem.label_smoothing = label_smoothing;
        problem.z_loss = z_loss;
        problem.softcap = softcap;
        problem.teacher_rows = pointer<const std::int64_t>(teacher_rows);
        problem.teacher_hidden = matrix(teacher_hidden);
        problem.tail_mean_weight = pointer<const float>(tail_mean_weight);
        problem.tail_mass = pointer<const float>(tail_mass);
        problem.tail_negative_entropy = pointer<const float>(tail_negative_entropy);
        problem.top_indices = pointer<const std::int32_t>(top_indices);
        problem.top_log_probs = pointer<const float>(top_log_probs);
        problem.top_count = top_count;
        problem.ce = pointer<float>(ce);
        problem.kl = pointer<float>(kl);
        problem.lse = pointer<float>(lse);
        problem.log_prob = pointer<float>(log_prob);
        problem.entropy = pointer<float>(entropy);
        problem.correct = pointer<bool>(correct);
        problem.gradient = pointer<void>(gradient);
        problem.max_workspace_bytes = max_workspace_bytes;
        problem.threads = threads;
        problem.isa = dive::cpu::isa_from_name(isa);
        const py::gil_scoped_release release;
        dive::cpu::linear_cross_entropy(problem);
      },
      py::kw_only(), "rows_counted"_a, "hidden_size"_a, "vocabulary"_a, "hidden"_a, "weight"_a, "rows"_a, "targets"_a,
      "ce_share"_a, "kl_share"_a, "bias"_a, "class_weights"_a, "label_smoothing"_a, "z_loss"_a, "softcap"_a,
      "teacher_rows"_a, "teacher_hidden"_a, "tail_mean_weight"_a, "tail_mass"_a, "tail_negative_entropy"_a,
      "top_indices"_a, "top_log_probs"_a, "top_count"_a, "ce"_a, "kl"_a, "lse"_a, "log_prob"_a, "entropy"_a,
      "correct"_a, "gradient"_a, "max_workspace_bytes"_a, "threads"_a, "isa"_a,
      "Fills the outputs that are not 0; see csrc/cpu/linear_cross_entropy.h.");
}

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

void bind_engine(py::module_ m) {
  using namespace dive::engine;
  using Address = std::uintptr_t;
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

// Each function of csrc/cpu/decode.h alone, on a team of its own: for tests and benchmarks. Tensors are given by
// address.
void bind_decode(py::module_ m) {
  using Address = std::uintptr_t;
  using dive::cpu::Worker;
  namespace cpu = dive::cpu;
  // (data, dtype, scales, rows, columns, row stride, bias)
  using WeightTuple = std::tuple<Address, int, Address, std::int64_t, std::int64_t, std::int64_t, Address>;
  // (heads, key/value heads, head size, cache dtype, scale, softcap)
  using ShapeTuple = std::tuple<int, int, int, int, float, float>;
  // (blocks, bytes from a block's start to keys, to values, first, length)
  using RowTuple = std::tuple<std::vector<Address>, std::int64_t, std::int64_t, std::int64_t, std::int64_t>;
  const auto weight = [](const WeightTuple& t) {
    return cpu::Weight{pointer<void>(std::get<0>(t)),
                       static_cast<cpu::DType>(std::get<1>(t)),
                       pointer<float>(std::get<2>(t)),
                       std::get<3>(t),
                       std::get<4>(t),
                       std::get<5>(t),
                       pointer<float>(std::get<6>(t))};
  };
  const auto shape = [](const ShapeTuple& t) {
    return cpu::AttentionShape{std::get<0>(t), std::get<1>(t), std::get<2>(t), static_cast<cpu::DType>(std::get<3>(t)),
                               std::get<4>(t), std::get<5>(t)};
  };
  // The rows point into `tuples`, whose addresses become pointers where they are.
  const auto cache_rows = [](const std::vector<RowTuple>& tuples) {
    static_assert(sizeof(Address) == sizeof(std::byte*));
    std::vector<cpu::CacheRow> rows;
    for (const auto& [blocks, keys, values, first, length] : tuples) {
      rows.push_back({reinterpret_cast<std::byte* const*>(blocks.data()), keys, values, first, length});
    }
    return rows;
  };
  const auto team = [](const std::string& isa, int threads, const std::function<void(const Worker&)>& body) {
    const cpu::Isa level = cpu::isa_from_name(isa);
    dive::engine::check_team(1, threads, level);
    const py::gil_scoped_release release;
    cpu::run_team(threads, level, body);
  };
  m.attr("CACHE_BLOCK") = cpu::kCacheBlock;
  m.def("project", [=](const std::vector<WeightTuple>& tuples, Address x, int batch, const std::vector<Address>& to,
                       bool accumulate, const std::string& isa, int threads) {
    std::vector<cpu::Weight> weights;
    std::vector<const cpu::Weight*> pointers;
    std::vector<float*> outputs;
    for (const WeightTuple& tuple : tuples) weights.push_back(weight(tuple));
    for (const cpu::Weight& w : weights) pointers.push_back(&w);
    for (const Address address : to) outputs.push_back(pointer<float>(address));
    team(isa, threads, [&](const Worker& worker) {
      cpu::project(worker, pointers.data(), static_cast<int>(pointers.size()), pointer<float>(x), batch, outputs.data(),
                   accumulate);
    });
  });
  m.def("project_gated", [=](int activation, const WeightTuple& gate, const WeightTuple& up, Address x, int batch,
                             Address out, const std::string& isa, int threads) {
    team(isa, threads, [&](const Worker& worker) {
      cpu::project_gated(worker, static_cast<cpu::GatedActivation>(activation), weight(gate), weight(up),
                         pointer<float>(x), batch, pointer<float>(out));
    });
  });
  m.def("quantize_int8",
        [=](const WeightTuple& tuple, Address out, Address scales, const std::string& isa, int threads) {
          dive::engine::check_team(1, threads, cpu::isa_from_name(isa));
          const py::gil_scoped_release release;
          cpu::quantize_int8(weight(tuple), pointer<std::int8_t>(out), pointer<float>(scales), cpu::isa_from_name(isa),
                             threads);
        });
  m.def("rms_norm", [=](Address x, Address norm_weight, float eps, std::int64_t rows, std::int64_t size, Address out,
                        const std::string& isa, int threads) {
    team(isa, threads, [&](const Worker& worker) {
      cpu::rms_norm(worker, pointer<float>(x), pointer<float>(norm_weight), eps, rows, size, pointer<float>(out));
    });
  });
  m.def("rope", [=](Address x, Address cos, Address sin, int batch, int heads, int head_size, const std::string& isa,
                    int threads) {
    team(isa, threads, [&](const Worker& worker) {
      cpu::rope(worker, pointer<float>(x), pointer<float>(cos), pointer<float>(sin), batch, heads, head_size);
    });
  });
  m.def("append_to_cache", [=](const ShapeTuple& tuple, Address keys, Address values,
                               const std::vector<RowTuple>& tuples, const std::string& isa, int threads) {
    const std::vector<cpu::CacheRow> rows = cache_rows(tuples);
    team(isa, threads, [&](const Worker& worker) {
      cpu::append_to_cache(worker, shape(tuple), pointer<float>(keys), pointer<float>(values), rows.data(),
                           static_cast<int>(rows.size()));
    });
  });
  m.def("attention", [=](const ShapeTuple& tuple, Address q, const std::vector<RowTuple>& tuples, Address out,
                         const std::string& isa, int threads) {
    const std::vector<cpu::CacheRow> rows = cache_rows(tuples);
    team(isa, threads, [&](const Worker& worker) {
      cpu::attention(worker, shape(tuple), pointer<float>(q), rows.data(), static_cast<int>(rows.size()),
                     pointer<float>(out));
    });
  });
  m.def("gated_activation", [=](int activation, Address gate, Address up, std::int64_t count, Address out,
                                const std::string& isa, int threads) {
    team(isa, threads, [&](const Worker& worker) {
      cpu::gated_activation(worker, static_cast<cpu::GatedActivation>(activation), pointer<float>(gate),
                            pointer<float>(up), count, pointer<float>(out));
    });
  });
  m.def("add", [=](Address a, Address b, std::int64_t count, Address out, const std::string& isa, int threads) {
    team(isa, threads, [&](const Worker& worker) {
      cpu::add(worker, pointer<float>(a), pointer<float>(b), count, pointer<float>(out));
    });
  });
  m.def("softcap", [=](Address x, std::int64_t count, float cap, const std::string& isa, int threads) {
    team(isa, threads, [&](const Worker& worker) { cpu::softcap(worker, pointer<float>(x), count, cap); });
  });
  m.def("embed", [=](const WeightTuple& embedding, Address tokens, int batch, float scale, Address out,
                     const std::string& isa, int threads) {
    team(isa, threads, [&](const Worker& worker) {
      cpu::embed(worker, weight(embedding), pointer<std::int64_t>(tokens), batch, scale, pointer<float>(out));
    });
  });
  m.def("argmax",
        [=](Address logits, int batch, std::int64_t vocabulary, Address found, const std::string& isa, int threads) {
          team(isa, threads, [&](const Worker& worker) {
            cpu::argmax(worker, pointer<float>(logits), batch, vocabulary, pointer<std::int64_t>(found));
          });
        });
  m.def("read_memory", [](Address data, std::int64_t bytes, const std::string& isa, int threads) {
    dive::engine::check_team(1, threads, cpu::isa_from_name(isa));
    const py::gil_scoped_release release;
    return cpu::read_memory(pointer<void>(data), bytes, cpu::isa_from_name(isa), threads);
  });
  m.def("syncs", [=](int count, const std::string& isa, int threads) {
    team(isa, threads, [&](const Worker& worker) {
      for (int i = 0; i < count; ++i) worker.sync();
    });
  });
}

void bind_cuda(py::module_ m) {
  m.def("built", &dive::cuda::built, "Whether this build holds CUDA code.");
  m.def("built_archs", &dive::cuda::built_archs, "Architectures it was compiled for, such as '90a'.");
  m.def(
      "versions",
      [] {
        const dive::cuda::Versions versions = dive::cuda::versions();
        return py::dict("status"_a = to_python(versions.status), "runtime"_a = versions.runtime,
                        "driver"_a = versions.driver);
      },
      "CUDA runtime and driver versions as 1000 * major + 10 * minor; 0 where there is none.");
  m.def(
      "devices",
      [] {
        dive::cuda::DeviceList list;
        {
          const py::gil_scoped_release release;
          list = dive::cuda::devices();
        }
        py::list devices;
        for (const auto& device : list.devices) devices.append(to_python(device));
        return py::dict("status"_a = to_python(list.status), "devices"_a = devices);
      },
      "Every CUDA device, and whether this build holds code for it.");
  m.def(
      "probe",
      [](int device) {
        dive::cuda::ProbeResult result;
        {
          const py::gil_scoped_release release;
          result = dive::cuda::probe(device);
        }
        return py::dict("status"_a = to_python(result.status), "elements"_a = result.elements);
      },
      "device"_a, "Runs a small kernel on the device and checks what it wrote.");
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Compiled part of dive_fast.";
  m.attr("__version__") = DIVE_VERSION;
  py::module_ cpu = m.def_submodule("cpu", "What this CPU can execute, and kernels for it.");
  bind_cpu(cpu);
  bind_linear_cross_entropy(cpu);
  bind_steer(cpu);
  bind_decode(cpu.def_submodule("decode", "The parts of a decoding step; see csrc/cpu/decode.h."));
  bind_engine(m.def_submodule("engine", "Decoding: a plan, its requests, their tokens."));
  bind_cuda(m.def_submodule("cuda", "CUDA devices and this build's code for them."));
}
