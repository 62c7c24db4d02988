// Attention of one new position over the cache, of a few query heads at a time, which share the reading of their
// key/value head.
//
// A row's positions are divided into pieces, by its length alone, and a piece into tiles of 64: the scores of a tile,
// their softmax against the largest so far in the piece, and the values weighted by it. A block of 4 warps has one
// piece, or several one after the other where there are many rows. Keys and values of earlier positions were there
// before this step, so the first tile is on its way to shared memory while the kernel still waits for the one before
// it. As many lanes as a head has times 8 numbers stand beside each other in a row of a tile, and the other lanes of
// the warp have further rows.
#include <algorithm>

#include "cuda/attention_block.cuh"
#include "cuda/device_math.cuh"
#include "cuda/launch.h"

namespace dive::cuda {
namespace {

using namespace attention_block;

template <DType kDType, DType kCache, int kHeads>
__global__ void __launch_bounds__(kThreads, kHeads > 4 || kCache == DType::kFloat32 ? 3 : 4)
    attention_kernel(const Attention a) {
  const int E = a.head_size, group = a.heads / a.kv_heads, parts = (group + kHeads - 1) / kHeads;
  const int kv_head = blockIdx.y / parts, part = blockIdx.y % parts, b = blockIdx.z;
  const int first_head = kv_head * group + part * kHeads, heads = min(kHeads, group - part * kHeads);
  using Own = Block<kCache, kHeads>;
  constexpr bool kApart = Own::Places::kApart;
  const Own block(a, b, kv_head, dynamic_shared_memory<std::byte>());
  const int pieces = block.span.pieces(), each = (pieces + gridDim.x - 1) / gridDim.x;
  const int blocks = (pieces + each - 1) / each;
  if (static_cast<int>(blockIdx.x) >= blocks) {
    // Every block waits, that those behind this kernel need not know what stood before it.
    take_turn();
    return;
  }
  const auto begin_of = [&](int piece) { return block.span.first + piece * block.span.piece; };
  const auto end_of = [&](int piece) { return min(begin_of(piece + 1), block.span.length); };
  const auto ask = [&](int s, int end) {
    block.ask(a.keys, s, min(s + kTile, end), block.keys);
    if (kApart) block.ask(a.values, s, min(s + kTile, end), block.values);
  };
  int piece = blockIdx.x, s = begin_of(piece);
  ask(s, end_of(piece));
  take_turn();

  const float* const cosine = a.cosine + b * static_cast<std::int64_t>(E / 2);
  const float* const sine = a.sine + b * static_cast<std::int64_t>(E / 2);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  for (int h = warp; h < kHeads; h += kWarps) {
    // Heads beyond the last stand for nothing; they are copies, so that nothing is read that is not there.
    const std::int64_t head = static_cast<std::int64_t>(b) * a.heads + first_head + min(h, heads - 1);
    prepare_head(a.q + head * E, a.q_norm, cosine, sine, E, a.scale, block.q + h * E);
  }
  if ((pieces - 1) % blocks == static_cast<int>(blockIdx.x) && warp >= kWarps - 2) {
    // The last piece, which has the new position, is this block's.
    const bool is_key = warp == kWarps - 1;
    const int position = block.span.length - 1;
    const std::int64_t row = static_cast<std::int64_t>(b) * a.kv_heads + kv_head;
    if (is_key) prepare_head(a.k + row * E, a.k_norm, cosine, sine, E, 1, block.scratch);
    __syncwarp();
    using Element = typename Own::Element;
    // Rows that stand for nothing have no block.
    std::byte* const slab = part == 0 ? block.table[position / kTile] : nullptr;
    const std::int64_t place = (static_cast<std::int64_t>(kv_head) * kTile + position % kTile) * E;
    Element* const to = slab ? reinterpret_cast<Element*>(slab + (is_key ? a.keys : a.values)) + place : nullptr;
    for (int e = lane; e < E; e += kWarp) {
      const Element x = Format<kCache>::narrow(is_key ? block.scratch[e] : a.v[row * E + e]);
      (is_key ? block.fresh_key : block.fresh_value)[e] = x;
      if (to) to[e] = x;
    }
  }
  __syncthreads();

  const std::int64_t stride = static_cast<std::int64_t>(kMostPieces) * (E + 4);
  float* const all = a.pieces + (static_cast<std::int64_t>(b) * a.heads + first_head) * stride;
  float sums[kHeads][8] = {};
  while (piece < pieces) {
    const int own = piece, begin = s, end = end_of(piece), last = min(begin + kTile, end);
    block.put_fresh(block.fresh_key, begin, last, block.keys);
    if (kApart) block.put_fresh(block.fresh_value, begin, last, block.values);
    wait_for_copies();
    __syncthreads();
    block.score(last - begin);
    __syncthreads();
    if (!kApart) {
      block.ask(a.values, begin, last, block.values);
      block.put_fresh(block.fresh_value, begin, last, block.values);
      wait_for_copies();
    }
    block.soften(begin == begin_of(own));
    __syncthreads();
    block.add_values(last - begin, sums);
    __syncthreads();
    // Tiles come while the piece is put away.
    s = last;
    if (last == end) {
      piece += blocks;
      s = begin_of(piece);
    }
    if (piece < pieces) ask(s, end_of(piece));
    if (last < end) continue;
    block.store(sums, heads, all + own * (E + 4), stride);
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
#pragma unroll
      for (int i = 0; i < 8; ++i) sums[h][i] = 0;
    }
  }
  if (!comes_last(a.tickets + b * gridDim.y + blockIdx.y, blocks, block.word)) return;

