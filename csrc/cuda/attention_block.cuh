// What a block of attention does with a tile: bring it to shared memory, score it, and add up its values. For
// attention.cu alone.
#pragma once

#include "cuda/device_math.cuh"

namespace dive::cuda::attention_block {

constexpr int kWarps = 4, kThreads = kWarps * kWarp;
constexpr int kTile = cpu::kCacheBlock;
static_assert(kTile == 2 * kWarp, "a warp's lanes have two scores each");
constexpr int kMostHeads = 8;  // query heads of a block: 64 sums per lane
static_assert(kMostPieces == kWarp && kMostPieces <= kTile, "a warp's lanes have a piece each of a head");

// Where a block's shared memory has what, in bytes.
template <DType kCache, int kHeads>
struct Layout {
  static constexpr int kElement = sizeof(typename Format<kCache>::Element);
  // Keys and values in float32 take turns, or large heads would not fit.
  static constexpr bool kApart = kElement == 2;
  int keys, values, meeting, q, fresh_key, fresh_value, scratch, scores, largest, total, factor, word, size;

  __host__ __device__ explicit Layout(int E) {
    int next = 0;
    const auto take = [&](int bytes) {
      const int at = next;
      next += (bytes + 15) / 16 * 16;
      return at;
    };
    keys = take(kTile * E * kElement);  // [kTile][E]
    values = kApart ? take(kTile * E * kElement) : keys;
    meeting = take(4 * kWarps * kHeads * E);  // [kWarps][kHeads][E] floats
    q = take(4 * kHeads * E);                 // [kHeads][E]
    fresh_key = take(kElement * E);           // the new position's
    fresh_value = take(kElement * E);
    scratch = take(4 * E);              // its key before it is rounded
    scores = take(4 * kHeads * kTile);  // [kHeads][kTile]; of pieces, their weights
    largest = take(4 * kHeads);
    total = take(4 * kHeads);
    factor = take(4 * kHeads);
    word = take(4);
    size = next;
  }
};

// The positions of a row that are attended to, and their division.
struct Span {
  int first, length, piece;

  __device__ Span(const Row& row, int window) {
    length = row.position + 1;
    first = window > 0 && length > window ? length - window : 0;
    constexpr int kUnit = kMostPieces * kTile;
    piece = (length - first + kUnit - 1) / kUnit * kTile;
  }

  __device__ int pieces() const { return (length - first + piece - 1) / piece; }
};

// One head, by a warp: normed, turned, times scale, into shared memory.
__device__ __forceinline__ void prepare_head(const float* x, const NormWeight& norm, const float* cosine,
                                             const float* sine, int size, float scale, float* out) {
  const int lane = threadIdx.x % kWarp;
  float inverse = 1;
  if (norm.weight) {
    float squares = 0;
    for (int e = lane; e < size; e += kWarp) squares += x[e] * x[e];
    inverse = 1.0f / sqrtf(warp_sum(squares) / size + norm.eps);
  }
  const auto at = [&](int e) { return norm.weight ? x[e] * inverse * norm.weight[e] : x[e]; };
  const int half = size / 2;
#pragma unroll 2
  for (int e = lane; e < half; e += kWarp) {
    const float low = at(e), high = at(e + half);
    out[e] = (low * cosine[e] - high * sine[e]) * scale;
    out[e + half] = (high * cosine[e] + low * sine[e]) * scale;
  }
}

template <DType kCache, int kHeads>
struct Block {
  using Element = typename Format<kCache>::Element;
  using Places = Layout<kCache, kHeads>;

  const Attention& a;
  const Span span;
  std::byte* const* const table;
  const int kv_head, E;
  Element *keys, *values, *fresh_key, *fresh_value;
  float *q, *scratch, *scores, *largest, *total, *factor, *meeting;
  unsigned* word;
  int lanes, shift, slots;  // lanes of a row of keys, 2^shift of them; rows of a warp

