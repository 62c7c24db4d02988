// Products of int8 weights with a few rows of activations, for decode_project_kernel.cpp alone. A cache line of weights
// is 16 rows at 4 columns (decode_types.h), so that rows are the lanes of a product's sums: a number of x meets 16
// weights at once, and nothing is left to add up at the end of a row. Both forms below read x from a copy of their own,
// a group of 4 columns at a time, zeros behind the last column.
#pragma once

#include "cpu/decode_rows.h"

namespace dive::cpu::DIVE_ISA {

inline constexpr int kLineVectors = kInt8Rows / kLanes;

inline std::int64_t int8_lines(std::int64_t columns) { return int8_stride(columns) / kInt8Columns; }

typedef std::int8_t Bytes __attribute__((vector_size(kLanes)));

// Vector v of a line. One by one: GCC 12 would copy a line's vectors together, by way of the stack.
[[gnu::always_inline]] inline vi load_words(const std::int8_t* line, int v) {
  vi words;
  std::memcpy(&words, line + v * sizeof words, sizeof words);
  return words;
}

// Calls add(line) for the lines of weights from `w` on, and asks for memory ahead of them.
template <bool kAsk, class Add>
[[gnu::always_inline]] inline void for_lines(const std::int8_t* w, std::int64_t lines, const Ahead& ahead, Add add) {
  const std::int8_t* const all = w + lines * kLineBytes;
  while (w < all) {
    const std::int8_t* const end = kAsk && w + kTouch < all ? w + kTouch : all;
    const char* asked = nullptr;
    if (kAsk) {
      ahead.touch(w);
      asked = ahead.of(w, kLinesAhead);
    }
    for (; w < end; w += kLineBytes) {
      if (kAsk) {
        ask_for_line(asked);
        asked += kLineBytes;
      }
      add(w);
    }
  }
}

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__) || defined(__ARM_FEATURE_DOTPROD)
// To each 32-bit lane of sums the four products of bytes in it, exactly. x86 wants one factor to be unsigned: it reads
// weights as w + kOffset, and the sums begin at -kOffset times those of the other factor.
#if defined(__AVX512VNNI__)
inline constexpr std::int32_t kOffset = 128, kOffsets = -0x7f7f7f80;  // of four bytes
inline vi add_products(vi sums, vi weights, vi numbers) {
  return (vi)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)weights, (__m512i)numbers);
}
inline vi round_to_whole(vf v) { return (vi)_mm512_maskz_cvtps_epi32(0xffff, (__m512)v); }
#elif defined(__AVXVNNI__)
inline constexpr std::int32_t kOffset = 128, kOffsets = -0x7f7f7f80;  // of four bytes
inline vi add_products(vi sums, vi weights, vi numbers) {
  return (vi)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)weights, (__m256i)numbers);
}
inline vi round_to_whole(vf v) { return (vi)_mm256_cvtps_epi32((__m256)v); }
#else
inline constexpr std::int32_t kOffset = 0, kOffsets = 0;
inline vi add_products(vi sums, vi weights, vi numbers) {
  return (vi)vdotq_s32((int32x4_t)sums, (int8x16_t)weights, (int8x16_t)numbers);
}
inline vi round_to_whole(vf v) { return (vi)vcvtnq_s32_f32((float32x4_t)v); }
#endif

// x is kept as integers of 23 bits and a sign, x = scale * n, in three signed digits, n = d0 + 256 d1 + 65536 d2: what
// n lacks is at most half of 2^-22.99 of the row's largest number, as much as float32 loses of a sum of which that
// number is a term.
struct Int8Products {
  static constexpr int kDigits = 3;
  static constexpr int kMostRows = (kManyRegisters ? 24 : 12) / (kDigits * kLineVectors);  // so many sums
  static constexpr float kLargest = 8355000.0f;  // 127 * (1 + 256 + 65536) = 8355711, and room for rounding
  // A row, in numbers of 32 bits: its scale, where the sums of each digit begin, and for every 4 columns 4 bytes of
  // each digit.
  static constexpr std::int64_t kBegins = 1, kGroups = kBegins + kDigits;

  static std::int64_t x_stride(std::int64_t columns) { return kGroups + int8_lines(columns) * kDigits; }

