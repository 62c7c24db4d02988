#include "tests/cuda_on_host_sample.h"

#include "cuda/launch.h"
#include "cuda/ptx.h"

namespace sample {
namespace {

using namespace dive::cuda;
constexpr unsigned kAll = 0xffffffff;

template <class... Parameters, class... Arguments>
cudaError_t launch(dim3 grid, dim3 block, int shared_bytes, cudaStream_t stream, void (*kernel)(Parameters...),
                   Arguments... arguments) {
  const ClusterLaunch how(stream, grid, 1, static_cast<int>(block.x), static_cast<std::size_t>(shared_bytes));
  cudaLaunchConfig_t config = how.config;
  config.blockDim = block;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

template <bool kBarrier>
__global__ void __launch_bounds__(128) sum_rows_kernel(const float* __restrict__ x, float* sums, int columns) {
  float* const partial = dynamic_shared_memory<float>();
  wait_for_previous_kernel();
  float sum = 0;
  for (int c = threadIdx.x; c < columns; c += blockDim.x) sum += x[static_cast<std::int64_t>(blockIdx.x) * columns + c];
  for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(kAll, sum, step);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
  if constexpr (kBarrier) __syncthreads();
  if (threadIdx.x == 0) {
    sum = 0;
    for (int warp = 0; warp < static_cast<int>(blockDim.x / 32); ++warp) sum += partial[warp];
    sums[blockIdx.x] = sum;
  }
}

template <bool kFences>
__global__ void sum_all_kernel(const int* x, int* partial, unsigned* ticket, int* sum, int count) {
  int* const mine = dynamic_shared_memory<int>();
  int& last = mine[64];
  int s = 0;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) s += x[i];
  mine[threadIdx.x] = s;
  __syncthreads();
  for (int step = 32; step; step /= 2) {
    if (threadIdx.x < static_cast<unsigned>(step)) mine[threadIdx.x] += mine[threadIdx.x + step];
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = mine[0];
    if constexpr (kFences) __threadfence();
    last = atomicAdd(ticket, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!last || threadIdx.x != 0) return;
  if constexpr (kFences) __threadfence();
  int total = 0;
  for (unsigned b = 0; b < gridDim.x; ++b) total += partial[b];
  *sum = total;
  *ticket = 0;
}

__global__ void write_early_kernel(int* x) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  x[threadIdx.x] = threadIdx.x;
}

template <bool kWaits>
__global__ void read_early_kernel(const int* x, int* out) {
  if constexpr (kWaits) wait_for_previous_kernel();
  out[threadIdx.x] = x[blockDim.x - 1 - threadIdx.x];
}

__global__ void warp_operations_kernel(int* out) {
  const int lane = threadIdx.x;
  int row = 0;
  const auto put = [&](int value) { out[32 * row++ + lane] = value; };
  put(__shfl_sync(kAll, lane, 5));
  put(__shfl_sync(kAll, lane, 3, 8));
  put(__shfl_xor_sync(kAll, lane, 6));
  put(__shfl_down_sync(kAll, lane, 3));
  put(__shfl_up_sync(kAll, lane, 3, 16));
  put(static_cast<int>(__ballot_sync(kAll, lane % 3 == 0)));
  put(__any_sync(kAll, lane == 7));
  put(__all_sync(kAll, lane == 7));
  put(static_cast<int>(__shfl_xor_sync(kAll, 0.5 * lane, 1) * 2));
  put(static_cast<int>(__shfl_xor_sync(kAll, static_cast<std::int64_t>(lane) << 40, 1) >> 40));
  put(static_cast<int>(__reduce_add_sync(kAll, static_cast<unsigned>(lane))));
  __syncwarp();
  put(max(__popc(lane), __ffs(lane)));
}

__global__ void exchange_kernel(int* out, bool with_syncwarp) {
  int* const mine = dynamic_shared_memory<int>();
  mine[threadIdx.x] = threadIdx.x;
  if (with_syncwarp) {
    __syncwarp();
  } else {
    __shfl_sync(kAll, 0, 0);
  }
  out[threadIdx.x] = mine[threadIdx.x ^ 1];
}

__global__ void count_blocks_kernel(int* out) { out[blockIdx.x] = blockIdx.x == 0 ? 0 : out[blockIdx.x - 1] + 1; }

__global__ void product_kernel(const std::uint16_t* a, const std::uint16_t* b, float* d, bool bf16) {
  const unsigned g = threadIdx.x / 4, t = threadIdx.x % 4;
  const auto pair = [](const std::uint16_t* x, unsigned i, unsigned j) {
    return x[i] | static_cast<std::uint32_t>(x[j]) << 16;
  };
  std::uint32_t a_regs[4], b_regs[2];
  for (unsigned r = 0; r < 4; ++r) {
    const unsigned at = 16 * (g + r % 2 * 8) + 2 * t + r / 2 * 8;
    a_regs[r] = pair(a, at, at + 1);
  }
  for (unsigned r = 0; r < 2; ++r) {
    const unsigned row = 2 * t + 8 * r;
    b_regs[r] = pair(b, 8 * row + g, 8 * (row + 1) + g);
  }
  float d_regs[4];
  for (unsigned r = 0; r < 4; ++r) d_regs[r] = d[8 * (g + r / 2 * 8) + 2 * t + r % 2];
  bf16 ? mma_bf16(d_regs, a_regs, b_regs) : mma_f16(d_regs, a_regs, b_regs);
  for (unsigned r = 0; r < 4; ++r) d[8 * (g + r / 2 * 8) + 2 * t + r % 2] = d_regs[r];
}

__global__ void convert_kernel(const float* x, std::uint32_t* out, int count) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) out[i] = (pack_bf16(x[i], 0) & 0xffff) | (pack_f16(0, x[i]) & 0xffff0000);
}

