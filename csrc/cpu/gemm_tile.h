// The innermost loops of matrix products, and the copies that feed them. For *_kernel.cpp files only, as vec.h.
//
// A block of Words::kTile rows of an operand `a`, one word at a time, is multiplied with kPanel columns of an operand
// `b`, a vector at a time. `b` comes packed in panels: [K][kPanel] words, the columns past the matrix's edge being
// zeros. Where there are tile registers, both are read in tiles.
#pragma once

#include <cstddef>
#include <utility>

#include "cpu/dtype.h"
#include "cpu/tiles.h"
#include "cpu/vec.h"

namespace dive::cpu::DIVE_ISA {

// A tile's sums stay in registers: kVectorTile * 2 of them, 2 more hold a row of `b` and 1 a number of `a`, so 27 of
// the 32 that AVX-512 has and 15 of the 16 elsewhere. Twice as many sums as a fused multiply-add has cycles of latency
// times units (4 * 2) would do; more means fewer loads per multiplication. AArch64's 32 are not so well filled: GCC
// loads all the numbers of `a` before it multiplies, and with 12 of them keeps four sums in memory.
#if defined(__AVX512F__)
inline constexpr int kVectorTile = 12;
#elif defined(__aarch64__)
inline constexpr int kVectorTile = 8;
#else
inline constexpr int kVectorTile = 6;
#endif
inline constexpr int kPanel = 2 * kLanes;

// What one word of `a` and `b` holds: a float, or two bfloat16 that follow each other along K, whose products are added
// in float32. kUnit words along K are multiplied together.
struct FloatWords {
  using Word = float;
  using Vector = vf;
  struct Registers {};
  static constexpr int kDepth = 1, kTile = kVectorTile, kUnit = 1;
  static Vector load(const Word* p) { return DIVE_ISA::load(p); }
  static Vector splat(Word a) { return DIVE_ISA::splat(a); }
  static vf multiply_add(vf c, Vector a, Vector b) { return c + a * b; }
};

#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
struct PairWords {
  using Word = std::uint32_t;
  using Vector = __m512i;
  struct Registers {};
  static constexpr int kDepth = 2, kTile = kVectorTile, kUnit = 1;
  static Vector load(const Word* p) { return _mm512_loadu_si512(p); }
  static Vector splat(Word a) { return _mm512_set1_epi32(static_cast<int>(a)); }
  static vf multiply_add(vf c, Vector a, Vector b) {
    return reinterpret_cast<vf>(
        _mm512_dpbf16_ps(reinterpret_cast<__m512>(c), reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b)));
  }
};
#endif

// Calls f with std::integral_constant 0 ... kCount - 1: an unrolled loop whose counter indexes registers.
template <int... i, class F>
[[gnu::always_inline]] inline void unroll(std::integer_sequence<int, i...>, F f) {
  (f(std::integral_constant<int, i>{}), ...);
}

template <int kCount, class F>
[[gnu::always_inline]] inline void unroll(F f) {
  unroll(std::make_integer_sequence<int, kCount>{}, f);
}

// What will be read after a product, asked for a cache line at a time while the product's tiles multiply: a copy that
// finds it in memory alone waits for it, and so would the tiles if it were asked for all at once.
class Prefetch {
 public:
  // `rows` of `row_bytes`, `stride` bytes apart; at most two such calls.
  void add(const void* first, std::int64_t rows, std::int64_t row_bytes, std::int64_t stride) {
    if (rows <= 0) return;
    regions_[count_++] = {static_cast<const char*>(first), rows, row_bytes, stride};
    lines_ += rows * ((row_bytes + kLine - 1) / kLine);
  }

  // To be asked for in the course of `steps` rows of b.
  void spread(std::int64_t steps) { gap_ = lines_ == 0 ? steps : lines_ < steps ? steps / lines_ : 1; }

  // Rows of b between two lines.
  std::int64_t gap() const { return gap_; }

  // Asks for the next one.
  void line() {
    if (at_ == count_) return;
    Region& region = regions_[at_];
    __builtin_prefetch(region.row + offset_, 0, 2);  // into the second level
    offset_ += kLine;
    if (offset_ < region.row_bytes) return;
    offset_ = 0;
    if (--region.rows == 0) {
      ++at_;
    } else {
      region.row += region.stride;
    }
  }

 private:
  static constexpr std::int64_t kLine = 64;
  struct Region {
    const char* row;
    std::int64_t rows, row_bytes, stride;
  };
  Region regions_[2] = {};
  int count_ = 0, at_ = 0;
  std::int64_t lines_ = 0, offset_ = 0, gap_ = 1;
};

// c[i][m] = sum_k a[i * kRowStride + k * kStep] * b[k][m], on top of what c holds if `add`; c is [kTile][kPanel].
template <class Words, int kRowStride, int kStep>
inline void multiply(const typename Words::Word* a, const typename Words::Word* b, std::int64_t depth, bool add,
                     float* c, Prefetch& prefetch) {
  // What c holds comes last: sums of blocks that are added up lose less than one running total over all of them.
  constexpr int kTile = Words::kTile;
  vf sums[kTile][2] = {};
  for (std::int64_t k = 0; k < depth;) {
    const std::int64_t end = k + prefetch.gap() < depth ? k + prefetch.gap() : depth;
    prefetch.line();
    for (; k < end; ++k) {
      const auto left = Words::load(b);
      const auto right = Words::load(b + kLanes);
      unroll<kTile>([&](auto i) {
        const auto number = Words::splat(a[i * kRowStride]);
        sums[i][0] = Words::multiply_add(sums[i][0], number, left);
        sums[i][1] = Words::multiply_add(sums[i][1], number, right);
      });
      a += kStep;
      b += kPanel;
    }
  }
  unroll<kTile>([&](auto i) {
    store(c + i * kPanel, add ? load(c + i * kPanel) + sums[i][0] : sums[i][0]);
    store(c + i * kPanel + kLanes, add ? load(c + i * kPanel + kLanes) + sums[i][1] : sums[i][1]);
  });
}

