// Attention of one new position over the cache, of a few query heads at a time, which share the reading of their
// key/value head.
//
// A block of 4 warps has one piece of a row's positions, in tiles of 64: the scores of a tile, their softmax against
// the largest so far, and the values weighted by it. 16-byte loads: as many lanes as a head has times 8 numbers stand
// beside each other in a row of keys, and the other lanes of the warp have further positions.
#include "cuda/device_math.cuh"
#include "cuda/launch.h"

namespace dive::cuda {
namespace {

constexpr int kWarps = 4, kThreads = kWarps * kWarp;
constexpr int kTile = cpu::kCacheBlock;
static_assert(kTile == 2 * kWarp, "a warp's lanes have two scores each");
constexpr int kMostHeads = 8;  // query heads of a block: 64 sums per lane

// Floats of a block's shared memory.
__host__ __device__ constexpr int shared_floats(int heads, int head_size) {
  return heads * head_size + 2 * head_size + heads * kTile + 3 * heads + kWarps * heads * head_size + 1;
}

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
  for (int e = lane; e < half; e += kWarp) {
    const float low = at(e), high = at(e + half);
    out[e] = (low * cosine[e] - high * sine[e]) * scale;
    out[e + half] = (high * cosine[e] + low * sine[e]) * scale;
  }
}

template <DType kCache, int kHeads>
struct Block {
  const Attention& a;
  const Span span;
  float *q, *new_key, *new_value, *scores, *largest, *total, *factor, *meeting;
  unsigned* word;
  int lanes, slots;  // lanes of a row of keys, rows of a warp

  __device__ Block(const Attention& arguments, const Row& row, float* shared)
      : a(arguments), span(row, arguments.window) {
    const int E = a.head_size;
    q = shared;
    new_key = q + kHeads * E;
    new_value = new_key + E;
    scores = new_value + E;
    largest = scores + kHeads * kTile;
    total = largest + kHeads;
    factor = total + kHeads;
    meeting = factor + kHeads;
    word = reinterpret_cast<unsigned*>(meeting + kWarps * kHeads * E);
    lanes = 1;
    while (8 * lanes < E) lanes *= 2;
    slots = kWarp / lanes;
  }

  // Eight numbers of a cached row, or of the new one, which no block need have written yet.
  __device__ void load_row(std::byte* const* table, std::int64_t offset, const float* fresh, int kv_head, int position,
                           int e, float (&out)[8]) const {
    if (position == span.length - 1) {
#pragma unroll
      for (int i = 0; i < 8; ++i) out[i] = fresh[e + i];
      return;
    }
    using Element = typename Format<kCache>::Element;
    const Element* const rows = reinterpret_cast<const Element*>(table[position / kTile] + offset);
    load_eight<kCache>(rows + (static_cast<std::int64_t>(kv_head) * kTile + position % kTile) * a.head_size + e, out);
  }

  __device__ void score(std::byte* const* table, int kv_head, int begin, int end) const {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, e = lane % lanes * 8, E = a.head_size;
    for (int base = warp * slots; base < kTile; base += kWarps * slots) {
      const int s = base + lane / lanes;
      float dots[kHeads] = {};
      if (e < E && s < kTile && begin + s < end) {
        float key[8];
        load_row(table, a.keys, new_key, kv_head, begin + s, e, key);
#pragma unroll
        for (int h = 0; h < kHeads; ++h) {
#pragma unroll
          for (int i = 0; i < 8; ++i) dots[h] += q[h * E + e + i] * key[i];
        }
      }
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        for (int step = lanes / 2; step; step /= 2) dots[h] += __shfl_xor_sync(kAllLanes, dots[h], step);
        if (lane % lanes != 0 || s >= kTile) continue;
        const float capped = a.softcap > 0 ? a.softcap * tanhf(dots[h] / a.softcap) : dots[h];
        scores[h * kTile + s] = begin + s < end ? capped : -INFINITY;
      }
    }
  }

