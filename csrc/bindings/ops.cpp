// The CPU kernels of the two ops.
#include <string>
#include <tuple>

#include "bindings/bindings.h"
#include "cpu/isa.h"
#include "cpu/linear_cross_entropy.h"
#include "cpu/steer.h"

namespace dive::bindings {

void bind_steer(py::module_ m) {
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
  using MatrixTuple = std::tuple<Address, std::int64_t, int>;
  const auto matrix = [](const MatrixTuple& tuple) {
    const auto [address, stride, dtype] = tuple;
    return dive::cpu::Matrix{pointer<void>(address), stride, static_cast<dive::cpu::DType>(dtype)};
  };
  m.def(
      "linear_cross_entropy_level",
      [](int hidden, int weight) {
        using dive::cpu::DType;
        return dive::cpu::isa_name(dive::cpu::quickest_isa(static_cast<DType>(hidden), static_cast<DType>(weight)));
      },
      "hidden"_a, "weight"_a, "The level that is quickest here for hidden states and a weight of these dtypes.");
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

}  // namespace dive::bindings
