// Cross-entropy and distillation of a frozen linear head with their gradient with respect to the hidden states.
//
// T rows of hidden states, N rows that count, D hidden size, V vocabulary, K most probable tokens.
#pragma once

#include <cstdint>

#include "cpu/dtype.h"
#include "cpu/isa.h"

namespace dive::cpu {

// A matrix whose rows are `stride` elements apart and contiguous in themselves.
struct Matrix {
  const void* data = nullptr;
  std::int64_t stride = 0;
  DType dtype = DType::kFloat32;
};

// With h_n = hidden[rows[n]], y = targets[n], c = class_weights (or 1), eps = label_smoothing, per row n:
//
//   z   = weight . h_n + bias, then softcap * tanh(z / softcap) if there is a softcap
//   lse = log sum_v e^(z_v), p_v = e^(z_v - lse), nll_v = lse - z_v
//   ce  = (1 - eps) c_y nll_y + eps / V * sum_v c_v nll_v + z_loss * lse^2
//   kl  = sum_v q_v (log q_v - log p_v), q of the teacher: from its hidden states through the same head, or from
//         sum_top q (log q - log p) + tail_negative_entropy - tail_mean_weight . h_n + tail_mass * lse
//   gradient[n] = ce_share[n] * d ce / d h_n + kl_share[n] * d kl / d h_n
//
// Natural logarithms; all tensors are contiguous except the matrices; a null pointer leaves that input or output out.
struct LinearCrossEntropy {
  std::int64_t rows_counted = 0, hidden_size = 0, vocabulary = 0;  // N, D, V
  Matrix hidden;                                                   // [T, D]
  Matrix weight;                                                   // [V, D]
  const std::int64_t* rows = nullptr;                              // [N], in [0, T)
  const std::int64_t* targets = nullptr;                           // [N], in [0, V)
  const float* ce_share = nullptr;                                 // [N], null: 0
  const float* kl_share = nullptr;                                 // [N], null: 0
  const float* bias = nullptr;                                     // [V]
  const float* class_weights = nullptr;                            // [V]
  double label_smoothing = 0, z_loss = 0;
  double softcap = 0;  // 0: none

  // The teacher: hidden states, or statistics, or neither; U rows of them.
  const std::int64_t* teacher_rows = nullptr;    // [N], in [0, U); null: row n for n
  Matrix teacher_hidden;                         // [U, D] of hidden's dtype
  const float* tail_mean_weight = nullptr;       // [U, D]: sum over the tail of q_v weight_v
  const float* tail_mass = nullptr;              // [U]: sum over the tail of q_v
  const float* tail_negative_entropy = nullptr;  // [U]: sum over the tail of q_v (log q_v - bias_v)
  const std::int32_t* top_indices = nullptr;     // [U, K]
  const float* top_log_probs = nullptr;          // [U, K]
  std::int64_t top_count = 0;                    // K

  // Outputs, [N] each but for the gradient, [N, D] in hidden's dtype.
  float* ce = nullptr;
  float* kl = nullptr;
  float* lse = nullptr;
  float* log_prob = nullptr;  // of the target
  float* entropy = nullptr;   // of p
  bool* correct = nullptr;    // the target is the first of the largest logits
  void* gradient = nullptr;

  // Bound on the logits held at once, V * 4 bytes a row (twice that with a teacher's hidden states), but never below
  // one panel of rows (32 with AVX-512).
  std::int64_t max_workspace_bytes = 0;
  int threads = 1;
  Isa isa = best_isa();
};

// The level that is quickest here for matrices of these types.
Isa quickest_isa(DType hidden, DType weight);

// Computes every output that is not null. Equal arguments, `threads` and `isa` among them, give equal bits. Logits,
// softmax and sums are float32 or wider; where hidden and weight are bfloat16 and the level multiplies bfloat16, the
// gradient with respect to the logits is rounded to bfloat16 before it meets the weight.
//
// A NaN or infinite logit makes the row's loss NaN. Throws std::invalid_argument for sizes, indices or combinations
// that cannot be meant.
void linear_cross_entropy(const LinearCrossEntropy& problem);

}  // namespace dive::cpu
