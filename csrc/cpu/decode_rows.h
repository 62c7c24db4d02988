// Scalar products of rows in memory with a few vectors, and functions of vectors. For decode_*_kernel.cpp alone.
#pragma once

#include <math.h>

#include "cpu/decode_kernel.h"
#include "cpu/gemm_tile.h"
#include "cpu/products.h"
#include "cpu/vec.h"

namespace dive::cpu::DIVE_ISA {

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
inline void with_elements(DType dtype, F f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(static_cast<const float*>(nullptr));
    case DType::kBFloat16:
      return f(static_cast<const Bf16*>(nullptr));
    case DType::kFloat16:
      return f(static_cast<const F16*>(nullptr));
  }
}

// How memory is asked for while it is read, in the order of its addresses. The processor's own prefetching follows one
// stream of loads at the full speed of the memory, and two or four at half of it; but it ends at every page, and the
// first load of the next page waits until its address is translated, which a virtual machine's two layers of tables
// make slow. So a line about every half page is asked for eight pages before it is used, and its page's address with
// it; more of them disturb the stream. Kernels that compute while they read look less far ahead than ones that only
// load, so they bring lines into L2 as well. On two cores of a virtual Zen 4 the first made reading 1.2 to 1.6 times as
// fast, the second a step with int8 weights 1.2 times.
inline constexpr std::int64_t kPagesAhead = 32768, kTouch = 2304, kLinesAhead = 6144;

// Where the reader's share of a matrix ends, at `end`, it goes on at `next`, so that its next share is on its way when
// the workers have met. Without `next` it asks for what lies behind the end.
struct Ahead {
  bool asks = false;
  const char* end = nullptr;
  const char* next = nullptr;

  const char* of(const void* used, std::int64_t distance) const {
    const char* at = static_cast<const char*>(used) + distance;
    return next && at >= end ? next + (at - end) : at;
  }
  // Asks for the line kPagesAhead behind this one, for its page's sake.
  [[gnu::always_inline]] void touch(const void* used) const { __builtin_prefetch(of(used, kPagesAhead)); }
};

// Into L2: L1 has no room for what is read so much later. Inlined early, or GCC would drop the call of a function that
// computes nothing.
[[gnu::always_inline]] inline void ask_for_line(const char* line) { __builtin_prefetch(line, 0, 2); }

// Rows of x that meet a weight together: their arithmetic is done while the next weights come, that of further rows is
// not. At most kBatchTile of them; kFew where registers hold no more.
inline constexpr int kBatchTile = kManyRegisters ? 8 : 4, kFew = 4;

// Numbers of x that fit into an L1 of 32 KiB, with room for what passes through: rows of x are read again for every row
// of weights.
inline constexpr std::int64_t kMostNumbers = 6144;

// Columns that all rows of weights meet before the next ones where x does not fit: so many of 8 rows do. A sum over a
// row is one over such parts, each of which begins with what those before it came to; few rows of x, which fit, are
// summed in the same way, so that a result does not depend on how many there are.
inline std::int64_t part_size(std::int64_t columns) {
  constexpr std::int64_t kMost = kMostNumbers / 8, kUnit = 32;
  // About equal ones: while a short one is read, too little would be asked for.
  const std::int64_t parts = (columns + kMost - 1) / kMost;
  return ((columns + parts - 1) / parts + kUnit - 1) / kUnit * kUnit;
}

// Rows of weights and rows of x as they are. The tile's sums are over the columns, one vector of partial sums per row
// of weights and row of x, in the same order whatever kR and kB are: that is what makes a row's result independent of
// its batch. With `more` they begin with what `totals` hold. With kAsk, memory is asked for from `ahead` on.
template <class E>
struct PlainRows {
  using Element = E;
  static constexpr int kMostRows = kBatchTile;
  // Rows of weights that are read side by side once they are in L1, with kFew rows as many as registers hold sums for.
  static constexpr int kRowTile = kManyRegisters ? 4 : 2;

  static std::int64_t x_stride(std::int64_t columns) { return columns; }

