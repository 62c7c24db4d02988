// Rows of activations in the order and the form in which projections read them, for decode_project_kernel.cpp alone.
// Projections read every weight once, so what a weight costs is what counts: a processor that spends few instructions
// on a cache line of them looks further ahead of what it waits for.
#pragma once

#include "cpu/decode_rows.h"

namespace dive::cpu::DIVE_ISA {

template <int... i>
inline vf every_other(vf a, vf b, int first, std::integer_sequence<int, i...>) {
  return first ? __builtin_shufflevector(a, b, (2 * i + 1)...) : __builtin_shufflevector(a, b, (2 * i)...);
}

// Of 2 kLanes bfloat16 weights at a time, as kLanes 32-bit numbers, a shift widens those at even places and a mask
// those at odd ones: a load and two instructions, where widening half a vector's numbers in their order takes a load
// and two for each half. So x is kept as kLanes numbers of even places, then the odd ones between them, zeros after the
// last.
struct PairedRows {
  using Element = Bf16;
  static constexpr int kMostRows = kBatchTile, kRowTile = 1, kBlock = 2 * kLanes;

  static std::int64_t x_stride(std::int64_t columns) { return (columns + kBlock - 1) / kBlock * kBlock; }
  static vf scaled(vf v, const float*) { return v; }

  static void arrange(const float* x, std::int64_t columns, float* out) {
    constexpr std::make_integer_sequence<int, kLanes> lanes;
    for (std::int64_t k = 0; k < columns; k += kBlock) {
      const std::int64_t rest = columns - k;
      const vf left = load_some(x + k, rest);
      const vf right = rest > kLanes ? load_some(x + k + kLanes, rest - kLanes) : vf{};
      store(out + k, every_other(left, right, 0, lanes));
      store(out + k + kLanes, every_other(left, right, 1, lanes));
    }
  }

  template <int kR, int kB, bool kAsk>
  [[gnu::always_inline]] static void tile(const Bf16* w, std::int64_t, const float* x, std::int64_t columns,
                                          const char* ahead, vf* totals) {
    static_assert(kR == kRowTile);
    constexpr int kSteps = kLineBytes / static_cast<int>(kBlock * sizeof(Bf16));
    const std::int64_t stride = x_stride(columns);
    vf even[kB], odd[kB];
    unroll<kB>([&](auto b) __attribute__((always_inline)) { even[b] = odd[b] = vf{}; });
    const auto add = [&](std::int64_t k, auto load_at) __attribute__((always_inline)) {
      const vu weights = load_at(w + k);
      unroll<kB>([&](auto b) __attribute__((always_inline)) {
        const float* numbers = x + b * stride + k;
        even[b] += (vf)(weights << 16) * load(numbers);
        odd[b] += (vf)(weights & 0xffff0000u) * load(numbers + kLanes);
      });
    };
    std::int64_t k = 0;
    const auto whole = [](const Bf16* p) __attribute__((always_inline)) {
      vu words;
      std::memcpy(&words, p, sizeof words);
      return words;
    };
    for (; k + kSteps * kBlock <= columns; k += kSteps * kBlock) {
      if (kAsk) ask_for_line(ahead + k * static_cast<std::int64_t>(sizeof(Bf16)));
      unroll<kSteps>([&](auto step) __attribute__((always_inline)) { add(k + step * kBlock, whole); });
    }
    for (; k + kBlock <= columns; k += kBlock) add(k, whole);
    if (k < columns) {
      const std::size_t rest = static_cast<std::size_t>(columns - k) * sizeof(Bf16);
      add(k, [rest](const Bf16* p) {
        vu words = {};
        std::memcpy(&words, p, rest);
        return words;
      });
    }
    unroll<kB>([&](auto b) __attribute__((always_inline)) { totals[b * kLanes] = even[b] + odd[b]; });
  }
};

#if defined(__AVX512VNNI__)
// One instruction adds 64 products of bytes, exactly. So x is kept as integers of 23 bits and a sign, x = scale * n, in
// three signed digits, n = d0 + 256 d1 + 65536 d2: what n lacks is at most half of 2^-22.99 of the row's largest
// number, as much as float32 loses of a sum of which that number is a term. One factor of a product must be unsigned:
// weights are read as w + 128, and the sums begin at -128 times those of the digits.
struct DigitRows {
  using Element = Int8;
  // Of more rows, three sums each, GCC 12 keeps some in memory.
  static constexpr int kMostRows = kFew, kRowTile = 1, kBlock = 64, kDigits = 3;
  static constexpr float kLargest = 8355000.0f;  // 127 * (1 + 256 + 65536) = 8355711, and room for rounding
  // A row: its scale in the first of 16 numbers; where the sums of each digit begin; the digits of each block.
  static constexpr std::int64_t kBegins = 16, kBlocks = kBegins + kDigits * 16;