  // Scores become exp(score - the largest so far); `factor` is what earlier sums are to be multiplied by.
  __device__ void soften() const {
    const int lane = threadIdx.x % kWarp;
    for (int h = threadIdx.x / kWarp; h < kHeads; h += kWarps) {
      float* const own = scores + h * kTile;
      float most = fmaxf(own[lane], own[lane + kWarp]);
#pragma unroll
      for (int step = kWarp / 2; step; step /= 2) most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, step));
      const float before = largest[h];
      most = fmaxf(most, before);
      const float low = expf(own[lane] - most), high = expf(own[lane + kWarp] - most);
      const float sum = warp_sum(low + high);
      own[lane] = low;
      own[lane + kWarp] = high;
      if (lane == 0) {
        factor[h] = expf(before - most);
        total[h] = total[h] * factor[h] + sum;
        largest[h] = most;
      }
    }
  }

  __device__ void add_values(std::byte* const* table, int kv_head, int begin, int end, float (&sums)[kHeads][8]) const {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, e = lane % lanes * 8;
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
#pragma unroll
      for (int i = 0; i < 8; ++i) sums[h][i] *= factor[h];
    }
    if (e >= a.head_size) return;
    for (int s = warp * slots + lane / lanes; s < kTile && begin + s < end; s += kWarps * slots) {
      float value[8];
      load_row(table, a.values, new_value, kv_head, begin + s, e, value);
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        const float weight = scores[h * kTile + s];
#pragma unroll
        for (int i = 0; i < 8; ++i) sums[h][i] += weight * value[i];
      }
    }
  }

  // Sums over the rows of every warp, then over the warps, to [heads][E + 2] with the largest score and the total.
  __device__ void store(float (&sums)[kHeads][8], int heads, float* to, std::int64_t head_stride) const {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, e = lane * 8, E = a.head_size;
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        for (int step = lanes; step < kWarp; step *= 2) sums[h][i] += __shfl_xor_sync(kAllLanes, sums[h][i], step);
        if (lane < lanes && e < E) meeting[(warp * kHeads + h) * E + e + i] = sums[h][i];
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < heads * E; i += kThreads) {
      float sum = 0;
      for (int w = 0; w < kWarps; ++w) sum += meeting[w * kHeads * E + i];
      to[i / E * head_stride + i % E] = sum;
    }
    for (int h = threadIdx.x; h < heads; h += kThreads) {
      to[h * head_stride + E] = largest[h];
      to[h * head_stride + E + 1] = total[h];
    }
  }
};