__global__ void diverge_kernel(Mistake mistake, int* out) {
  const unsigned thread = threadIdx.x;
  if (mistake == Mistake::kEarlyReturn && thread == 40) return;
  if (mistake == Mistake::kBarrierInBranch && thread < 32) {
    __syncthreads();
    out[thread] = 1;
    return;
  }
  if (mistake == Mistake::kWarpInBranch && thread % 2 == 0) out[thread] = __shfl_xor_sync(kAll, 1, 1);
  if (mistake == Mistake::kOtherBarrier && thread == 3) out[thread] = __syncthreads_count(1);
  if (mistake == Mistake::kHalfMask) out[thread] = __shfl_xor_sync(0xffff, 1, 1);
  if (mistake == Mistake::kReturnBeforeShuffle) {
    if (thread == 9) return;
    out[thread] = __any_sync(kAll, 1);
  }
  __syncthreads();
}

__global__ void read_shared_kernel(std::uint32_t* out) {
  out[threadIdx.x] = dynamic_shared_memory<std::uint32_t>()[threadIdx.x];
}

__global__ void append_kernel(int* tokens, int* length, int wanted, cudaGraphConditionalHandle handle) {
  tokens[*length] = *length;
  ++*length;
  set_graph_condition(handle, *length < wanted);
}

__global__ void cluster_kernel(float* out, bool waits_for_readers) {
  float* const own = dynamic_shared_memory<float>();
  own[threadIdx.x] = 100.0f * blockIdx.x + threadIdx.x;
  cluster_sync();
  float sum = 0;
  for (unsigned rank = 0; rank < cluster_size(); ++rank)
    sum += load_of_block(own + (threadIdx.x + 1) % blockDim.x, rank);
  out[blockIdx.x * blockDim.x + threadIdx.x] = sum + 10000.0f * cluster_rank();
  if (waits_for_readers) cluster_sync();
}

__global__ void nothing_kernel() {}

}  // namespace

cudaError_t sum_rows(const float* x, float* sums, int rows, int columns, bool with_barrier, cudaStream_t stream) {
  constexpr int kThreads = 128, kShared = kThreads / 32 * sizeof(float);
  const auto kernel = with_barrier ? sum_rows_kernel<true> : sum_rows_kernel<false>;
  return launch(rows, kThreads, kShared, stream, kernel, x, sums, columns);
}

cudaError_t sum_all(const int* x, int* partial, unsigned* ticket, int* sum, int count, int blocks, cudaStream_t stream,
                    bool with_fences) {
  const auto kernel = with_fences ? sum_all_kernel<true> : sum_all_kernel<false>;
  return launch(blocks, 64, 65 * sizeof(int), stream, kernel, x, partial, ticket, sum, count);
}

cudaError_t write_early(int* x, int threads, cudaStream_t stream) {
  return launch(1, threads, 0, stream, write_early_kernel, x);
}

cudaError_t read_early(const int* x, int* out, int threads, bool waits, cudaStream_t stream) {
  return launch(1, threads, 0, stream, waits ? read_early_kernel<true> : read_early_kernel<false>, x, out);
}

cudaError_t warp_operations(int* out, cudaStream_t stream) {
  return launch(1, 32, 0, stream, warp_operations_kernel, out);
}

cudaError_t exchange(int* out, bool with_syncwarp, cudaStream_t stream) {
  return launch(1, 32, 32 * sizeof(int), stream, exchange_kernel, out, with_syncwarp);
}

cudaError_t count_blocks(int* out, int blocks, cudaStream_t stream) {
  return launch(blocks, 1, 0, stream, count_blocks_kernel, out);
}

cudaError_t product(const std::uint16_t* a, const std::uint16_t* b, float* d, bool bf16, cudaStream_t stream) {
  return launch(1, 32, 0, stream, product_kernel, a, b, d, bf16);
}

cudaError_t convert(const float* x, std::uint32_t* out, int count, cudaStream_t stream) {
  return launch((count + 255) / 256, 256, 0, stream, convert_kernel, x, out, count);
}

cudaError_t diverge(Mistake mistake, int* out, cudaStream_t stream) {
  return launch(1, 64, 0, stream, diverge_kernel, mistake, out);
}

cudaError_t read_shared(std::uint32_t* out, int threads, int bytes, cudaStream_t stream) {
  return launch(1, threads, bytes, stream, read_shared_kernel, out);
}

cudaError_t append(int* tokens, int* length, int wanted, cudaGraphConditionalHandle handle, cudaStream_t stream) {
  return launch(1, 1, 0, stream, append_kernel, tokens, length, wanted, handle);
}

cudaError_t sum_of_cluster(float* out, int blocks, int cluster, int threads, bool waits_for_readers,
                           cudaStream_t stream) {
  const ClusterLaunch how(stream, dim3(blocks), cluster, threads, threads * sizeof(float));
  return dive::cuda::launch(how, cluster_kernel, out, waits_for_readers);
}

cudaError_t nothing(dim3 grid, dim3 block, int shared_bytes, cudaStream_t stream) {
  return launch(grid, block, shared_bytes, stream, nothing_kernel);
}

cudaError_t raise_shared_limit_of_nothing(int bytes) {
  return cudaFuncSetAttribute(nothing_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

}  // namespace sample