  // A row's scale, and returns what turns its numbers into integers.
  static vf scale(const float* x, std::int64_t columns, float* out) {
    vf most = {}, wrong = {};
    for (std::int64_t k = 0; k < columns; k += kLanes) {
      const vf v = load_some(x + k, columns - k);
      most = max(select(v < splat(0.0f), -v, v), most);
      wrong += v * splat(0.0f);  // NaN where a number is none or infinite
    }
    float largest = 1e-30f;  // whose reciprocal is a number
    for (int i = 0; i < kLanes; ++i) largest = most[i] > largest ? most[i] : largest;
    *out = largest / kLargest + sum(wrong);
    return splat(kLargest / largest);
  }

  // The digits of kLanes integers; add(i, digit) sees them in 32 bits.
  template <class Add>
  static void split(vf integers, Bytes* digits, Add add) {
    vi number = round_to_whole(integers);
    for (int i = 0; i < kDigits; ++i) {
      const vi digit = number << 24 >> 24;
      add(i, digit);
      digits[i] = __builtin_convertvector(digit, Bytes);
      number = (number - digit) >> 8;
    }
  }
  static void split(vf integers, Bytes* digits) {
    split(integers, digits, [](int, vi) {});
  }

  static void arrange(const float* x, std::int64_t columns, float* out) {
    const vf inverse = scale(x, columns, out);
    vi totals[kDigits] = {};
    float* group = out + kGroups;
    for (std::int64_t k = 0; k < columns; k += kLanes) {
      Bytes digits[kDigits];
      split(load_some(x + k, columns - k) * inverse, digits, [&](int i, vi digit) { totals[i] += digit; });
      for (int lane = 0; lane < kLanes && k + lane < columns; lane += kInt8Columns, group += kDigits) {
        for (int i = 0; i < kDigits; ++i) {
          std::memcpy(group + i, reinterpret_cast<const char*>(&digits[i]) + lane, kInt8Columns);
        }
      }
    }
    for (int i = 0; i < kDigits; ++i) {
      std::int32_t begin = 0;
      for (int lane = 0; lane < kLanes; ++lane) begin -= kOffset * totals[i][lane];
      std::memcpy(out + kBegins + i, &begin, sizeof begin);
    }
  }

  // The number whose digits' sums are given.
  static vf total(const vi* sums) {
    const auto number = [](vi v) __attribute__((always_inline)) { return __builtin_convertvector(v, vf); };
    return number(sums[2]) * splat(65536.0f) + (number(sums[1]) * splat(256.0f) + number(sums[0]));
  }

  static vi word(const float* p) {
    std::int32_t bits;
    std::memcpy(&bits, p, sizeof bits);
    return splat(bits);
  }

  template <int kB, bool kAsk>
  static void tile(const std::int8_t* w, const float* x, std::int64_t columns, const Ahead& ahead, vf* out) {
    const std::int64_t stride = x_stride(columns);
    // Of the type that add_products adds, or GCC 12 copies every sum twice a line.
    vi sums[kB][kDigits][kLineVectors];
    unroll<kB>([&](auto b) __attribute__((always_inline)) {
      unroll<kDigits>([&](auto i) __attribute__((always_inline)) {
        unroll<kLineVectors>(
            [&](auto v) __attribute__((always_inline)) { sums[b][i][v] = word(x + b * stride + kBegins + i); });
      });
    });
    const float* group = x + kGroups;
    for_lines<kAsk>(w, int8_lines(columns), ahead, [&](const std::int8_t* line) __attribute__((always_inline)) {
      vi weights[kLineVectors];
      unroll<kLineVectors>([&](auto v)
                               __attribute__((always_inline)) { weights[v] = load_words(line, v) ^ splat(kOffsets); });
      unroll<kB>([&](auto b) __attribute__((always_inline)) {
        const float* const numbers = group + b * stride;
        unroll<kDigits>([&](auto i) __attribute__((always_inline)) {
          const vi number = word(numbers + i);
          unroll<kLineVectors>([&](auto v) __attribute__((always_inline)) {
            sums[b][i][v] = add_products(sums[b][i][v], weights[v], number);
          });
        });
      });
      group += kDigits;
    });
    unroll<kB>([&](auto b) __attribute__((always_inline)) {
      unroll<kLineVectors>([&](auto v) __attribute__((always_inline)) {
        const vi digits[kDigits] = {sums[b][0][v], sums[b][1][v], sums[b][2][v]};
        out[b * kLineVectors + v] = total(digits) * splat(x[b * stride]);
      });
    });
  }
};
#else
// A column's weights are moved to the top byte of 32 bits, where their sign is one, and so become 2^24 times as large;
// x is kept times 2^-24.
struct Int8Products {
  // A row's sums of one column in `kChains` do not wait for those of the column before it.
  static constexpr int kChains = kLineVectors == 1 ? 2 : 1;
  static constexpr int kMostRows = (kManyRegisters ? 16 : 8) / (kChains * kLineVectors);