  __device__ Block(const Attention& arguments, int b, int head, std::byte* shared)
      : a(arguments), span(arguments.rows[b], arguments.window), table(arguments.tables[b]), kv_head(head),
        E(arguments.head_size) {
    const Places at(E);
    const auto floats = [&](int place) { return reinterpret_cast<float*>(shared + place); };
    const auto elements = [&](int place) { return reinterpret_cast<Element*>(shared + place); };
    keys = elements(at.keys);
    values = elements(at.values);
    fresh_key = elements(at.fresh_key);
    fresh_value = elements(at.fresh_value);
    q = floats(at.q);
    scratch = floats(at.scratch);
    scores = floats(at.scores);
    largest = floats(at.largest);
    total = floats(at.total);
    factor = floats(at.factor);
    meeting = floats(at.meeting);
    word = reinterpret_cast<unsigned*>(shared + at.word);
    shift = 0;
    while ((8 << shift) < E) ++shift;
    lanes = 1 << shift;
    slots = kWarp / lanes;
  }

  // Asks for the keys or values of the cached positions [begin, end) in tile `tile`; they are in shared memory behind
  // wait_for_copies() and a barrier. The new position's are not among them: no block need have written them yet.
  __device__ void ask(std::int64_t offset, int begin, int end, Element* tile) const {
    const int e = (static_cast<int>(threadIdx.x) & (lanes - 1)) * 8, count = min(end, span.length - 1) - begin;
    if (count <= 0 || e >= E) return;
    // A tile lies in one block of the cache, or in two.
    const std::byte* const low = table[begin / kTile] + offset;
    const std::byte* const high = table[(begin + count - 1) / kTile] + offset;
    for (int row = threadIdx.x >> shift; row < count; row += kThreads >> shift) {
      const int position = begin + row;
      const auto* const from = reinterpret_cast<const Element*>(position / kTile == begin / kTile ? low : high) +
                               (static_cast<std::int64_t>(kv_head) * kTile + position % kTile) * E + e;
      copy_ahead(tile + row * E + e, from);
      if constexpr (Places::kElement == 4) copy_ahead(tile + row * E + e + 4, from + 4);
    }
  }

  // The new position's row, where the tile has it.
  __device__ void put_fresh(const Element* fresh, int begin, int end, Element* tile) const {
    if (end != span.length) return;
    for (int e = threadIdx.x; e < E; e += kThreads) tile[(end - 1 - begin) * E + e] = fresh[e];
  }

  static __device__ __forceinline__ void load_eight_shared(const Element* p, float (&out)[8]) {
    load_eight_by<kCache>([](const void* at) { return *static_cast<const uint4*>(at); }, p, out);
  }

  __device__ void score(int count) const {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, e = (lane & (lanes - 1)) * 8;
#pragma unroll 2
    for (int base = warp * slots; base < kTile; base += kWarps * slots) {
      const int s = base + (lane >> shift);
      float dots[kHeads] = {};
      if (e < E && s < min(count, kTile)) {
        float key[8];
        load_eight_shared(keys + s * E + e, key);
#pragma unroll
        for (int h = 0; h < kHeads; ++h) {
          const float4 low = *reinterpret_cast<const float4*>(q + h * E + e);
          const float4 high = *reinterpret_cast<const float4*>(q + h * E + e + 4);
          const float query[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
          for (int i = 0; i < 8; ++i) dots[h] += query[i] * key[i];
        }
      }
      const Share share = scatter_sums(dots, lanes);
#pragma unroll
      for (int i = 0; i < kHeads; ++i) {
        if (i >= share.count || !share.speaks || s >= kTile) continue;
        const float capped = a.softcap > 0 ? a.softcap * tanhf(dots[i] / a.softcap) : dots[i];
        scores[(share.first + i) * kTile + s] = s < count ? capped : -INFINITY;
      }
    }
  }

  // Scores become exp(score - the largest so far), in the piece's first tile of these alone; `factor` is what earlier
  // sums are to be multiplied by.
  __device__ void soften(bool first) const {
    const int lane = threadIdx.x % kWarp;
    for (int h = threadIdx.x / kWarp; h < kHeads; h += kWarps) {
      float* const own = scores + h * kTile;
      float most = fmaxf(own[lane], own[lane + kWarp]);
#pragma unroll
      for (int step = kWarp / 2; step; step /= 2) most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, step));
      const float before = first ? -INFINITY : largest[h];
      most = fmaxf(most, before);
      const float low = expf(own[lane] - most), high = expf(own[lane + kWarp] - most);
      const float sum = warp_sum(low + high);
      own[lane] = low;
      own[lane + kWarp] = high;
      if (lane == 0) {
        factor[h] = expf(before - most);
        total[h] = first ? sum : total[h] * factor[h] + sum;
        largest[h] = most;
      }
    }
  }

