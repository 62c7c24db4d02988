// Steering within a step, in two kernels: a product with `down` needs the whole row, and one with `up` needs the whole
// of the first. The second kernel adds the push and, where all of a row is there, norms it for what follows.
#include "cuda/device_math.cuh"
#include "cuda/launch.h"

namespace dive::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr float kInputRmsEps = 1e-12f;  // as in csrc/cpu/steer_rows.h

// The second kernel's blocks: 16 times 8 columns, 16 slices of the ranks.
constexpr int kOctets = 16, kSlices = kThreads / kOctets, kColumns = 8 * kOctets;

// Where the block of ranks that holds rank r begins, and how many it has: see cpu::kRankBlock.
struct RankBlock {
  std::int64_t start;  // in elements
  int ranks;

  __device__ RankBlock(const Steering& s, int r) {
    const int before = r / cpu::kRankBlock * cpu::kRankBlock;
    start = 2 * static_cast<std::int64_t>(before) * s.columns;
    ranks = min(cpu::kRankBlock, s.rank - before);
  }
};

__device__ __forceinline__ void load_matrix(const Steering& s, std::int64_t element, float (&out)[8]) {
  if (s.dtype == DType::kFloat32) {
    load_eight<DType::kFloat32, true>(static_cast<const float*>(s.matrices) + element, out);
  } else if (s.dtype == DType::kBFloat16) {
    load_eight<DType::kBFloat16, true>(static_cast<const std::uint16_t*>(s.matrices) + element, out);
  } else {
    load_eight<DType::kFloat16, true>(static_cast<const std::uint16_t*>(s.matrices) + element, out);
  }
}

// A row's steering, or nothing.
__device__ __forceinline__ const Steering* steering_of(const Steer& a, int b) {
  const int adapter = a.adapters[b];
  if (adapter < 0) return nullptr;
  const Steering* const s = a.steerings + adapter * a.steerings_stride;
  return s->rank < 0 ? nullptr : s;
}

// h = residual + post(update), in shared memory.
__device__ __forceinline__ void read_row(const Steer& a, std::int64_t row, float* h, float* partials) {
  const int D = a.hidden_size;
  float scale = 1;
  if (a.update && a.post.weight) {
    float squares = 0;
    for (int d = threadIdx.x; d < D; d += kThreads) squares += a.update[row + d] * a.update[row + d];
    scale = 1.0f / sqrtf(block_sum(squares, partials) / D + a.post.eps);
  }
  for (int d = threadIdx.x; d < D; d += kThreads) {
    const float update = a.update ? a.update[row + d] : 0.0f;
    const float x = a.residual[row + d];
    h[d] = !a.update ? x : x + (a.post.weight ? update * scale * a.post.weight[d] : update);
  }
  __syncthreads();
}

// Eight ranks of one row to a block; the first block also keeps h and the gate.
__global__ void __launch_bounds__(kThreads) steer_down_kernel(const Steer a) {
  take_turn();
  float* const partials = dynamic_shared_memory<float>();
  float* const h = partials + kWarps;
  const int b = blockIdx.y, D = a.hidden_size, lane = threadIdx.x % kWarp;
  const Steering* const s = steering_of(a, b);
  if (blockIdx.x != 0 && (!s || static_cast<int>(blockIdx.x) * kWarps >= s->rank)) return;
  const std::int64_t row = static_cast<std::int64_t>(b) * D;
  read_row(a, row, h, partials);
  if (blockIdx.x == 0) {
    for (int d = threadIdx.x; d < D; d += kThreads) a.hidden[row + d] = h[d];
  }
  if (!s) return;
  if (blockIdx.x == 0) {
    float gate = s->alpha;
    if (s->gate_direction) {
      float product = 0;
      for (int d = threadIdx.x; d < D; d += kThreads) product += h[d] * s->gate_direction[d];
      gate *= sigmoid(block_sum(product, partials) + s->gate_offset);
    }
    if (threadIdx.x == 0) a.gates[b] = gate;
  }
  float inverse = 1;
  if (s->normalize_input) {
    float squares = 0;
    for (int d = threadIdx.x; d < D; d += kThreads) squares += h[d] * h[d];
    inverse = 1.0f / sqrtf(block_sum(squares, partials) / D + kInputRmsEps);
  }
  const int r = blockIdx.x * kWarps + threadIdx.x / kWarp;
  if (r >= s->rank) return;
  const RankBlock block(*s, r);
  const std::int64_t start = block.start + static_cast<std::int64_t>(r % cpu::kRankBlock) * s->columns;
  float product = 0;
  for (int d = lane * 8; d < D; d += kWarp * 8) {
    float weights[8];
    load_matrix(*s, start + d, weights);
#pragma unroll
    for (int i = 0; i < 8; ++i) product += weights[i] * (h[d + i] * inverse);
  }
  product = warp_sum(product);
  if (lane == 0) {
    a.activated[static_cast<std::int64_t>(b) * a.most_rank + r] =
        activated(s->activation, product + (s->bias ? s->bias[r] : 0.0f));
  }
}

