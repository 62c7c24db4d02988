// Small random decoders with every feature, for tests of what runs them. Every tensor is an allocation of its own and
// of its exact size, so that the address sanitizer sees a read one element too far.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "cpu/decode.h"
#include "engine/check.h"
#include "engine/plan.h"
#include "engine/request.h"

namespace random_decoder {

using namespace dive::engine;

inline void expect(bool holds, const std::string& what) {
  if (holds) return;
  std::fprintf(stderr, "failed: %s\n", what.c_str());
  std::exit(1);
}

struct Random {
  std::mt19937_64 bits;

  std::int64_t below(std::int64_t count) { return static_cast<std::int64_t>(bits() % count); }
  bool coin() { return below(2) == 1; }
  float number(float center, float spread) { return center + spread * (static_cast<float>(below(2001)) / 1000 - 1); }
};

// What the sizes of a decoder are multiples of, whether all its matrices have one dtype, as some devices want it, and,
// where they are not drawn, a hidden size to be steered at, the size of a head and how many share keys and values.
struct Shape {
  std::int64_t unit = 1;
  std::optional<DType> dtype;
  std::int64_t hidden_size = 0;
  int head_size = 0;
  int group = 0;
};

class Memory {
 public:
  explicit Memory(Shape shape = {}) : shape_(shape) {}

  template <class T>
  T* take(std::int64_t count) {
    blocks_.push_back(std::make_unique<std::byte[]>(count * sizeof(T)));
    return reinterpret_cast<T*>(blocks_.back().get());
  }

  const float* vector(Random& random, std::int64_t size, float center, float spread) {
    float* const data = take<float>(size);
    for (std::int64_t i = 0; i < size; ++i) data[i] = random.number(center, spread);
    return data;
  }

  const void* elements(Random& random, std::int64_t count, DType dtype, float spread) {
    if (dtype == DType::kFloat32) return vector(random, count, 0, spread);
    std::uint16_t* const data = take<std::uint16_t>(count);
    for (std::int64_t i = 0; i < count; ++i) {
      const float x = random.number(0, spread);
      std::uint32_t bits;
      std::memcpy(&bits, &x, sizeof bits);
      data[i] = dtype == DType::kBFloat16
                    ? static_cast<std::uint16_t>(bits >> 16)
                    : static_cast<std::uint16_t>((bits >> 16 & 0x8000) | 12 << 10 | random.below(1 << 10));
    }
    return data;
  }

  Weight matrix(Random& random, std::int64_t rows, std::int64_t columns, bool biased) {
    Weight weight = embedding(random, rows, columns);
    if (!shape_.dtype && random.below(4) == 0) {
      weight.row_stride = dive::cpu::int8_stride(columns);
      weight.data = int8(random, rows, columns);
      weight.scales = vector(random, rows, 0.003f, 0.001f);
    }
    if (biased) weight.bias = vector(random, rows, 0, 0.1f);
    return weight;
  }

  // A matrix that is not only multiplied with.
  Weight embedding(Random& random, std::int64_t rows, std::int64_t columns) {
    const std::int64_t stride = columns + (random.coin() ? 0 : random.below(5) * shape_.unit);
    const DType dtype = shape_.dtype.value_or(static_cast<DType>(random.below(3)));
    const void* data = elements(random, (rows - 1) * stride + columns, dtype, 0.3f);
    return {data, dtype, nullptr, rows, columns, stride, nullptr};
  }

  const void* int8(Random& random, std::int64_t rows, std::int64_t columns) {
    using dive::cpu::kInt8Columns, dive::cpu::kInt8Rows;
    const std::int64_t stride = dive::cpu::int8_stride(columns);
    std::int8_t* const data = take<std::int8_t>((rows + kInt8Rows - 1) / kInt8Rows * kInt8Rows * stride);
    for (std::int64_t n = 0; n < rows; ++n) {
      std::int8_t* const row = data + n / kInt8Rows * kInt8Rows * stride + n % kInt8Rows * kInt8Columns;
      for (std::int64_t k = 0; k < columns; ++k) {
        row[k / kInt8Columns * kInt8Rows * kInt8Columns + k % kInt8Columns] =
            static_cast<std::int8_t>(random.below(255) - 127);
      }
    }
    return data;
  }

  // An adapter's two matrices, without gaps.
  Weight pair(Random& random, std::int64_t R, std::int64_t D) {
    const std::int64_t padded = (D + dive::cpu::kRankPanel - 1) / dive::cpu::kRankPanel * dive::cpu::kRankPanel;
    const DType dtype = static_cast<DType>(random.below(3));
    return {elements(random, 2 * R * padded, dtype, 0.3f), dtype, nullptr, 2 * R, padded, padded, nullptr};
  }

 private:
  Shape shape_;
  std::vector<std::unique_ptr<std::byte[]>> blocks_;
};

struct Model {
  Shape shape;
  Memory memory;
  Plan plan;

