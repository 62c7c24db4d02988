#include "cpu/decode.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <thread>
#include <vector>

#include "cpu/thread_pool.h"

namespace dive::cpu {
namespace {

float bits_to_float(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

std::uint32_t float_to_bits(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

float widen_half(std::uint16_t x) {
  const std::uint32_t sign = static_cast<std::uint32_t>(x & 0x8000) << 16, magnitude = x & 0x7fff;
  std::uint32_t bits = float_to_bits(bits_to_float(magnitude << 13) * 5.192296858534828e33f);  // 2^112
  if (magnitude >= 0x7c00) bits = 0x7f800000 | (magnitude & 0x3ff) << 13;
  return bits_to_float(bits | sign);
}

std::uint16_t round_half(float x) {
  std::uint32_t bits = float_to_bits(x);
  const std::uint32_t sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  std::uint32_t result;
  if (bits > 0x7f800000) {
    result = 0x7e00;
  } else if (bits >= 0x477ff000) {
    result = 0x7c00;
  } else if (bits < 0x38800000) {
    result = float_to_bits(bits_to_float(bits) + 0.5f) - 0x3f000000;
  } else {
    result = (bits - (112u << 23) + 0xfff + (bits >> 13 & 1)) >> 13;
  }
  return static_cast<std::uint16_t>(sign | result);
}

float get(const void* data, DType dtype, std::int64_t i) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(data)[i];
  const std::uint16_t bits = static_cast<const std::uint16_t*>(data)[i];
  return dtype == DType::kBFloat16 ? bits_to_float(static_cast<std::uint32_t>(bits) << 16) : widen_half(bits);
}

void put(void* data, DType dtype, std::int64_t i, float x) {
  if (dtype == DType::kFloat32) {
    static_cast<float*>(data)[i] = x;
  } else if (dtype == DType::kFloat16) {
    static_cast<std::uint16_t*>(data)[i] = round_half(x);
  } else {
    const std::uint32_t bits = float_to_bits(x);
    static_cast<std::uint16_t*>(data)[i] =
        static_cast<std::uint16_t>(x != x ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
}

float element(const Weight& weight, std::int64_t row, std::int64_t column) {
  const std::int64_t i = row * weight.row_stride + column;
  if (weight.scales) return static_cast<const std::int8_t*>(weight.data)[i] * weight.scales[row];
  return get(weight.data, weight.dtype, i);
}

struct Range {
  std::int64_t begin, end;
};

Range share(const Worker& worker, std::int64_t count) {
  return {count * worker.index / worker.count, count * (worker.index + 1) / worker.count};
}

float gated(GatedActivation activation, float x) {
  if (activation == GatedActivation::kSilu) return x / (1.0f + std::exp(-x));
  if (activation == GatedActivation::kGelu) return 0.5f * x * (1.0f + std::erf(x * 0.70710678f));
  return 0.5f * x * (1.0f + std::tanh(0.79788456f * (x + 0.044715f * x * x * x)));
}

}  // namespace

void Barrier::wait() {
  const unsigned phase = phase_.load(std::memory_order_acquire);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == count_) {
    arrived_.store(0, std::memory_order_relaxed);
    phase_.fetch_add(1, std::memory_order_release);
    return;
  }
  while (phase_.load(std::memory_order_acquire) == phase) std::this_thread::yield();
}

void run_team(int threads, Isa isa, const std::function<void(const Worker&)>& body) {
  Barrier barrier(threads);
  parallel(threads, [&](int index) { body({index, threads, isa, &barrier}); });
}

void project(const Worker& worker, const Weight* const* weights, int count, const float* x, int batch,
             float* const* outputs) {
  for (int i = 0; i < count; ++i) {
    const Weight& weight = *weights[i];
    const Range rows = share(worker, weight.rows);
    std::vector<float> row(weight.columns);
    for (std::int64_t n = rows.begin; n < rows.end; ++n) {
      for (std::int64_t k = 0; k < weight.columns; ++k) row[k] = element(weight, n, k);
      for (int b = 0; b < batch; ++b) {
        double total = 0;
        for (std::int64_t k = 0; k < weight.columns; ++k) total += double{x[b * weight.columns + k]} * row[k];
        outputs[i][b * weight.rows + n] = static_cast<float>(total) + (weight.bias ? weight.bias[n] : 0.0f);
      }
    }
  }
}

void quantize_int8(const Weight& weight, std::int8_t* out, float* scales, Isa, int threads) {
  parallel(threads, [&](int index) {
    for (std::int64_t n = weight.rows * index / threads; n < weight.rows * (index + 1) / threads; ++n) {
      float largest = 0;
      for (std::int64_t k = 0; k < weight.columns; ++k) largest = std::max(largest, std::fabs(element(weight, n, k)));
      scales[n] = largest / 127;
      const float inverse = largest > 0 ? 127 / largest : 0;
      for (std::int64_t k = 0; k < weight.columns; ++k) {
        out[n * weight.columns + k] = static_cast<std::int8_t>(std::lrint(element(weight, n, k) * inverse));
      }
    }
  });
}

void rms_norm(const Worker& worker, const float* x, const float* weight, float eps, std::int64_t rows,
              std::int64_t size, float* out) {
  const Range range = share(worker, rows);
  for (std::int64_t i = range.begin; i < range.end; ++i) {
    double squares = 0;
    for (std::int64_t d = 0; d < size; ++d) squares += double{x[i * size + d]} * x[i * size + d];
    const float inverse = 1.0f / std::sqrt(static_cast<float>(squares / size) + eps);
    for (std::int64_t d = 0; d < size; ++d) out[i * size + d] = x[i * size + d] * inverse * weight[d];
  }
}

void rope(const Worker& worker, float* x, const float* cos, const float* sin, int batch, int heads, int head_size) {
  const Range range = share(worker, std::int64_t{batch} * heads);
  const int half = head_size / 2;
  for (std::int64_t i = range.begin; i < range.end; ++i) {
    float* head = x + i * head_size;
    const float *c = cos + i / heads * head_size, *s = sin + i / heads * head_size;
    for (int e = 0; e < half; ++e) {
      const float low = head[e], high = head[e + half];
      head[e] = low * c[e] - high * s[e];
      head[e + half] = high * c[e + half] + low * s[e + half];
    }
  }
}

void append_to_cache(const Worker& worker, const AttentionShape& shape, const float* keys, const float* values,
                     const CacheRow* rows, int batch) {
  const Range range = share(worker, std::int64_t{batch} * shape.kv_heads);
  const int size = shape.head_size;
  for (std::int64_t i = range.begin; i < range.end; ++i) {
    const CacheRow& row = rows[i / shape.kv_heads];
    const std::int64_t to = i % shape.kv_heads * row.head_stride + (row.length - 1) * size;
    for (int e = 0; e < size; ++e) {
      put(row.keys, shape.cache_dtype, to + e, keys[i * size + e]);
      put(row.values, shape.cache_dtype, to + e, values[i * size + e]);
    }
  }
}

void attention(const Worker& worker, const AttentionShape& shape, const float* q, const CacheRow* rows, int batch,
               float* out) {
  const Range range = share(worker, std::int64_t{batch} * shape.heads);
  const int size = shape.head_size;
  std::vector<double> total(size);
  for (std::int64_t i = range.begin; i < range.end; ++i) {
    const CacheRow& row = rows[i / shape.heads];
    const std::int64_t base = i % shape.heads / (shape.heads / shape.kv_heads) * row.head_stride;
    float largest = -std::numeric_limits<float>::infinity();
    double mass = 0;
    std::fill(total.begin(), total.end(), 0.0);
    for (std::int64_t s = row.first; s < row.length; ++s) {
      float score = 0;
      for (int e = 0; e < size; ++e) score += q[i * size + e] * get(row.keys, shape.cache_dtype, base + s * size + e);
      score *= shape.scale;
      if (shape.softcap > 0) score = shape.softcap * std::tanh(score / shape.softcap);
      if (score > largest) {
        const double shrink = std::exp(double{largest} - score);
        mass *= shrink;
        for (double& t : total) t *= shrink;
        largest = score;
      }
      const double weight = std::exp(double{score} - largest);
      mass += weight;
      for (int e = 0; e < size; ++e) total[e] += weight * get(row.values, shape.cache_dtype, base + s * size + e);
    }
    for (int e = 0; e < size; ++e) out[i * size + e] = static_cast<float>(total[e] / mass);
  }
}

void gated_activation(const Worker& worker, GatedActivation activation, const float* gate, const float* up,
                      std::int64_t count, float* out) {
  const Range range = share(worker, count);
  for (std::int64_t i = range.begin; i < range.end; ++i) out[i] = gated(activation, gate[i]) * up[i];
}

void add(const Worker& worker, const float* a, const float* b, std::int64_t count, float* out) {
  const Range range = share(worker, count);
  for (std::int64_t i = range.begin; i < range.end; ++i) out[i] = a[i] + b[i];
}

void softcap(const Worker& worker, float* x, std::int64_t count, float cap) {
  const Range range = share(worker, count);
  for (std::int64_t i = range.begin; i < range.end; ++i) x[i] = cap * std::tanh(x[i] / cap);
}

void embed(const Worker& worker, const Weight& embedding, const std::int64_t* tokens, int batch, float scale,
           float* out) {
  const Range range = share(worker, batch);
  for (std::int64_t b = range.begin; b < range.end; ++b) {
    for (std::int64_t d = 0; d < embedding.columns; ++d) {
      out[b * embedding.columns + d] = element(embedding, tokens[b], d) * scale;
    }
  }
}

void argmax(const Worker& worker, const float* logits, int batch, std::int64_t vocabulary, std::int64_t* found) {
  const Range range = share(worker, batch);
  for (std::int64_t b = range.begin; b < range.end; ++b) {
    const float* row = logits + b * vocabulary;
    found[b] = std::max_element(row, row + vocabulary) - row;
  }
}

}  // namespace dive::cpu
