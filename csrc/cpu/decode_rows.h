// Scalar products of rows in memory with a few vectors, and functions of vectors. For decode_*_kernel.cpp alone.
#pragma once

#include <math.h>

#include "cpu/decode_kernel.h"
#include "cpu/gemm_tile.h"
#include "cpu/products.h"
#include "cpu/vec.h"

namespace dive::cpu::DIVE_ISA {

struct Int8 {
  std::int8_t value;
};
typedef std::int8_t vb __attribute__((vector_size(kLanes)));

inline vf load(const Int8* p) {
  // GCC 12 makes dozens of instructions of a conversion from 8 to 32 bits that is one.
#if defined(__AVX512F__)
  const __m128i narrow = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return (vf)_mm512_maskz_cvtepi32_ps(0xffff, _mm512_maskz_cvtepi8_epi32(0xffff, narrow));
#elif defined(__AVX2__)
  return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  vb narrow;
  std::memcpy(&narrow, p, sizeof narrow);
  return __builtin_convertvector(__builtin_convertvector(narrow, vi), vf);
#endif
}

// The first min(count, kLanes) elements, zeros after them.
template <typename Element>
[[gnu::always_inline]] inline vf load_some(const Element* p, std::int64_t count) {
  return count >= kLanes ? load(p) : load_partial(p, static_cast<int>(count));
}

template <typename Element>
[[gnu::always_inline]] inline void store_some(Element* p, vf v, std::int64_t count) {
  if (count >= kLanes) {
    store(p, v);
  } else {
    store_partial(p, v, static_cast<int>(count));
  }
}

inline constexpr std::int64_t kLineBytes = 64;

// Calls f with a null pointer of the elements' type.
template <class F>
inline void with_elements(DType dtype, bool int8, F f) {
  if (int8) return f(static_cast<const Int8*>(nullptr));
  switch (dtype) {
    case DType::kFloat32:
      return f(static_cast<const float*>(nullptr));
    case DType::kBFloat16:
      return f(static_cast<const Bf16*>(nullptr));
    case DType::kFloat16:
      return f(static_cast<const F16*>(nullptr));
  }
}

// What memory is asked for while rows are read: what lies `distance` behind a row, and from `end` on, where the reader's
// share of a matrix ends, what it reads after that, from `next` on, so that the next share is on its way when the workers
// have met. Without `next`, what lies behind the end.
struct Ahead {
  std::int64_t distance = 0;  // bytes; 0: nothing is asked for
  const char* end = nullptr;
  const char* next = nullptr;