template <DType kDType, DType kCache, int kHeads>
__global__ void __launch_bounds__(kThreads) attention_kernel(const Attention a) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const int E = a.head_size, group = a.heads / a.kv_heads, parts = (group + kHeads - 1) / kHeads;
  const int piece = blockIdx.x, kv_head = blockIdx.y / parts, part = blockIdx.y % parts, b = blockIdx.z;
  const int first_head = kv_head * group + part * kHeads, heads = min(kHeads, group - part * kHeads);
  const Block<kCache, kHeads> block(a, a.rows[b], dynamic_shared_memory<float>());
  const int pieces = block.span.pieces();
  if (piece >= pieces) return;
  const int begin = block.span.first + piece * block.span.piece, end = min(begin + block.span.piece, block.span.length);
  std::byte* const* const table = a.tables[b];
  const float* const cosine = a.cosine + b * static_cast<std::int64_t>(E / 2);
  const float* const sine = a.sine + b * static_cast<std::int64_t>(E / 2);

  for (int h = threadIdx.x / kWarp; h < kHeads; h += kWarps) {
    // Heads beyond the last stand for nothing; they are copies, so that nothing is read that is not there.
    const std::int64_t head = static_cast<std::int64_t>(b) * a.heads + first_head + min(h, heads - 1);
    prepare_head(a.q + head * E, a.q_norm, cosine, sine, E, a.scale, block.q + h * E);
  }
  if (threadIdx.x < kHeads) {
    block.largest[threadIdx.x] = -INFINITY;
    block.total[threadIdx.x] = 0;
  }
  if (end == block.span.length) {
    const std::int64_t row = static_cast<std::int64_t>(b) * a.kv_heads + kv_head;
    if (threadIdx.x / kWarp == 0) prepare_head(a.k + row * E, a.k_norm, cosine, sine, E, 1, block.new_key);
    __syncthreads();
    using Element = typename Format<kCache>::Element;
    std::byte* const to = table[(end - 1) / kTile];
    const std::int64_t place = (static_cast<std::int64_t>(kv_head) * kTile + (end - 1) % kTile) * E;
    for (int e = threadIdx.x; e < E; e += kThreads) {
      const Element key = Format<kCache>::narrow(block.new_key[e]), value = Format<kCache>::narrow(a.v[row * E + e]);
      block.new_key[e] = Format<kCache>::widen(key);
      block.new_value[e] = Format<kCache>::widen(value);
      if (part != 0) continue;
      reinterpret_cast<Element*>(to + a.keys)[place + e] = key;
      reinterpret_cast<Element*>(to + a.values)[place + e] = value;
    }
  }
  __syncthreads();

  float sums[kHeads][8] = {};
  for (int s = begin; s < end; s += kTile) {
    block.score(table, kv_head, s, end);
    __syncthreads();
    block.soften();
    __syncthreads();
    block.add_values(table, kv_head, s, end, sums);
    __syncthreads();
  }
  const std::int64_t stride = static_cast<std::int64_t>(kMostPieces) * (E + 2);
  float* const all = a.pieces + (static_cast<std::int64_t>(b) * a.heads + first_head) * stride;
  block.store(sums, heads, all + piece * (E + 2), stride);
  if (!comes_last(a.tickets + b * gridDim.y + blockIdx.y, pieces, block.word)) return;

  for (int i = threadIdx.x; i < heads * E; i += kThreads) {
    const float* const own = all + i / E * stride;
    float most = -INFINITY, sum = 0, total = 0;
    for (int p = 0; p < pieces; ++p) most = fmaxf(most, own[p * (E + 2) + E]);
    for (int p = 0; p < pieces; ++p) {
      const float weight = expf(own[p * (E + 2) + E] - most);
      sum += weight * own[p * (E + 2) + i % E];
      total += weight * own[p * (E + 2) + E + 1];
    }
    const std::int64_t head = static_cast<std::int64_t>(b) * a.heads + first_head;
    static_cast<typename Format<kDType>::Element*>(a.out)[head * E + i] = Format<kDType>::narrow(sum / total);
  }
}

template <DType kDType, DType kCache, int kHeads>
cudaError_t attend(cudaStream_t stream, const Attention& a, int batch) {
  const int group = a.heads / a.kv_heads, parts = (group + kHeads - 1) / kHeads;
  const std::size_t bytes = shared_floats(kHeads, a.head_size) * sizeof(float);
  const dim3 grid(kMostPieces, static_cast<unsigned>(a.kv_heads * parts), static_cast<unsigned>(batch));
  return launch(stream, grid, kThreads, bytes, attention_kernel<kDType, kCache, kHeads>, a);
}

template <DType kDType, DType kCache>
cudaError_t attend(cudaStream_t stream, const Attention& a, int batch) {
  const int group = a.heads / a.kv_heads;
  if (group == 1) return attend<kDType, kCache, 1>(stream, a, batch);
  if (group == 2) return attend<kDType, kCache, 2>(stream, a, batch);
  if (group <= 4) return attend<kDType, kCache, 4>(stream, a, batch);
  return attend<kDType, kCache, kMostHeads>(stream, a, batch);
}

}  // namespace

cudaError_t attention(cudaStream_t stream, DType dtype, const Attention& a, int batch) {
  if (dtype == DType::kFloat32) return attend<DType::kFloat32, DType::kFloat32>(stream, a, batch);
  if (dtype == DType::kBFloat16) return attend<DType::kBFloat16, DType::kBFloat16>(stream, a, batch);
  return attend<DType::kFloat16, DType::kFloat16>(stream, a, batch);
}

}  // namespace dive::cuda