  explicit Model(std::uint64_t seed, Shape given = {}) : shape(given), memory(given) {
    Random random{std::mt19937_64(seed)};
    const auto size = [&](std::int64_t most) {
      return shape.unit * (1 + random.below((most + shape.unit - 1) / shape.unit));
    };
    plan.kv_heads = 1 + random.below(3);
    plan.heads = plan.kv_heads * (1 + random.below(4));
    plan.head_size = static_cast<int>(shape.unit == 1 ? 2 * (1 + random.below(20)) : size(40));
    // Large enough, now and then, for workers to share an adapter's products.
    plan.hidden_size = size(random.coin() ? 70 : 400);
    if (shape.hidden_size) plan.hidden_size = shape.hidden_size;
    if (shape.head_size) plan.head_size = shape.head_size;
    if (shape.group) plan.heads = plan.kv_heads * shape.group;
    plan.intermediate_size = size(90);
    plan.vocabulary = 2 + random.below(400);
    plan.attention_scale = 1 / std::sqrt(static_cast<float>(plan.head_size));
    plan.attention_softcap = random.coin() ? 20 : 0;
    plan.logit_softcap = random.coin() ? 15 : 0;
    plan.activation = static_cast<dive::cpu::GatedActivation>(random.below(3));
    plan.cache_dtype = shape.dtype.value_or(static_cast<DType>(random.below(3)));
    plan.embedding_scale = random.coin() ? 1 : 3;
    plan.embedding = memory.embedding(random, plan.vocabulary, plan.hidden_size);
    plan.head =
        random.coin() ? plan.embedding : memory.matrix(random, plan.vocabulary, plan.hidden_size, random.coin());
    plan.final_norm = norm(random, plan.hidden_size);
    for (std::int64_t ropes = 1 + random.below(2); ropes > 0; --ropes) {
      const float* frequencies = memory.vector(random, plan.head_size / 2, 0.5f, 0.5f);
      plan.ropes.push_back({{frequencies, frequencies + plan.head_size / 2}, random.number(1, 0.1f)});
    }
    for (std::int64_t layers = 1 + random.below(3); layers > 0; --layers) plan.layers.push_back(layer(random));
    for (std::int64_t adapters = random.below(4) + (shape.hidden_size ? 1 : 0); adapters > 0; --adapters) {
      Adapter adapter;
      for (auto* places : {&adapter.attention, &adapter.block}) {
        for (std::size_t l = 0; l < plan.layers.size(); ++l) {
          places->push_back(random.coin() ? std::optional(steering(random)) : std::nullopt);
        }
      }
      plan.adapters.push_back(std::move(adapter));
    }
    check(plan);
  }

 private:
  Norm norm(Random& random, std::int64_t size) { return {memory.vector(random, size, 1, 0.2f), 1e-5f}; }

  Layer layer(Random& random) {
    const std::int64_t D = plan.hidden_size, I = plan.intermediate_size;
    const std::int64_t queries = plan.heads * plan.head_size, keys = plan.kv_heads * plan.head_size;
    const bool biased = random.coin(), post = random.coin(), per_head = random.coin();
    Layer layer;
    layer.input = norm(random, D);
    layer.mlp = norm(random, D);
    if (post) layer.post_attention = norm(random, D), layer.post_mlp = norm(random, D);
    if (per_head) layer.q = norm(random, plan.head_size), layer.k = norm(random, plan.head_size);
    layer.q_proj = memory.matrix(random, queries, D, biased);
    layer.k_proj = memory.matrix(random, keys, D, biased);
    layer.v_proj = memory.matrix(random, keys, D, biased);
    layer.o_proj = memory.matrix(random, D, queries, false);
    layer.gate_proj = memory.matrix(random, I, D, false);
    layer.up_proj = memory.matrix(random, I, D, false);
    layer.down_proj = memory.matrix(random, D, I, random.coin());
    layer.rope = static_cast<int>(random.below(static_cast<std::int64_t>(plan.ropes.size())));
    layer.window = random.coin() ? 0 : 1 + random.below(100);
    return layer;
  }

  Steering steering(Random& random) {
    const std::int64_t D = plan.hidden_size;
    Steering steering;
    steering.rank = random.below(3) == 0 ? 0 : 1 + random.below(20);
    if (steering.rank) {
      steering.matrices = memory.pair(random, steering.rank, D);
      if (random.coin()) steering.bias = memory.vector(random, steering.rank, 0, 0.1f);
    }
    if (random.coin()) steering.static_push = memory.vector(random, D, 0, 0.2f);
    if (random.coin()) steering.gate_direction = memory.vector(random, D, 0, 0.5f);
    steering.alpha = random.number(1, 0.5f);
    steering.gate_offset = random.number(0, 1);
    steering.activation = static_cast<dive::cpu::Activation>(random.below(5));
    steering.normalize_input = random.coin();
    steering.preserve_norm = random.coin();
    return steering;
  }
};

}  // namespace random_decoder
