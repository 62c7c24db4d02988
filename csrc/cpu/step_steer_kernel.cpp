// What steering does to rows of a decoding step.
#include "cpu/step_steer_kernel.h"

#include "cpu/decode_rows.h"
#include "cpu/steer_rows.h"

namespace dive::cpu::DIVE_ISA {
namespace {

// Of one block of ranks and a tile of rows: phi of the first product.
using Activated = float[kBatchTile][kRankBlock];

template <class Element>
inline void activated_ranks(const Element* down, std::int64_t stride, int ranks, const float* bias,
                            Activation activation, const float* x, int count, std::int64_t D, const Ahead& ahead,
                            Activated& out) {
  constexpr int kWidth = kLanes < kRankBlock ? kLanes : kRankBlock;
  for (int first = 0; first < ranks; first += kWidth) {
    const int some = ranks - first < kWidth ? ranks - first : kWidth;
    vf found[kBatchTile];
    dot_block<PlainRows<Element>>(down + first * stride, stride, some, x, count, D, ahead, found);
    const vf added = bias ? load_some(bias + first, some) : vf{};
    for (int i = 0; i < count; ++i) {
      float whole[kLanes];
      store(whole, found[i] + added);
      activate(activation, whole, kLanes);
      store_some(out[i] + first, load(whole), kWidth);
    }
  }
}

// out[i] (+)= sum over the block's ranks of activated[i][r] * up[:, r].
template <int kRanks, class Element>
inline void add_ranks(const Element* up, int ranks, const Activated& activated, int count, std::int64_t D, bool first,
                      const Ahead& ahead, float* out) {
  const int most = kRanks ? kRanks : ranks;
  std::int64_t touched = 0;
  for (std::int64_t panel = 0; panel < D; panel += kRankPanel) {
    const Element* from = up + panel * most;
    if (ahead.asks) {
      const std::int64_t bytes = most * kRankPanel * static_cast<std::int64_t>(sizeof(Element));
      const char* const asked = ahead.of(from, kLinesAhead);
      for (std::int64_t line = 0; line < bytes; line += kLineBytes) ask_for_line(asked + line);
      for (; touched < (panel / kRankPanel + 1) * bytes; touched += kTouch) {
        ahead.touch(reinterpret_cast<const char*>(up) + touched);
      }
    }
    for (int part = 0; part < kRankPanel && panel + part < D; part += kLanes) {
      const std::int64_t d = panel + part;
      vf columns[kRankBlock] = {};
#pragma GCC unroll 8
      for (int r = 0; r < most; ++r) columns[r] = load(from + r * kRankPanel + part);
      for (int i = 0; i < count; ++i) {
        vf total = first ? vf{} : load_some(out + i * D + d, D - d);
#pragma GCC unroll 8
        for (int r = 0; r < most; ++r) total += splat(activated[i][r]) * columns[r];
        store_some(out + i * D + d, total, D - d);
      }
    }
  }
}

}  // namespace

void normalize_input_row(const float* h, std::int64_t size, float* out) {
  const vf inverse = splat(1.0f / sqrtf(dot(h, h, size) / size + kInputRmsEps));
  for (std::int64_t i = 0; i < size; i += kLanes) put(out, i, size, at(h, i, size) * inverse);
}

void push_products(const Weight& matrices, const float* bias, Activation activation, std::int64_t begin,
                   std::int64_t end, const float* x, int count, std::int64_t D, float* out, const void* share_end,
                   const void* next) {
  const std::int64_t stride = matrices.columns, R = matrices.rows / 2;
  // A share is shorter than pages are asked for ahead, so within it it would be too late for the first ones after it.
  const char* const after = static_cast<const char*>(next);
  for (std::int64_t i = 0; after && i < kPagesAhead; i += kTouch) __builtin_prefetch(after + i);
  with_elements(matrices.dtype, [&](auto* type) {
    using Element = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    for (std::int64_t block = begin; block < end; ++block) {
      const std::int64_t before = block * kRankBlock;
      const int ranks = R - before < kRankBlock ? static_cast<int>(R - before) : kRankBlock;
      const Element* down = static_cast<const Element*>(matrices.data) + 2 * before * stride;
      const Element* up = down + ranks * stride;
      const Ahead ahead{true, static_cast<const char*>(share_end), static_cast<const char*>(next)};
      for (int i = 0; i < count; i += kBatchTile) {
        const int rows = count - i < kBatchTile ? count - i : kBatchTile;
        const Ahead asked = i ? Ahead{} : ahead;
        Activated activated;
        activated_ranks(down, stride, ranks, bias ? bias + before : nullptr, activation, x + i * D, rows, D, asked,
                        activated);
        if (ranks == kRankBlock) {
          add_ranks<kRankBlock>(up, ranks, activated, rows, D, block == begin, asked, out + i * D);
        } else {
          add_ranks<0>(up, ranks, activated, rows, D, block == begin, asked, out + i * D);
        }
      }
    }
  });
}

void push_row(const RowPush& push, const float* const* products, int count, std::int64_t size, float* h) {
  float scale = push.alpha;
  if (push.gate_direction) scale *= 1.0f / (1.0f + expf(-(dot(h, push.gate_direction, size) + push.gate_offset)));
  const float before = push.preserve_norm ? dot(h, h, size) : 0.0f;
  for (std::int64_t i = 0; i < size; i += kLanes) {
    vf d[8];
    for (int p = 0; p < count; ++p) d[p] = products[p] ? at(products[p], i, size) : vf{};
    for (int apart = 1; apart < count; apart *= 2) {
      for (int p = 0; p < count; p += 2 * apart) d[p] += d[p + apart];
    }
    if (count == 0) d[0] = vf{};
    if (push.static_push) d[0] += at(push.static_push, i, size);
    put(h, i, size, moved(at(h, i, size), d[0], splat(scale)));
  }
  if (!push.preserve_norm) return;
  const vf factor = splat(kept_length(before, dot(h, h, size)));
  for (std::int64_t i = 0; i < size; i += kLanes) put(h, i, size, at(h, i, size) * factor);
}

}  // namespace dive::cpu::DIVE_ISA
