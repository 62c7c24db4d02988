// Products of a few rows with a matrix, for *_kernel.cpp files. M rows of `a`, N results per row, K terms in each.
#pragma once

#include <utility>

#include "cpu/vec.h"

namespace dive::cpu::DIVE_ISA {

// The lower (kUpper = 0) or upper halves of every segment of kWidth lanes, a's first, then b's.
template <int kWidth, int kUpper, int... kLane>
inline vf halves(vf a, vf b, std::integer_sequence<int, kLane...>) {
  constexpr int kHalf = kWidth / 2;
  return __builtin_shufflevector(
      a, b, (kLane / kWidth * kWidth + kLane % kHalf + kUpper * kHalf + (kLane % kWidth < kHalf ? 0 : kLanes))...);
}

// Lane i of the result is the sum of the lanes of v[i]; v is used up.
template <int kCount = kLanes>
inline vf sums(vf* v) {
  if constexpr (kCount == 1) {
    return v[0];
  } else {
    constexpr std::make_integer_sequence<int, kLanes> lanes;
#pragma GCC unroll 16
    for (int i = 0; i < kCount / 2; ++i) {
      v[i] = halves<kCount, 0>(v[i], v[i + kCount / 2], lanes) + halves<kCount, 1>(v[i], v[i + kCount / 2], lanes);
    }
    return sums<kCount / 2>(v);
  }
}

// Scalar products of kM rows of `a` with kN rows of `b`, kM * kN = kLanes of them. Rows of `a` are padded with zeros.
template <int kM, int kN>
inline vf dot_tile(const float* a, std::int64_t stride_a, const float* const* b, std::int64_t k) {
  static_assert(kM * kN == kLanes);
  vf total[kLanes] = {};
  const auto add = [&](std::int64_t i, auto load_b) {
    vf columns[kN];
#pragma GCC unroll 16
    for (int n = 0; n < kN; ++n) columns[n] = load_b(b[n] + i);
#pragma GCC unroll 4
    for (int m = 0; m < kM; ++m) {
      const vf row = load(a + m * stride_a + i);
#pragma GCC unroll 16
      for (int n = 0; n < kN; ++n) total[m * kN + n] += row * columns[n];
    }
  };
  std::int64_t i = 0;
  for (; i + kLanes <= k; i += kLanes) add(i, [](const float* p) { return load(p); });
  if (i < k) add(i, [rest = static_cast<int>(k - i)](const float* p) { return load_partial(p, rest); });
  return sums(total);
}

template <int kM>
inline void dot_rows(const float* a, std::int64_t stride_a, const float* b, std::int64_t stride_b, std::int64_t n,
                     std::int64_t k, float* c, std::int64_t stride_c) {
  constexpr int kN = kLanes / kM;
  for (std::int64_t first = 0; first < n; first += kN) {
    const int used = n - first < kN ? static_cast<int>(n - first) : kN;
    const float* columns[kN];
    for (int j = 0; j < kN; ++j) columns[j] = b + (first + (j < used ? j : used - 1)) * stride_b;
    float found[kLanes];
    store(found, dot_tile<kM, kN>(a, stride_a, columns, k));
    for (int i = 0; i < kM; ++i) {
      for (int j = 0; j < used; ++j) c[i * stride_c + first + j] += found[i * kN + j];
    }
  }
}

// c[i, j] += a[i, :] . b[j, :] with rows of K; rows of `a` are padded with zeros to whole vectors. The order in which a
// result is summed depends on K alone.
inline void add_dots(const float* a, std::int64_t stride_a, int m, const float* b, std::int64_t stride_b,
                     std::int64_t n, std::int64_t k, float* c, std::int64_t stride_c) {
  int i = 0;
  for (; i + 4 <= m; i += 4) dot_rows<4>(a + i * stride_a, stride_a, b, stride_b, n, k, c + i * stride_c, stride_c);
  for (; i < m; ++i) dot_rows<1>(a + i * stride_a, stride_a, b, stride_b, n, k, c + i * stride_c, stride_c);
}

// Vectors of columns in a tile of 4 rows: what the registers hold.
inline constexpr int kTileVectors = kManyRegisters ? 4 : 2;

// a[i, k] lies at a + i * stride_row + k * stride_k, so that `a` may be read transposed.
struct Operand {
  const float* data;
  std::int64_t stride_row, stride_k;
};

template <int kM, int kV, bool kPartial>
inline void outer_tile(Operand a, std::int64_t k, const float* b, std::int64_t stride_b, int lanes, float* c,
                       std::int64_t stride_c, bool accumulate) {
  vf total[kM][kV];
#pragma GCC unroll 4
  for (int m = 0; m < kM; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < kV; ++v) total[m][v] = accumulate ? load(c + m * stride_c + v * kLanes) : vf{};
  }
  for (std::int64_t i = 0; i < k; ++i) {
    vf columns[kV];
#pragma GCC unroll 4
    for (int v = 0; v < kV; ++v) {
      const float* p = b + i * stride_b + v * kLanes;
      columns[v] = kPartial ? load_partial(p, lanes) : load(p);
    }
#pragma GCC unroll 4
    for (int m = 0; m < kM; ++m) {
      const vf factor = splat(a.data[m * a.stride_row + i * a.stride_k]);
#pragma GCC unroll 4
      for (int v = 0; v < kV; ++v) total[m][v] += factor * columns[v];
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < kM; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < kV; ++v) store(c + m * stride_c + v * kLanes, total[m][v]);
  }
}

template <int kV, bool kPartial>
inline void outer_columns(Operand a, std::int64_t m, std::int64_t k, const float* b, std::int64_t stride_b, int lanes,
                          float* c, std::int64_t stride_c, bool accumulate) {
  std::int64_t i = 0;
  for (; i + 4 <= m; i += 4) {
    const Operand rows{a.data + i * a.stride_row, a.stride_row, a.stride_k};
    outer_tile<4, kV, kPartial>(rows, k, b, stride_b, lanes, c + i * stride_c, stride_c, accumulate);
  }
  for (; i < m; ++i) {
    const Operand rows{a.data + i * a.stride_row, a.stride_row, a.stride_k};
    outer_tile<1, kV, kPartial>(rows, k, b, stride_b, lanes, c + i * stride_c, stride_c, accumulate);
  }
}

// c[i, :] = or += sum over k of a[i, k] * b[k, :], rows of N. Rows of `c` have room for whole vectors.
inline void outer(Operand a, std::int64_t m, std::int64_t k, const float* b, std::int64_t stride_b, std::int64_t n,
                  float* c, std::int64_t stride_c, bool accumulate) {
  std::int64_t j = 0;
  for (; j + kTileVectors * kLanes <= n; j += kTileVectors * kLanes) {
    outer_columns<kTileVectors, false>(a, m, k, b + j, stride_b, kLanes, c + j, stride_c, accumulate);
  }
  for (; j + kLanes <= n; j += kLanes) {
    outer_columns<1, false>(a, m, k, b + j, stride_b, kLanes, c + j, stride_c, accumulate);
  }
  if (j < n) {
    outer_columns<1, true>(a, m, k, b + j, stride_b, static_cast<int>(n - j), c + j, stride_c, accumulate);
  }
}

}  // namespace dive::cpu::DIVE_ISA