#if defined(__AMX_BF16__)
// Four tiles of sums, from two tiles of `a` and two of `b`: a product for each tile that is loaded.
struct PairWords {
  using Word = std::uint32_t;
  using Registers = WholeTiles;
  static constexpr int kDepth = 2, kTile = 2 * kTileRows, kUnit = kTileRows;
};

// The same for rows of `a` that are `row_stride` words apart, and a depth of whole tiles; WholeTiles must be there. The
// sums begin with what c holds.
inline void multiply(const std::uint32_t* a, std::int64_t row_stride, const std::uint32_t* b, std::int64_t depth,
                     bool add, float* c, Prefetch& prefetch) {
  constexpr std::int64_t kB = kPanel * sizeof(float);
  constexpr int kHalf = kPanel / 2;
  static_assert(kHalf * sizeof(float) == kTileRowBytes);
  float* const lower = c + kTileRows * kPanel;
  settle_memory();
  if (add) {
    _tile_loadd(0, c, kB);
    _tile_loadd(1, c + kHalf, kB);
    _tile_loadd(2, lower, kB);
    _tile_loadd(3, lower + kHalf, kB);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  const std::int64_t stride = row_stride * static_cast<std::int64_t>(sizeof *a);
  const std::uint32_t* const second = a + kTileRows * row_stride;
  const float* next = c + PairWords::kTile * kPanel;
  for (std::int64_t k = 0; k < depth; k += kTileRows, b += kTileRows * kPanel, next += 4 * kHalf) {
    for (int line = 0; line < 4; ++line) __builtin_prefetch(next + line * kHalf, 1);
    for (std::int64_t line = 0; line < kTileRows; line += prefetch.gap()) prefetch.line();
    _tile_loadd(4, a + k, stride);
    _tile_stream_loadd(6, b, kB);
    _tile_stream_loadd(7, b + kHalf, kB);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, second + k, stride);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, kB);
  _tile_stored(1, c + kHalf, kB);
  _tile_stored(2, lower, kB);
  _tile_stored(3, lower + kHalf, kB);
}

template <int kWidth, int kUpper, int... kLane>
inline vu blocks_of(vu a, vu b, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(
      a, b, (kLane & kWidth ? kLanes + kLane - (kUpper ? 0 : kWidth) : kLane + (kUpper ? kWidth : 0))...);
}

// Word j of v[i] becomes word i of v[j].
template <int kWidth = kLanes / 2>
[[gnu::always_inline]] inline void transpose(vu* v) {
  constexpr std::make_integer_sequence<int, kLanes> lanes;
  unroll<kLanes / 2>([&](auto pair) __attribute__((always_inline)) {
    constexpr int i = pair / kWidth * 2 * kWidth + pair % kWidth;
    const vu upper = v[i], lower = v[i + kWidth];
    v[i] = blocks_of<kWidth, 0>(upper, lower, lanes);
    v[i + kWidth] = blocks_of<kWidth, 1>(upper, lower, lanes);
  });
  if constexpr (kWidth > 1) transpose<kWidth / 2>(v);
}
#endif

template <class Element>
inline void widen(const Element* in, std::int64_t count, float* out) {
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(out + i, load(in + i));
  const int left = static_cast<int>(count - i);
  if (left > 0) store_partial(out + i, load_partial(in + i, left), left);
}

// `count` numbers of any type from element `first` of a row, as float32.
inline void widen(const void* row, DType dtype, std::int64_t first, std::int64_t count, float* out) {
  switch (dtype) {
    case DType::kFloat32:
      return widen(static_cast<const float*>(row) + first, count, out);
    case DType::kBFloat16:
      return widen(static_cast<const Bf16*>(row) + first, count, out);
    case DType::kFloat16:
      return widen(static_cast<const F16*>(row) + first, count, out);
  }
}

// Words `first` ... `first + count - 1` of a row of `size` numbers, zeros past its end.
inline void copy_words(const void* row, DType dtype, std::int64_t size, std::int64_t first, std::int64_t count,
                       float* out) {
  const std::int64_t inside = size - first < count ? size - first : count;
  widen(row, dtype, first, inside, out);
  for (std::int64_t i = inside; i < count; ++i) out[i] = 0;
}

// The same for words of two bfloat16.
inline void copy_words(const void* row, DType, std::int64_t size, std::int64_t first, std::int64_t count,
                       std::uint32_t* out) {
  const std::uint16_t* in = static_cast<const std::uint16_t*>(row) + 2 * first;
  const std::int64_t left = size - 2 * first;
  const std::int64_t whole = left / 2 < count ? left / 2 : count;
  std::memcpy(out, in, 4 * static_cast<std::size_t>(whole));
  for (std::int64_t i = whole; i < count; ++i) out[i] = 2 * i < left ? in[2 * i] : 0;
}

}  // namespace dive::cpu::DIVE_ISA