  const char* of(const void* row) const {
    const char* at = static_cast<const char*>(row) + distance;
    return next && at >= end ? next + (at - end) : at;
  }
};

// Sums over the columns, one vector of partial sums per row of weights and row of x, in the same order whatever kR and
// kB are: that is what makes a row's result independent of its batch.
template <int kR, int kB, bool kAsk, class Element>
[[gnu::always_inline]] inline void dot_tile(const Element* w, std::int64_t w_stride, const float* x,
                                            std::int64_t columns, const char* ahead, vf* totals) {
  // Vectors in a cache line of weights; four steps at a time at most, lest the code grow.
  constexpr int kLine = kLineBytes / static_cast<int>(kLanes * sizeof(Element));
  constexpr int kSteps = kLine < 1 ? 1 : kLine > 4 ? 4 : kLine;
  vf sums[kB][kR];
  unroll<kB>([&](auto b) { unroll<kR>([&](auto r) { sums[b][r] = vf{}; }); });
  const auto add = [&](std::int64_t k, auto load_at) __attribute__((always_inline)) {
    vf weights[kR];
    unroll<kR>([&](auto r) { weights[r] = load_at(w + r * w_stride + k); });
    unroll<kB>([&](auto b) {
      const vf numbers = load_at(x + b * columns + k);
      unroll<kR>([&](auto r) { sums[b][r] += weights[r] * numbers; });
    });
  };
  const auto whole = [](auto* p) __attribute__((always_inline)) { return load(p); };
  std::int64_t k = 0;
  for (; k + kSteps * kLanes <= columns; k += kSteps * kLanes) {
    if (kAsk) __builtin_prefetch(ahead + k * static_cast<std::int64_t>(sizeof(Element)));
    unroll<kSteps>([&](auto step) { add(k + step * kLanes, whole); });
  }
  for (; k + kLanes <= columns; k += kLanes) add(k, whole);
  if (k < columns) {
    const int rest = static_cast<int>(columns - k);
    add(k, [rest](auto* p) { return load_partial(p, rest); });
  }
  unroll<kB>([&](auto b) { unroll<kR>([&](auto r) { totals[b * kLanes + r] = sums[b][r]; }); });
}

// Rows of weights that are read side by side once they are in L1: their sums are what the registers hold (32 with
// AVX-512, 16 without). From memory they are read one after the other, because the processor's own prefetching follows
// one stream at the full speed of the memory, and four of them at half of it.
#if defined(__AVX512F__)
inline constexpr int kRowTile = 4;
#else
inline constexpr int kRowTile = 2;
#endif

// out[b] = scalar products of x[b] with `rows` <= kLanes rows of weights, lane by lane, zeros in the lanes after them.
// kR rows are read side by side; with one, memory is asked for ahead of it.
template <int kR, int kB, class Element>
inline void dot_block(const Element* w, std::int64_t w_stride, int rows, const float* x, std::int64_t columns,
                      const Ahead& ahead, vf* out) {
  vf totals[kB * kLanes];
  int r = 0;
  for (; r + kR <= rows; r += kR) {
    const Element* row = w + r * w_stride;
    dot_tile<kR, kB, kR == 1>(row, w_stride, x, columns, kR == 1 ? ahead.of(row) : nullptr, totals + r);
  }
  for (; r < rows; ++r) dot_tile<1, kB, false>(w + r * w_stride, w_stride, x, columns, nullptr, totals + r);
  if (rows < kLanes) {
    for (; r < kLanes; ++r) unroll<kB>([&](auto b) { totals[b * kLanes + r] = vf{}; });
  }
  for (int b = 0; b < kB; ++b) out[b] = sums(totals + b * kLanes);
}

// The same for `batch` <= kBatchTile rows of x. Where nothing is asked for, the weights are in L1.
template <class Element>
inline void dot_block(const Element* w, std::int64_t w_stride, int rows, const float* x, int batch,
                      std::int64_t columns, const Ahead& ahead, vf* out) {
  const auto with = [&](auto kB) {
    if (ahead.distance) return dot_block<1, kB>(w, w_stride, rows, x, columns, ahead, out);
    return dot_block<kRowTile, kB>(w, w_stride, rows, x, columns, ahead, out);
  };
  static_assert(kBatchTile == 4);
  if (batch == 1) return with(std::integral_constant<int, 1>{});
  if (batch == 2) return with(std::integral_constant<int, 2>{});
  if (batch == 3) return with(std::integral_constant<int, 3>{});
  return with(std::integral_constant<int, 4>{});
}

// Within 2 units in the last place. Near 0 the odd polynomial of Cephes' tanhf, beyond it the exponential.
inline vf tanh(vf x) {
  const vf square = x * x;
  vf p = splat(-5.70498872745e-3f);
  p = p * square + splat(2.06390887954e-2f);
  p = p * square + splat(-5.37397155531e-2f);
  p = p * square + splat(1.33314422036e-1f);
  p = p * square + splat(-3.33332819422e-1f);
  const vf near = x + x * square * p;
  const vf magnitude = select(x < splat(0.0f), -x, x);
  const vf far = splat(1.0f) - splat(2.0f) / (exp(magnitude + magnitude) + splat(1.0f));
  return select(magnitude < splat(0.625f), near, select(x < splat(0.0f), -far, far));
}

// x * sigmoid(2 u) is 0.5 x (1 + tanh(u)) without the cancellation.
inline vf activate(GatedActivation activation, vf x) {
  if (activation == GatedActivation::kSilu) return x * sigmoid(x);
  if (activation == GatedActivation::kGeluTanh) {
    return x * sigmoid(splat(1.5957691216057308f) * (x + splat(0.044715f) * (x * x * x)));
  }
  vf y;
  for (int i = 0; i < kLanes; ++i) y[i] = 0.5f * x[i] * (1.0f + erff(x[i] * 0.70710678118654752f));
  return y;
}

}  // namespace dive::cpu::DIVE_ISA
