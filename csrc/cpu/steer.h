// Steering of the residual stream: residual add, adapter, write-back and the RMSNorm that follows, in one pass.
// T rows, D hidden size, R adapter rank, A adapters.
//
//   h  = residual + update, rounded to their dtype; everything after it is float32
//   n  = h / sqrt(mean(h^2) + 1e-12) if normalize_input, else h
//   a  = phi(n @ down^T + bias)                               [T, R]
//   d  = alpha * sigmoid(h . gate_direction + gate_offset) * (a @ up^T + static_push)
//   h' = h + d, scaled to the length of h if preserve_norm (a row that became 0 stays 0)
//   normalized = h' / sqrt(mean(h'^2) + norm_eps) * norm_weight
#pragma once

#include <cstdint>

#include "cpu/dtype.h"
#include "cpu/isa.h"

namespace dive::cpu {

enum class Activation { kSilu, kIdentity, kRelu, kGelu, kTanh };

// Memory is the caller's, rows have unit inner stride, adapters are stacked and contiguous. Null means absent.
struct SteerInputs {
  std::int64_t rows, hidden_size, rank, adapters;
  DType dtype;                   // of residual, update, the two outputs and their gradients
  const void* residual;          // [T, D]
  std::int64_t residual_stride;  // elements from one row to the next
  const void* update;            // [T, D]
  std::int64_t update_stride;
  const float* down;                  // [A, R, D]; with up or not at all
  const float* up;                    // [A, D, R]
  const float* bias;                  // [A, R]
  const float* static_push;           // [A, D]
  const float* alpha;                 // [A]
  const float* gate_direction;        // [A, D]; with gate_offset or not at all
  const float* gate_offset;           // [A]
  const bool* mask;                   // [T]; false: the row is h, bit for bit
  const std::int32_t* adapter_index;  // [T], -1: the row is h; null: adapter 0 everywhere
  const float* norm_weight;           // [D]
  bool round_before_norm_weight;      // the normed row is rounded to dtype before the weight multiplies it
  Activation activation;
  bool normalize_input, preserve_norm;
  float norm_eps;
};

struct SteerOutputs {
  void* steered;          // [T, D], contiguous
  void* normalized;       // [T, D], contiguous; not null if and only if norm_weight is given
  float* pre_activation;  // [T, R]: n @ down^T + bias, zero in rows left alone; null: not kept
};

// What the outputs' gradients are and where the inputs' go. Null among the latter: not wanted.
struct SteerGradients {
  const void* grad_steered;  // [T, D]; null stands for zeros, as below
  std::int64_t grad_steered_stride;
  const void* grad_normalized;
  std::int64_t grad_normalized_stride;
  const float* pre_activation;  // as the forward pass kept it; needed where R > 0
  void* residual;               // [T, D], contiguous: of residual and of update alike
  float* down;                  // [R, D]
  float* up;                    // [D, R]
  float* bias;
  float* static_push;
  float* alpha;
  float* gate_direction;
  float* gate_offset;
  float* norm_weight;
};

// A row's result does not depend on the rows beside it, except that `up` is summed in another order once an adapter has
// many rows. Throws std::out_of_range for an adapter_index outside -1 ... A - 1. `threads` is the most it may use.
void steer_forward(const SteerInputs& inputs, const SteerOutputs& outputs, Isa isa, int threads);

// For one adapter (A = 1, no adapter_index). Sums over rows are taken in a fixed order, so that results depend neither
// on `threads` nor on timing.
void steer_backward(const SteerInputs& inputs, const SteerGradients& gradients, Isa isa, int threads);

}  // namespace dive::cpu