  __device__ void add_values(int count, float (&sums)[kHeads][8]) const {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, e = (lane & (lanes - 1)) * 8;
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
#pragma unroll
      for (int i = 0; i < 8; ++i) sums[h][i] *= factor[h];
    }
    if (e >= E) return;
#pragma unroll 2
    for (int s = warp * slots + (lane >> shift); s < min(count, kTile); s += kWarps * slots) {
      float value[8];
      load_eight_shared(values + s * E + e, value);
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        const float weight = scores[h * kTile + s];
#pragma unroll
        for (int i = 0; i < 8; ++i) sums[h][i] += weight * value[i];
      }
    }
  }

  // Sums over the rows of every warp, then over the warps, to [heads][E + 4] with the largest score and the total.
  __device__ void store(float (&sums)[kHeads][8], int heads, float* to, std::int64_t head_stride) const {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, e = lane * 8;
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        for (int step = lanes; step < kWarp; step *= 2) sums[h][i] += __shfl_xor_sync(kAllLanes, sums[h][i], step);
      }
      if (lane >= lanes || e >= E) continue;
      auto* const own = reinterpret_cast<float4*>(meeting + (warp * kHeads + h) * E + e);
      own[0] = {sums[h][0], sums[h][1], sums[h][2], sums[h][3]};
      own[1] = {sums[h][4], sums[h][5], sums[h][6], sums[h][7]};
    }
    __syncthreads();
    for (int i = threadIdx.x; i < heads * E / 4; i += kThreads) {
      const int h = 4 * i / E, column = 4 * i % E;
      float4 sum{};
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        const float4 part = *reinterpret_cast<const float4*>(meeting + (w * kHeads + h) * E + column);
        sum = {sum.x + part.x, sum.y + part.y, sum.z + part.z, sum.w + part.w};
      }
      *reinterpret_cast<float4*>(to + h * head_stride + column) = sum;
    }
    for (int h = threadIdx.x; h < heads; h += kThreads) {
      to[h * head_stride + E] = largest[h];
      to[h * head_stride + E + 1] = total[h];
    }
  }

  // What each of a head's pieces [heads][pieces][E + 4] counts for in the whole, into `scores` [kHeads][kMostPieces].
  __device__ void weigh_pieces(const float* all, std::int64_t head_stride, int heads, int pieces) const {
    const int p = threadIdx.x % kWarp;
    for (int h = threadIdx.x / kWarp; h < heads; h += kWarps) {
      const bool there = p < pieces;
      const float* const own = all + h * head_stride + p * (E + 4) + E;
      const float most = there ? own[0] : -INFINITY, sum = there ? own[1] : 0;
      float top = most;
#pragma unroll
      for (int step = kWarp / 2; step; step /= 2) top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, step));
      const float weight = there ? expf(most - top) : 0, whole = warp_sum(weight * sum);
      scores[h * kMostPieces + p] = there ? weight / whole : 0;
    }
  }
};

}  // namespace dive::cuda::attention_block