  block.weigh_pieces(all, stride, heads, pieces);
  __syncthreads();
  using Out = typename Format<kDType>::Element;
  Out* const out = static_cast<Out*>(a.out) + (static_cast<std::int64_t>(b) * a.heads + first_head) * E;
  for (int i = threadIdx.x; i < heads * E / 4; i += kThreads) {
    const int h = 4 * i / E, column = 4 * i % E;
    const float* const numbers = all + h * stride + column;
    float4 sum{};
    constexpr int kAtOnce = 16;
    static_assert(kMostPieces % kAtOnce == 0);
    for (int first = 0; first < pieces; first += kAtOnce) {
      float4 parts[kAtOnce];
      // All of them are on their way before the first is needed.
#pragma unroll
      for (int p = 0; p < kAtOnce; ++p) {
        const float* const at = numbers + (first + p) * (E + 4);
        parts[p] = first + p < pieces ? *reinterpret_cast<const float4*>(at) : float4{};
      }
#pragma unroll
      for (int p = 0; p < kAtOnce; ++p) {
        const float weight = block.scores[h * kMostPieces + first + p];
        sum.x = fmaf(weight, parts[p].x, sum.x);
        sum.y = fmaf(weight, parts[p].y, sum.y);
        sum.z = fmaf(weight, parts[p].z, sum.z);
        sum.w = fmaf(weight, parts[p].w, sum.w);
      }
    }
    const float four[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) out[h * E + column + j] = Format<kDType>::narrow(four[j]);
  }
}

template <DType kDType, DType kCache, int kHeads>
cudaError_t attend(cudaStream_t stream, const Attention& a, int batch) {
  const int group = a.heads / a.kv_heads, parts = (group + kHeads - 1) / kHeads;
  const int bytes = Layout<kCache, kHeads>(a.head_size).size;
  const auto kernel = attention_kernel<kDType, kCache, kHeads>;
  if (const cudaError_t error = allow_shared(kernel, bytes); error != cudaSuccess) return error;
  // Enough blocks for every multiprocessor to have some, and few beyond that: putting a block's pieces away and
  // together costs as much as attending to one.
  constexpr int kWantedBlocks = 800;
  const int others = a.kv_heads * parts * batch;
  const int blocks = std::clamp((kWantedBlocks + others - 1) / others, 1, kMostPieces);
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(a.kv_heads * parts),
                  static_cast<unsigned>(batch));
  return launch(stream, grid, kThreads, bytes, kernel, a);
}

// Whether a block of the current device may have so much shared memory.
cudaError_t may_share(int bytes, bool* may) {
  int device = 0, most = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  const cudaError_t error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  *may = bytes <= most;
  return error;
}

template <DType kDType, DType kCache>
cudaError_t attend(cudaStream_t stream, const Attention& a, int batch) {
  const int group = a.heads / a.kv_heads;
  if (group == 1) return attend<kDType, kCache, 1>(stream, a, batch);
  if (group == 2) return attend<kDType, kCache, 2>(stream, a, batch);
  if constexpr (kCache == DType::kFloat32) {
    // Wanted for precision and not for speed, it does without the form that takes most registers.
    return attend<kDType, kCache, 4>(stream, a, batch);
  } else {
    // Eight heads of 240 numbers do not fit into the 99 KB that a block may have on 8.6, 8.9 and 12.0.
    bool fits = false;
    const cudaError_t error = may_share(Layout<kCache, kMostHeads>(a.head_size).size, &fits);
    if (error != cudaSuccess) return error;
    if (group <= 4 || !fits) return attend<kDType, kCache, 4>(stream, a, batch);
    return attend<kDType, kCache, kMostHeads>(stream, a, batch);
  }
}

}  // namespace

cudaError_t attention(cudaStream_t stream, DType dtype, const Attention& a, int batch) {
  if (dtype == DType::kFloat32) return attend<DType::kFloat32, DType::kFloat32>(stream, a, batch);
  if (dtype == DType::kBFloat16) return attend<DType::kBFloat16, DType::kBFloat16>(stream, a, batch);
  return attend<DType::kFloat16, DType::kFloat16>(stream, a, batch);
}

}  // namespace dive::cuda