// The push for 128 columns of one row.
__device__ __forceinline__ void push_columns(const Steer& a, const Steering* s, int b, float* meeting) {
  const int D = a.hidden_size, octet = threadIdx.x % kOctets, slice = threadIdx.x / kOctets;
  const int d = blockIdx.x * kColumns + octet * 8;
  float sums[8] = {};
  if (s && d < D) {
    for (int r = slice; r < s->rank; r += kSlices) {
      const RankBlock block(*s, r);
      const std::int64_t panels = block.start + static_cast<std::int64_t>(block.ranks) * s->columns;
      const std::int64_t panel = static_cast<std::int64_t>(d / cpu::kRankPanel) * block.ranks + r % cpu::kRankBlock;
      float weights[8];
      load_matrix(*s, panels + panel * cpu::kRankPanel + d % cpu::kRankPanel, weights);
      const float number = a.activated[static_cast<std::int64_t>(b) * a.most_rank + r];
#pragma unroll
      for (int i = 0; i < 8; ++i) sums[i] += number * weights[i];
    }
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) meeting[slice * kColumns + octet * 8 + i] = sums[i];
  __syncthreads();
  const int column = blockIdx.x * kColumns + threadIdx.x;
  if (threadIdx.x >= kColumns || column >= D) return;
  const std::int64_t at = static_cast<std::int64_t>(b) * D + column;
  const float h = a.hidden[at];
  float push = 0;
  for (int i = 0; i < kSlices; ++i) push += meeting[i * kColumns + threadIdx.x];
  if (s && s->static_push) push += s->static_push[column];
  // A push of zero leaves every bit, that of -0 too.
  a.residual[at] = !s || push == 0 ? h : h + a.gates[b] * push;
}

template <DType kDType>
__global__ void __launch_bounds__(kThreads) steer_up_kernel(const Steer a) {
  take_turn();
  float* const partials = dynamic_shared_memory<float>();
  float* const meeting = partials + kWarps;
  unsigned* const word = reinterpret_cast<unsigned*>(meeting + kSlices * kColumns);
  const int b = blockIdx.y, D = a.hidden_size;
  const Steering* const s = steering_of(a, b);
  push_columns(a, s, b, meeting);
  if (!comes_last(a.tickets + b, gridDim.x, word)) return;

  const std::int64_t row = static_cast<std::int64_t>(b) * D;
  float* const x = a.residual + row;
  const auto square_sum = [&](const float* v) {
    float squares = 0;
    for (int d = threadIdx.x; d < D; d += kThreads) squares += v[d] * v[d];
    return block_sum(squares, partials);
  };
  if (s && s->preserve_norm) {
    const float before = square_sum(a.hidden + row), after = square_sum(x);
    // Equal sums give exactly 1, also where both underflow or overflow, so that no push is no change.
    const float factor = before == after ? 1.0f : sqrtf(before) / (after > 0 ? sqrtf(after) : 1.0f);
    for (int d = threadIdx.x; d < D; d += kThreads) x[d] *= factor;
  }
  if (!a.norm.weight) return;
  const float inverse = 1.0f / sqrtf(square_sum(x) / D + a.norm.eps);
  auto* const normed = static_cast<typename Format<kDType>::Element*>(a.normed) + row;
  for (int d = threadIdx.x; d < D; d += kThreads) {
    normed[d] = Format<kDType>::narrow(x[d] * inverse * a.norm.weight[d]);
  }
}

}  // namespace

cudaError_t steer(cudaStream_t stream, DType dtype, const Steer& a, int batch) {
  const std::size_t row_bytes = (kWarps + a.hidden_size) * sizeof(float);
  if (const cudaError_t error = allow_shared(steer_down_kernel, row_bytes); error != cudaSuccess) return error;
  const unsigned blocks = static_cast<unsigned>((a.most_rank + kWarps - 1) / kWarps);
  const dim3 down(blocks ? blocks : 1, static_cast<unsigned>(batch));
  if (const cudaError_t error = launch(stream, down, kThreads, row_bytes, steer_down_kernel, a); error != cudaSuccess) {
    return error;
  }
  const dim3 up(static_cast<unsigned>((a.hidden_size + kColumns - 1) / kColumns), static_cast<unsigned>(batch));
  const std::size_t bytes = (kWarps + kSlices * kColumns + 1) * sizeof(float);
  if (dtype == DType::kFloat32) return launch(stream, up, kThreads, bytes, steer_up_kernel<DType::kFloat32>, a);
  if (dtype == DType::kBFloat16) return launch(stream, up, kThreads, bytes, steer_up_kernel<DType::kBFloat16>, a);
  return launch(stream, up, kThreads, bytes, steer_up_kernel<DType::kFloat16>, a);
}

}  // namespace dive::cuda