  static std::int64_t x_stride(std::int64_t columns) {
    return kBlocks + (columns + kBlock - 1) / kBlock * kDigits * 16;
  }
  static vf scaled(vf v, const float* x) { return v * splat(*x); }

  static const float* digits(const float* x, std::int64_t k, int i) {
    return x + kBlocks + (k / kBlock * kDigits + i) * 16;
  }
  static __m512i bits(const void* p) { return _mm512_loadu_si512(p); }

  static void arrange(const float* x, std::int64_t columns, float* out) {
    vf most = {}, wrong = {};
    for (std::int64_t k = 0; k < columns; k += kLanes) {
      const vf v = load_some(x + k, columns - k);
      most = max(select(v < splat(0.0f), -v, v), most);
      wrong += v * splat(0.0f);  // NaN where a number is none or infinite
    }
    float largest = 1e-30f;  // whose reciprocal is a number
    for (int i = 0; i < kLanes; ++i) largest = most[i] > largest ? most[i] : largest;
    out[0] = largest / kLargest + sum(wrong);
    const vf inverse = splat(kLargest / largest);
    __m512i sums[kDigits] = {};
    for (std::int64_t k = 0; k < columns; k += kBlock) {
      for (int part = 0; part < kBlock; part += kLanes) {
        const std::int64_t rest = columns - k - part;
        const vf v = rest > 0 ? load_some(x + k + part, rest) : vf{};
        vi number = (vi)_mm512_maskz_cvtps_epi32(0xffff, (__m512)(v * inverse));
        for (int i = 0; i < kDigits; ++i) {
          const vi digit = number << 24 >> 24;
          auto* to = reinterpret_cast<std::int8_t*>(const_cast<float*>(digits(out, k, i))) + part;
          _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_maskz_cvtepi32_epi8(0xffff, (__m512i)digit));
          number = (number - digit) >> 8;
        }
      }
      for (int i = 0; i < kDigits; ++i) {
        sums[i] = _mm512_dpbusd_epi32(sums[i], _mm512_set1_epi8(-128), bits(digits(out, k, i)));
      }
    }
    for (int i = 0; i < kDigits; ++i) {
      const vi begin = -(vi)sums[i];
      std::memcpy(out + kBegins + i * 16, &begin, sizeof begin);
    }
  }

  template <int kR, int kB, bool kAsk>
  [[gnu::always_inline]] static void tile(const Int8* w, std::int64_t, const float* x, std::int64_t columns,
                                          const char* ahead, vf* totals) {
    static_assert(kR == kRowTile);
    const std::int64_t stride = x_stride(columns);
    __m512i sums[kB][kDigits];
    unroll<kB>([&](auto b) __attribute__((always_inline)) {
      unroll<kDigits>([&](auto i)
                          __attribute__((always_inline)) { sums[b][i] = bits(x + b * stride + kBegins + i * 16); });
    });
    const auto add = [&](std::int64_t k, auto load_at) __attribute__((always_inline)) {
      const __m512i weights = _mm512_xor_si512(load_at(w + k), _mm512_set1_epi8(-128));
      unroll<kB>([&](auto b) __attribute__((always_inline)) {
        unroll<kDigits>([&](auto i) __attribute__((always_inline)) {
          sums[b][i] = _mm512_dpbusd_epi32(sums[b][i], weights, bits(digits(x + b * stride, k, i)));
        });
      });
    };
    std::int64_t k = 0;
    for (; k + kBlock <= columns; k += kBlock) {
      if (kAsk) ask_for_line(ahead + k);
      add(k, [](const Int8* p) __attribute__((always_inline)) { return bits(p); });
    }
    if (k < columns) {
      const __mmask64 some = (std::uint64_t{1} << (columns - k)) - 1;
      add(k, [some](const Int8* p) __attribute__((always_inline)) { return _mm512_maskz_loadu_epi8(some, p); });
    }
    const auto number = [](__m512i v) __attribute__((always_inline)) { return __builtin_convertvector((vi)v, vf); };
    unroll<kB>([&](auto b) __attribute__((always_inline)) {
      const auto& s = sums[b];
      totals[b * kLanes] = number(s[2]) * splat(65536.0f) + (number(s[1]) * splat(256.0f) + number(s[0]));
    });
  }
};
#endif

}  // namespace dive::cpu::DIVE_ISA