  template <int kR, int kB, bool kAsk>
  [[gnu::always_inline]] static void tile(const Element* w, std::int64_t w_stride, const float* x,
                                          std::int64_t x_stride, std::int64_t columns, const char* ahead, bool more,
                                          vf* totals) {
    // Vectors in a cache line of weights; four steps at a time at most, lest the code grow.
    constexpr int kLine = kLineBytes / static_cast<int>(kLanes * sizeof(Element));
    constexpr int kSteps = kLine < 1 ? 1 : kLine > 4 ? 4 : kLine;
    vf sums[kB][kR];
    unroll<kB>([&](auto b) { unroll<kR>([&](auto r) { sums[b][r] = more ? totals[b * kLanes + r] : vf{}; }); });
    const auto add = [&](std::int64_t k, auto load_at) __attribute__((always_inline)) {
      vf weights[kR];
      unroll<kR>([&](auto r) { weights[r] = load_at(w + r * w_stride + k); });
      unroll<kB>([&](auto b) {
        const vf numbers = load_at(x + b * x_stride + k);
        unroll<kR>([&](auto r) { sums[b][r] += weights[r] * numbers; });
      });
    };
    const auto whole = [](auto* p) __attribute__((always_inline)) { return load(p); };
    std::int64_t k = 0;
    for (; k + kSteps * kLanes <= columns; k += kSteps * kLanes) {
      if (kAsk) ask_for_line(ahead + k * static_cast<std::int64_t>(sizeof(Element)));
      unroll<kSteps>([&](auto step) { add(k + step * kLanes, whole); });
    }
    for (; k + kLanes <= columns; k += kLanes) add(k, whole);
    if (k < columns) {
      const int rest = static_cast<int>(columns - k);
      add(k, [rest](auto* p) { return load_partial(p, rest); });
    }
    unroll<kB>([&](auto b) { unroll<kR>([&](auto r) { totals[b * kLanes + r] = sums[b][r]; }); });
  }
};

// out[b * kStride] = scalar products of x[b] with `rows` <= kLanes rows of weights, lane by lane, zeros in the lanes
// after them. kR rows are read side by side; with one, memory is asked for ahead of it.
template <class Rows, int kStride, int kR, int kB>
inline void dot_block(const typename Rows::Element* w, std::int64_t w_stride, int rows, const float* x,
                      std::int64_t columns, const Ahead& ahead, vf* out) {
  using Element = typename Rows::Element;
  constexpr std::int64_t kBytes = sizeof(Element);
  const std::int64_t x_stride = Rows::x_stride(columns), part = part_size(columns);
  const int parts = static_cast<int>((columns + part - 1) / part);
  const bool part_by_part = kB * columns > kMostNumbers;
  const int rows_ahead = static_cast<int>((kLinesAhead / kBytes + part - 1) / part);
  vf totals[kB * kLanes];
  std::int64_t touched = 0;
  // Asks for the page of a piece that is read much later; returns where the piece lies that is read kLinesAhead later.
  const auto ask = [&](int r, std::int64_t k) {
    const Element* const used = w + r * w_stride + k;
    if (!part_by_part) {
      for (; touched < (r + 1) * w_stride * kBytes; touched += kTouch) {
        ahead.touch(reinterpret_cast<const char*>(w) + touched);
      }
      return ahead.of(used, kLinesAhead);
    }
    const Element* const next = k + part < columns ? used + part : w + (rows + r) * w_stride;
    __builtin_prefetch(ahead.of(next, 0));
    if (r + rows_ahead < rows) return ahead.of(used + rows_ahead * w_stride, 0);
    return ahead.of(next + (rows_ahead - rows) * w_stride, 0);
  };
  const auto meet = [&](int r, std::int64_t k, auto width) __attribute__((always_inline)) {
    const std::int64_t some = columns - k < part ? columns - k : part;
    const Element* const row = w + r * w_stride + k;
    if (kR == 1 && ahead.asks) {
      Rows::template tile<width, kB, true>(row, w_stride, x + k, x_stride, some, ask(r, k), k > 0, totals + r);
    } else {
      Rows::template tile<width, kB, false>(row, w_stride, x + k, x_stride, some, nullptr, k > 0, totals + r);
    }
  };
  const int tiles = rows / kR, outer = part_by_part ? parts : tiles, inner = part_by_part ? tiles : parts;
  for (int i = 0; i < outer; ++i) {
    for (int j = 0; j < inner; ++j) {
      meet((part_by_part ? j : i) * kR, (part_by_part ? i : j) * part, std::integral_constant<int, kR>{});
    }
  }
  int r = tiles * kR;
  if constexpr (kR > 1) {
    for (; r < rows; ++r) {
      for (int i = 0; i < parts; ++i) meet(r, i * part, std::integral_constant<int, 1>{});
    }
  }
  if (rows < kLanes) {
    for (; r < kLanes; ++r) unroll<kB>([&](auto b) { totals[b * kLanes + r] = vf{}; });
  }
  for (int b = 0; b < kB; ++b) out[b * kStride] = sums(totals + b * kLanes);
}

// The same for `batch` <= Rows::kMostRows rows of x. Where nothing is asked for, the weights are in L1.
template <class Rows, int kStride = 1>
inline void dot_block(const typename Rows::Element* w, std::int64_t w_stride, int rows, const float* x, int batch,
                      std::int64_t columns, const Ahead& ahead, vf* out) {
  unroll<Rows::kMostRows>([&](auto before) {
    constexpr int kB = before + 1;
    if (batch != kB) return;
    if constexpr (Rows::kRowTile > 1 && kB <= kFew) {
      if (!ahead.asks) return dot_block<Rows, kStride, Rows::kRowTile, kB>(w, w_stride, rows, x, columns, ahead, out);
    }
    dot_block<Rows, kStride, 1, kB>(w, w_stride, rows, x, columns, ahead, out);
  });
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
