// Rows of activations in the order in which products with bfloat16 weights read them, for decode_project_kernel.cpp
// alone. Projections read every weight once, so what a weight costs is what counts: a processor that spends few
// instructions on a cache line of them looks further ahead of what it waits for.
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
  [[gnu::always_inline]] static void tile(const Bf16* w, std::int64_t, const float* x, std::int64_t x_stride,
                                          std::int64_t columns, const char* ahead, bool more, vf* totals) {
    static_assert(kR == kRowTile);
    constexpr int kSteps = kLineBytes / static_cast<int>(kBlock * sizeof(Bf16));
    vf even[kB], odd[kB];
    unroll<kB>([&](auto b) __attribute__((always_inline)) {
      even[b] = more ? totals[b * kLanes] : vf{};
      odd[b] = vf{};
    });
    const auto add = [&](std::int64_t k, auto load_at) __attribute__((always_inline)) {
      const vu weights = load_at(w + k);
      unroll<kB>([&](auto b) __attribute__((always_inline)) {
        const float* numbers = x + b * x_stride + k;
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

}  // namespace dive::cpu::DIVE_ISA
