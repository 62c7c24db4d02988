// What a decoder is: sizes, weights by pointer, and the adapters that steer it. Memory is the caller's; whoever makes a
// plan keeps what it points to alive and unchanged while the plan is used.
// D hidden size, I intermediate size, H heads, G key/value heads, E head size, V vocabulary, R adapter rank.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "cpu/decode.h"
#include "cpu/steer.h"

namespace dive::engine {

using cpu::DType;
using cpu::Weight;

// x / sqrt(mean(x^2) + eps) * weight. Families that multiply by (1 + w) hand over 1 + w.
struct Norm {
  const float* weight = nullptr;  // null: there is no such norm
  float eps = 0;
};

// Positions p turn a head's pair i by p * inverse_frequency[i]; cosine and sine are multiplied by scaling.
struct Rope {
  std::vector<float> inverse_frequency;  // E / 2
  float scaling = 1;
};

//   x += post_attention(o(attention(q, k, v of input(x))))     where the post norms are there
//   x += post_mlp(down(act(gate(mlp(x))) * up(mlp(x))))
struct Layer {
  Norm input, post_attention, mlp, post_mlp;
  Norm q, k;  // per head, before rope
  Weight q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj;
  int rope = 0;             // index into Plan::ropes
  std::int64_t window = 0;  // a position sees this many, itself included; 0: all before it
};

// One adapter at one place; the formula is in cpu/steer.h. Null means absent.
struct Steering {
  std::int64_t rank = 0;
  Weight matrices{};                   // [2 R, D padded to cpu::kRankPanel], see there
  const float* bias = nullptr;         // [R], down's
  const float* static_push = nullptr;  // [D]
  float alpha = 1;
  const float* gate_direction = nullptr;  // [D]
  float gate_offset = 0;
  cpu::Activation activation = cpu::Activation::kSilu;
  bool normalize_input = false, preserve_norm = false;
};

// One entry per layer, empty where the adapter leaves the layer alone.
struct Adapter {
  std::vector<std::optional<Steering>> attention, block;
};

struct Plan {
  std::int64_t hidden_size = 0, intermediate_size = 0, vocabulary = 0;
  int heads = 0, kv_heads = 0, head_size = 0;
  float attention_scale = 0;
  float attention_softcap = 0, logit_softcap = 0;  // 0: none
  cpu::GatedActivation activation = cpu::GatedActivation::kSilu;
  DType cache_dtype = DType::kFloat32;
  Weight embedding{};  // [V, D]
  float embedding_scale = 1;
  std::vector<Rope> ropes;
  std::vector<Layer> layers;
  Norm final_norm;
  Weight head{};  // [V, D]
  std::vector<Adapter> adapters;
};

}  // namespace dive::engine