  static std::int64_t x_stride(std::int64_t columns) { return int8_stride(columns); }

  static void arrange(const float* x, std::int64_t columns, float* out) {
    for (std::int64_t k = 0; k < columns; ++k) out[k] = x[k] * 0x1p-24f;
    for (std::int64_t k = columns; k < x_stride(columns); ++k) out[k] = 0;
  }

  template <int kB, bool kAsk>
  static void tile(const std::int8_t* w, const float* x, std::int64_t columns, const Ahead& ahead, vf* out) {
    const std::int64_t stride = x_stride(columns);
    vf sums[kB][kChains][kLineVectors] = {};
    const float* group = x;
    for_lines<kAsk>(w, int8_lines(columns), ahead, [&](const std::int8_t* line) __attribute__((always_inline)) {
      vi words[kLineVectors];
      unroll<kLineVectors>([&](auto v) __attribute__((always_inline)) { words[v] = load_words(line, v); });
      unroll<kInt8Columns>([&](auto j) __attribute__((always_inline)) {
        vf weights[kLineVectors];
        unroll<kLineVectors>([&](auto v) __attribute__((always_inline)) {
          const vi high = words[v] << (24 - 8 * j);
          weights[v] = __builtin_convertvector(j == 0 ? high : high & splat(-0x1000000), vf);
        });
        unroll<kB>([&](auto b) __attribute__((always_inline)) {
          const vf number = splat((group + b * stride)[j]);
          unroll<kLineVectors>([&](auto v)
                                   __attribute__((always_inline)) { sums[b][j % kChains][v] += weights[v] * number; });
        });
      });
      group += kInt8Columns;
    });
    unroll<kB>([&](auto b) __attribute__((always_inline)) {
      unroll<kLineVectors>([&](auto v) __attribute__((always_inline)) {
        out[b * kLineVectors + v] = kChains == 1 ? sums[b][0][v] : sums[b][0][v] + sums[b][kChains - 1][v];
      });
    });
  }
};
#endif

// The products of a batch, row by row.
struct Int8Vectors {
  static constexpr int kMostRows = Int8Products::kMostRows;

  // What must be there while blocks are multiplied.
  struct Registers {
    explicit Registers(int) {}
  };

  static int most_rows(int) { return kMostRows; }

  // Floats that an arranged batch takes.
  static std::int64_t size(int batch, std::int64_t columns) { return batch * Int8Products::x_stride(columns); }

  static void arrange(const float* x, int batch, std::int64_t columns, float* out) {
    for (int b = 0; b < batch; ++b) Int8Products::arrange(x + b * columns, columns, out + size(b, columns));
  }

  // out[b] = scalar products of row first + b, of `count`, with the 16 rows of weights from `w` on, kLineVectors each.
  static void block(const std::int8_t* w, const float* x, int, int first, int count, std::int64_t columns,
                    const Ahead& ahead, vf* out) {
    unroll<kMostRows>([&](auto before) {
      constexpr int kB = before + 1;
      if (count != kB) return;
      const float* const numbers = x + size(first, columns);
      if (ahead.asks) {
        Int8Products::tile<kB, true>(w, numbers, columns, ahead, out);
      } else {
        Int8Products::tile<kB, false>(w, numbers, columns, ahead, out);
      }
    });
  }
};

}  // namespace dive::cpu::DIVE_ISA
