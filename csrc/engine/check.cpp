#include "engine/check.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

namespace dive::engine {
namespace {

// Products of two sizes with the size of an element stay below 2^63, and indices below 2^31.
constexpr std::int64_t kMostSize = std::int64_t{1} << 30;
// Sums of so many products of bytes fit into 32 bits.
constexpr std::int64_t kMostInt8Columns = 1 << 17;
// Of a sequence: rope's positions are float32 numbers, long inexact there.
constexpr std::int64_t kMostPositions = std::int64_t{1} << 31;

[[noreturn]] void refuse(const std::string& part, const std::string& what) {
  throw std::invalid_argument(part + " " + what);
}

std::string shape(std::int64_t rows, std::int64_t columns) {
  std::string text = "[";
  return text.append(std::to_string(rows)).append(", ").append(std::to_string(columns)).append("]");
}

void in_range(const std::string& part, std::int64_t value, std::int64_t least, std::int64_t most) {
  if (value < least || value > most) {
    refuse(part, "is " + std::to_string(value) + ", expected " + std::to_string(least) + " to " + std::to_string(most));
  }
}

template <class Enum>
void one_of(const std::string& part, Enum value, Enum last) {
  in_range(part, static_cast<int>(value), 0, static_cast<int>(last));
}

void finite(const std::string& part, float value, float least = -std::numeric_limits<float>::infinity()) {
  if (!std::isfinite(value) || value < least) {
    const std::string bound = std::isfinite(least) ? " >= " + std::to_string(least) : "";
    refuse(part, "is " + std::to_string(value) + ", expected a finite number" + bound);
  }
}

// `bytes` from the address on, of elements of `element` bytes.
void memory(const std::string& part, const void* address, std::int64_t bytes, std::int64_t element) {
  const std::uintptr_t first = reinterpret_cast<std::uintptr_t>(address);
  if (first == 0) refuse(part, "has no data");
  if (first % element != 0) refuse(part, "is not aligned to its elements of " + std::to_string(element) + " bytes");
  if (static_cast<std::uintptr_t>(bytes) > std::numeric_limits<std::uintptr_t>::max() - first) {
    refuse(part, "reaches beyond the end of memory");
  }
}

void vector(const std::string& part, const float* address, std::int64_t size) {
  if (address != nullptr) memory(part, address, size * 4, 4);
}

// A matrix [rows, columns], where rows = -1 leaves their number open.
void matrix(const std::string& part, const Weight& weight, std::int64_t rows, std::int64_t columns) {
  if (weight.columns != columns || (rows >= 0 && weight.rows != rows)) {
    refuse(part, "is " + shape(weight.rows, weight.columns) + ", expected " +
                     (rows < 0 ? "[any, " + std::to_string(columns) + "]" : shape(rows, columns)));
  }
  in_range(part + " rows", weight.rows, 1, kMostSize);
  if (weight.rows > 1) in_range(part + " row stride", weight.row_stride, columns, kMostSize);
  one_of(part + " dtype", weight.dtype, DType::kFloat16);
  if (weight.scales) {
    const std::int64_t stride = cpu::int8_stride(columns), lines = (weight.rows + cpu::kInt8Rows - 1) / cpu::kInt8Rows;
    in_range(part + " columns of int8", columns, 1, kMostInt8Columns);
    in_range(part + " row stride of int8", weight.row_stride, stride, stride);
    memory(part, weight.data, lines * cpu::kInt8Rows * stride, 1);
  } else {
    const std::int64_t element = cpu::size_of(weight.dtype);
    memory(part, weight.data, ((weight.rows - 1) * weight.row_stride + columns) * element, element);
  }
  vector(part + " scales", weight.scales, weight.rows);
  vector(part + " bias", weight.bias, weight.rows);
}

void norm(const std::string& part, const Norm& norm, std::int64_t size, bool needed) {
  if (norm.weight == nullptr && !needed) return;
  memory(part, norm.weight, size * 4, 4);
  finite(part + " eps", norm.eps, 0);
}

void layer(const std::string& name, const Plan& plan, const Layer& layer) {
  const std::int64_t D = plan.hidden_size, I = plan.intermediate_size, E = plan.head_size;
  const std::int64_t queries = plan.heads * E, keys = plan.kv_heads * E;
  norm(name + "the input norm", layer.input, D, true);
  norm(name + "the norm behind the attention", layer.post_attention, D, false);
  norm(name + "the norm before the MLP", layer.mlp, D, true);
  norm(name + "the norm behind the MLP", layer.post_mlp, D, false);
  norm(name + "q_norm", layer.q, E, false);
  norm(name + "k_norm", layer.k, E, false);
  matrix(name + "q_proj", layer.q_proj, queries, D);
  matrix(name + "k_proj", layer.k_proj, keys, D);
  matrix(name + "v_proj", layer.v_proj, keys, D);
  matrix(name + "o_proj", layer.o_proj, D, queries);
  matrix(name + "gate_proj", layer.gate_proj, I, D);
  matrix(name + "up_proj", layer.up_proj, I, D);
  matrix(name + "down_proj", layer.down_proj, D, I);
  in_range(name + "rope", layer.rope, 0, static_cast<std::int64_t>(plan.ropes.size()) - 1);
  in_range(name + "window", layer.window, 0, std::numeric_limits<std::int64_t>::max());
}

void steering(const std::string& name, const Plan& plan, const Steering& steering) {
  const std::int64_t D = plan.hidden_size, R = steering.rank;
  in_range(name + "rank", R, 0, kMostSize);
  if (R > 0) {
    const std::int64_t padded = (D + cpu::kRankPanel - 1) / cpu::kRankPanel * cpu::kRankPanel;
    matrix(name + "matrices", steering.matrices, 2 * R, padded);
    if (steering.matrices.scales || steering.matrices.bias || steering.matrices.row_stride != padded) {
      refuse(name + "matrices", "are int8, biased or have gaps, expected rows one behind the other");
    }
  }
  vector(name + "bias", steering.bias, R);
  vector(name + "static", steering.static_push, D);
  vector(name + "gate_direction", steering.gate_direction, D);
  one_of(name + "activation", steering.activation, cpu::Activation::kTanh);
}

void sizes(const Plan& plan) {
  in_range("hidden_size", plan.hidden_size, 1, kMostSize);
  in_range("intermediate_size", plan.intermediate_size, 1, kMostSize);
  in_range("vocabulary", plan.vocabulary, 1, kMostSize);
  in_range("heads", plan.heads, 1, kMostSize);
  in_range("kv_heads", plan.kv_heads, 1, kMostSize);
  in_range("head_size", plan.head_size, 1, kMostSize);
  in_range("heads * head_size", std::int64_t{plan.heads} * plan.head_size, 1, kMostSize);
  if (plan.head_size % 2 != 0)
    refuse("head_size", "is " + std::to_string(plan.head_size) + ", expected an even number");
  if (plan.heads % plan.kv_heads != 0) {
    refuse("heads", "are " + std::to_string(plan.heads) + ", expected a multiple of the " +
                        std::to_string(plan.kv_heads) + " key/value heads");
  }
}

void tokens(const Plan& plan, const std::string& part, const std::vector<std::int64_t>& tokens) {
  for (const std::int64_t token : tokens) in_range("a token of " + part, token, 0, plan.vocabulary - 1);
}

void prefilled(const Plan& plan, const std::string& part, const void* data, std::int64_t head_stride,
               std::int64_t stride, std::int64_t count) {
  const std::int64_t element = cpu::size_of(plan.cache_dtype);
  if (plan.kv_heads > 1) in_range(part + " head stride", head_stride, 0, std::numeric_limits<std::int64_t>::max());
  if (count > 1) in_range(part + " stride", stride, plan.head_size, std::numeric_limits<std::int64_t>::max());
  std::int64_t heads, positions, bytes;
  if (__builtin_mul_overflow(plan.kv_heads - 1, head_stride, &heads) ||
      __builtin_mul_overflow(count - 1, stride, &positions) || __builtin_add_overflow(heads, positions, &bytes) ||
      __builtin_add_overflow(bytes, plan.head_size, &bytes) || __builtin_mul_overflow(bytes, element, &bytes)) {
    refuse(part, "reach beyond the end of memory");
  }
  memory(part, data, bytes, element);
}

}  // namespace

void check(const Plan& plan) {
  sizes(plan);
  finite("attention_scale", plan.attention_scale);
  finite("attention_softcap", plan.attention_softcap, 0);
  finite("logit_softcap", plan.logit_softcap, 0);
  finite("embedding_scale", plan.embedding_scale);
  one_of("activation", plan.activation, cpu::GatedActivation::kGelu);
  one_of("cache_dtype", plan.cache_dtype, DType::kFloat16);
  for (std::size_t r = 0; r < plan.ropes.size(); ++r) {
    const std::string name = "rope " + std::to_string(r) + ":";
    const Rope& rope = plan.ropes[r];
    const std::int64_t count = static_cast<std::int64_t>(rope.inverse_frequency.size());
    in_range(name + " the number of frequencies", count, plan.head_size / 2, plan.head_size / 2);
    for (const float frequency : rope.inverse_frequency) finite(name + " a frequency", frequency);
    finite(name + " scaling", rope.scaling);
  }
  matrix("the embedding", plan.embedding, -1, plan.hidden_size);
  if (plan.embedding.scales) refuse("the embedding", "is int8, whose rows do not lie side by side");
  in_range("rows of the embedding", plan.embedding.rows, plan.vocabulary, kMostSize);
  matrix("the head", plan.head, plan.vocabulary, plan.hidden_size);
  norm("the final norm", plan.final_norm, plan.hidden_size, true);
  in_range("the number of layers", static_cast<std::int64_t>(plan.layers.size()), 1, kMostSize);
  for (std::size_t l = 0; l < plan.layers.size(); ++l) layer("layer " + std::to_string(l) + ": ", plan, plan.layers[l]);
  const std::int64_t layers = static_cast<std::int64_t>(plan.layers.size());
  for (std::size_t a = 0; a < plan.adapters.size(); ++a) {
    const std::string name = "adapter " + std::to_string(a);
    for (const auto* places : {&plan.adapters[a].attention, &plan.adapters[a].block}) {
      in_range(name + ": the number of layers", static_cast<std::int64_t>(places->size()), layers, layers);
      for (std::int64_t l = 0; l < layers; ++l) {
        if ((*places)[l]) steering(name + ", layer " + std::to_string(l) + ": ", plan, *(*places)[l]);
      }
    }
  }
}

void check(const Sampling& sampling) {
  finite("temperature", sampling.temperature, 0);
  in_range("top_k", sampling.top_k, 0, std::numeric_limits<std::int64_t>::max());
  if (!(sampling.top_p > 0 && sampling.top_p <= 1)) {
    refuse("top_p", "is " + std::to_string(sampling.top_p) + ", expected a number in (0, 1]");
  }
  if (!(sampling.min_p >= 0 && sampling.min_p <= 1)) {
    refuse("min_p", "is " + std::to_string(sampling.min_p) + ", expected a number in [0, 1]");
  }
  if (!(std::isfinite(sampling.repetition_penalty) && sampling.repetition_penalty > 0)) {
    refuse("repetition_penalty", "is " + std::to_string(sampling.repetition_penalty) + ", expected a number > 0");
  }
}

void check(const Plan& plan, const Request& request, const std::vector<PrefilledLayer>& layers) {
  if (request.prompt.empty()) refuse("the prompt", "is empty");
  tokens(plan, "the prompt", request.prompt);
  tokens(plan, "eos", request.eos);
  tokens(plan, "forced", request.forced);
  for (const int adapter : request.adapters) {
    in_range("an adapter", adapter, 0, static_cast<std::int64_t>(plan.adapters.size()) - 1);
  }
  check(request.sampling);
  if (request.stop) {
    const auto& strings = request.stop->strings;
    if (!request.stop->texts) refuse("stop", "has no texts of tokens");
    if (std::any_of(strings.begin(), strings.end(), [](const std::string& s) { return s.empty(); })) {
      refuse("stop", "holds an empty string");
    }
  }
  in_range("max_new_tokens", request.max_new_tokens, 1, kMostPositions);
  in_range("min_new_tokens", request.min_new_tokens, 0, request.max_new_tokens);
  in_range("prefilled", request.prefilled, 0, kMostPositions);
  in_range("rope_offset", request.rope_offset, -kMostPositions, kMostPositions);
  in_range("the number of forced tokens", static_cast<std::int64_t>(request.forced.size()), 0, request.max_new_tokens);
  if (!request.forced.empty() && request.forced_logits != nullptr) {
    const std::int64_t steps = static_cast<std::int64_t>(request.forced.size());
    memory("forced_logits", request.forced_logits, steps * plan.vocabulary * 4, 4);
  }
  if (request.prefilled == 0) return;
  const std::int64_t count = static_cast<std::int64_t>(plan.layers.size());
  in_range("the number of prefilled layers", static_cast<std::int64_t>(layers.size()), count, count);
  for (std::size_t l = 0; l < layers.size(); ++l) {
    const std::string name = "prefilled layer " + std::to_string(l) + ": ";
    prefilled(plan, name + "keys", layers[l].keys, layers[l].keys_head_stride, layers[l].keys_stride,
              request.prefilled);
    prefilled(plan, name + "values", layers[l].values, layers[l].values_head_stride, layers[l].values_stride,
              request.prefilled);
  }
}

void check_team(int max_rows, int threads, cpu::Isa isa) {
  in_range("max_rows", max_rows, 1, kMostRows);
  in_range("threads", threads, 1, kMostThreads);
  const std::vector<cpu::Isa> usable = cpu::usable_isas();
  if (std::find(usable.begin(), usable.end(), isa) == usable.end()) {
    refuse("isa", "is one that this processor or this build does not have");
  }
}

}  // namespace dive::engine
