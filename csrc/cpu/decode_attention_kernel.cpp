// Attention of one position over a cache: a block of positions at a time, keys, softmax and values while they are in
// L1.
#include "cpu/decode_rows.h"

namespace dive::cpu::DIVE_ISA {
namespace {

constexpr int kPositions = kCacheBlock;

// Vectors of a head's columns in a tile with up to 4 query heads: 16 sums, or 8 where registers are few.
constexpr int kColumnTile = kManyRegisters ? 4 : 2;

// scores[h][s] of `count` positions for `heads` query heads, the exponent's argument but for the largest score; -inf
// in the positions after them.
template <class Element>
inline void score_positions(const AttentionShape& shape, const float* q, int heads, const Element* keys, int count,
                            float (*scores)[kPositions]) {
  const std::int64_t E = shape.head_size;
  vi lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  for (int s = 0; s < kPositions; s += kLanes) {
    const int rows = count - s < kLanes ? count - s : kLanes;
    if (rows <= 0) {
      for (int h = 0; h < heads; ++h) store(&scores[h][s], splat(-INFINITY));
      continue;
    }
    for (int h = 0; h < heads; h += kBatchTile) {
      const int some = heads - h < kBatchTile ? heads - h : kBatchTile;
      vf found[kBatchTile];
      dot_block<PlainRows<Element>>(keys + s * E, E, rows, q + h * E, some, E, Ahead{}, found);
      for (int i = 0; i < some; ++i) {
        vf score = found[i] * splat(shape.scale);
        if (shape.softcap > 0) score = splat(shape.softcap) * tanh(score / splat(shape.softcap));
        store(&scores[h + i][s], select(lane < splat(std::int32_t{rows}), score, splat(-INFINITY)));
      }
    }
  }
}

// Turns scores into exp(score - largest) and updates the running largest score and sum; returns what earlier sums are
// to be multiplied by.
inline float soften(float* scores, float& largest, float& total) {
  vf most = load(scores);
  for (int s = kLanes; s < kPositions; s += kLanes) most = max(load(scores + s), most);
  float larger = largest;
  for (int i = 0; i < kLanes; ++i) larger = most[i] > larger ? most[i] : larger;
  vf sums = {};
  for (int s = 0; s < kPositions; s += kLanes) {
    const vf p = exp(load(scores + s) - splat(larger));
    store(scores + s, p);
    sums += p;
  }
  const float factor = expf(largest - larger);
  total = total * factor + sum(sums);
  largest = larger;
  return factor;
}

// out[h][0 ... kC vectors) = factors[h] * itself + sum over s of scores[h][s] * values[s]. The next values lie `ahead`
// bytes further on and come while these are added.
template <int kH, int kC, bool kWhole, class Element>
inline void gather_tile(const Element* values, std::int64_t E, int lanes, int count, std::int64_t ahead,
                        const float (*scores)[kPositions], const float* factors, float* out, std::int64_t out_stride) {
  constexpr int kVector = static_cast<int>(kLanes * sizeof(Element)), kLine = kVector < 64 ? 64 / kVector : 1;
  vf sums[kH][kC];
  const auto load_at = [&](const auto* p)
                           __attribute__((always_inline)) { return kWhole ? load(p) : load_partial(p, lanes); };
  unroll<kH>([&](auto h) {
    unroll<kC>([&](auto c) { sums[h][c] = load_at(out + h * out_stride + c * kLanes) * splat(factors[h]); });
  });
  for (int s = 0; s < count; ++s) {
    if (ahead) {
      unroll<(kC + kLine - 1) / kLine>([&](auto line) {
        __builtin_prefetch(reinterpret_cast<const char*>(values + s * E + line * kLine * kLanes) + ahead);
      });
    }
    vf columns[kC];
    unroll<kC>([&](auto c) { columns[c] = load_at(values + s * E + c * kLanes); });
    unroll<kH>([&](auto h) {
      const vf p = splat(scores[h][s]);
      unroll<kC>([&](auto c) { sums[h][c] += p * columns[c]; });
    });
  }
  unroll<kH>([&](auto h) {
    unroll<kC>([&](auto c) {
      float* p = out + h * out_stride + c * kLanes;
      if (kWhole) {
        store(p, sums[h][c]);
      } else {
        store_partial(p, sums[h][c], lanes);
      }
    });
  });
}

template <int kH, class Element>
inline void gather_heads(const Element* values, std::int64_t E, int count, std::int64_t ahead,
                         const float (*scores)[kPositions], const float* factors, float* out, std::int64_t stride) {
  std::int64_t e = 0;
  for (; e + kColumnTile * kLanes <= E; e += kColumnTile * kLanes) {
    gather_tile<kH, kColumnTile, true>(values + e, E, kLanes, count, ahead, scores, factors, out + e, stride);
  }
  for (; e + kLanes <= E; e += kLanes) {
    gather_tile<kH, 1, true>(values + e, E, kLanes, count, ahead, scores, factors, out + e, stride);
  }
  if (e < E) {
    const int lanes = static_cast<int>(E - e);
    gather_tile<kH, 1, false>(values + e, E, lanes, count, ahead, scores, factors, out + e, stride);
  }
}

template <class Element>
void attend(const AttentionShape& shape, const float* q, int heads, const CacheRow& row, int kv_head,
            std::int64_t begin, std::int64_t end, float* partials) {
  const std::int64_t E = shape.head_size, stride = partial_size(shape.head_size);
  float scores[kHeadTile][kPositions], factors[kHeadTile];
  for (int h = 0; h < heads; ++h) {
    float* partial = partials + h * stride;
    for (std::int64_t e = 0; e < E + 2; ++e) partial[e] = 0;
    partial[E] = -INFINITY;
  }
  int count;
  for (std::int64_t s = begin; s < end; s += count) {
    const std::int64_t block = s / kPositions, next = (block + 1) * kPositions;
    const std::int64_t offset =
        (kv_head * kPositions + s % kPositions) * E * static_cast<std::int64_t>(sizeof(Element));
    const auto* keys = reinterpret_cast<const Element*>(row.blocks[block] + row.keys + offset);
    const auto* values = reinterpret_cast<const Element*>(row.blocks[block] + row.values + offset);
    const std::int64_t ahead = next < row.length ? row.blocks[block + 1] - row.blocks[block] : 0;
    count = static_cast<int>((next < end ? next : end) - s);
    score_positions(shape, q, heads, keys, count, scores);
    for (int h = 0; h < heads; ++h) {
      float* numbers = partials + h * stride + E;
      factors[h] = soften(scores[h], numbers[0], numbers[1]);
    }
    int h = 0;
    for (; h + 4 <= heads; h += 4) {
      gather_heads<4>(values, E, count, h ? 0 : ahead, scores + h, factors + h, partials + h * stride, stride);
    }
    const auto rest = [&](auto kH) {
      gather_heads<kH>(values, E, count, h ? 0 : ahead, scores + h, factors + h, partials + h * stride, stride);
    };
    if (heads - h == 3) rest(std::integral_constant<int, 3>{});
    if (heads - h == 2) rest(std::integral_constant<int, 2>{});
    if (heads - h == 1) rest(std::integral_constant<int, 1>{});
  }
}

}  // namespace

void attend_positions(const AttentionShape& shape, const float* q, const CacheRow& row, int kv_head, std::int64_t begin,
                      std::int64_t end, float* partials) {
  with_elements(shape.cache_dtype, [&](auto* type) {
    using Element = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    const int shared = shape.heads / shape.kv_heads;
    for (int h = 0; h < shared; h += kHeadTile) {
      attend<Element>(shape, q + h * shape.head_size, shared - h < kHeadTile ? shared - h : kHeadTile, row, kv_head,
                      begin, end, partials + h * partial_size(shape.head_size));
    }
  });
}

void merge_partials(const float* partials, std::int64_t stride, int count, int head_size, float* out) {
  const std::int64_t E = head_size;
  float largest = partials[E];
  for (int i = 1; i < count; ++i) largest = partials[i * stride + E] > largest ? partials[i * stride + E] : largest;
  float total = 0;
  for (int i = 0; i < count; ++i) {
    const float* partial = partials + i * stride;
    const float factor = expf(partial[E] - largest);
    total += factor * partial[E + 1];
    for (std::int64_t e = 0; e < E; e += kLanes) {
      const vf before = i ? load_some(out + e, E - e) : vf{};
      store_some(out + e, before + splat(factor) * load_some(partial + e, E - e), E - e);
    }
  }
  for (std::int64_t e = 0; e < E; e += kLanes) store_some(out + e, load_some(out + e, E - e) / splat(total), E - e);
}

}  // namespace dive::cpu::DIVE_ISA
