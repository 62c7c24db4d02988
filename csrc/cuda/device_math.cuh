// What several kernels share: number formats, sums over a block, activations. For .cu files alone.
#pragma once

#include "cpu/decode_types.h"
#include "cpu/dtype.h"
#include "cpu/steer.h"
#include "cuda/kernels.h"
#include "cuda/ptx.h"

namespace dive::cuda {

// Every thread of every kernel calls this once, behind what it can do before it needs anything of the kernel before it.
// Behind it that kernel has ended, and so have all before that one. Only then may the next kernel begin: with more than
// one ahead, blocks that wait would take the place of blocks that work.
__device__ __forceinline__ void take_turn() {
  wait_for_previous_kernel();
  let_next_kernel_start();
}

inline constexpr unsigned kAllLanes = 0xffffffff;
inline constexpr int kWarp = 32;

template <DType kDType>
struct Format;

template <>
struct Format<DType::kFloat32> {
  using Element = float;
  static __device__ __forceinline__ float widen(float x) { return x; }
  static __device__ __forceinline__ float narrow(float x) { return x; }
};

template <>
struct Format<DType::kBFloat16> {
  using Element = std::uint16_t;
  static __device__ __forceinline__ float widen(std::uint16_t x) { return bf16_to_float(x); }
  static __device__ __forceinline__ std::uint16_t narrow(float x) { return float_to_bf16(x); }
};

template <>
struct Format<DType::kFloat16> {
  using Element = std::uint16_t;
  static __device__ __forceinline__ float widen(std::uint16_t x) { return f16_to_float(x); }
  static __device__ __forceinline__ std::uint16_t narrow(float x) { return float_to_f16(x); }
};

// Eight numbers that lie side by side, by load(address), which gives 16 bytes.
template <DType kDType, class Load>
__device__ __forceinline__ void load_eight_by(Load load, const void* p, float (&out)[8]) {
  if constexpr (kDType == DType::kFloat32) {
    const uint4 low = load(p), high = load(static_cast<const float*>(p) + 4);
    const std::uint32_t words[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) out[i] = __uint_as_float(words[i]);
  } else {
    const uint4 packed = load(p);
    const std::uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      out[i] = Format<kDType>::widen(static_cast<std::uint16_t>(words[i / 2] >> (16 * (i % 2))));
    }
  }
}

// The same from memory that nobody writes meanwhile (kConstant) or that an earlier kernel wrote.
template <DType kDType, bool kConstant = false>
__device__ __forceinline__ void load_eight(const void* p, float (&out)[8]) {
  load_eight_by<kDType>([](const void* at) { return kConstant ? load_streaming(at) : load_cached(at); }, p, out);
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int step = kWarp / 2; step; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

// Which of a lane's numbers are sums behind scatter_sums(): x[0 ... count - 1], of the numbers first, first + 1, ...;
// lanes that have the same ones have one among them that speaks.
struct Share {
  int first, count;
  bool speaks;
};

// Sums of every x[i] over groups of `width` lanes, a power of two. At each step a lane hands half of its numbers over,
// for kCount + log2(width / kCount) - 1 shuffles in place of kCount * log2(width).
template <int kCount>
__device__ __forceinline__ Share scatter_sums(float (&x)[kCount], int width) {
  const int lane = threadIdx.x % kWarp;
  Share share{0, kCount, true};
  int step = width / 2;
#pragma unroll
  for (int half = kCount / 2; half; half /= 2) {
    if (step == 0) break;
    const bool upper = lane & step;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float kept = upper ? x[i + half] : x[i], given = upper ? x[i] : x[i + half];
      x[i] = kept + __shfl_xor_sync(kAllLanes, given, step);
    }
    share.first += upper ? half : 0;
    share.count = half;
    step /= 2;
  }
  share.speaks = step == 0 || lane % (2 * step) == 0;
  for (; step; step /= 2) x[0] += __shfl_xor_sync(kAllLanes, x[0], step);
  return share;
}

// The sum over all threads, in all of them; `partials` has room for one float per warp and may be used again at once.
__device__ __forceinline__ float block_sum(float x, float* partials) {
  const int warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  x = warp_sum(x);
  if (threadIdx.x % kWarp == 0) partials[warp] = x;
  __syncthreads();
  float total = 0;
  for (int w = 0; w < warps; ++w) total += partials[w];
  __syncthreads();
  return total;
}

// A NaN counts as the largest, and of equal logits the first.
__device__ __forceinline__ bool beats(const Best& a, const Best& b) {
  const bool nan = isnan(a.logit), other_nan = isnan(b.logit);
  if (nan != other_nan) return nan;
  if (!nan && a.logit != b.logit) return a.logit > b.logit;
  return a.index < b.index;
}

// The best of a block's, in its first thread; `bests` has room for one per warp.
__device__ __forceinline__ Best best_of_block(Best best, Best* bests) {
  for (int step = kWarp / 2; step; step /= 2) {
    const Best other{__shfl_xor_sync(kAllLanes, best.logit, step), __shfl_xor_sync(kAllLanes, best.index, step)};
    if (beats(other, best)) best = other;
  }
  if (threadIdx.x % kWarp == 0) bests[threadIdx.x / kWarp] = best;
  __syncthreads();
  if (threadIdx.x != 0) return best;
  for (int w = 1; w < static_cast<int>(blockDim.x) / kWarp; ++w) {
    if (beats(bests[w], best)) best = bests[w];
  }
  return best;
}

// True in all threads of the last block of `count` that come here with the same ticket, which is 0 again afterwards;
// that block sees what the others wrote before. `shared` is a word of the block's. One thread's fences are enough: the
// barriers order with them what the others wrote before, and read behind.
__device__ __forceinline__ bool comes_last(unsigned* ticket, unsigned count, unsigned* shared) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    const bool last = atomicAdd(ticket, 1u) == count - 1;
    if (last) {
      __threadfence();
      *ticket = 0;
    }
    *shared = last;
  }
  __syncthreads();
  return *shared != 0;
}

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

__device__ __forceinline__ float gated(cpu::GatedActivation activation, float gate) {
  switch (activation) {
    case cpu::GatedActivation::kSilu:
      return gate * sigmoid(gate);
    case cpu::GatedActivation::kGeluTanh:
      return gate * sigmoid(1.5957691216057308f * (gate + 0.044715f * (gate * gate * gate)));
    case cpu::GatedActivation::kGelu:
      return 0.5f * gate * (1.0f + erff(gate * 0.70710678118654752f));
  }
  return 0;
}

__device__ __forceinline__ float activated(cpu::Activation activation, float x) {
  switch (activation) {
    case cpu::Activation::kSilu:
      return x * sigmoid(x);
    case cpu::Activation::kIdentity:
      return x;
    case cpu::Activation::kRelu:
      return x < 0 ? 0 : x;
    case cpu::Activation::kGelu:
      return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
    case cpu::Activation::kTanh:
      return tanhf(x);
  }
  return 0;
}

}  // namespace dive::cuda
