// Small kernels that cuda_on_host_test.cpp runs on a CPU. Device pointers; each launch is on the stream.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace sample {

// sums[i] = the sum of row i of x [rows, columns], one block to a row. Without its barrier, wrong now and then.
cudaError_t sum_rows(const float* x, float* sums, int rows, int columns, bool with_barrier, cudaStream_t stream);

// Whole sum of x in *sum, by the block that finishes last; *ticket must be 0 and is again afterwards. Without its
// fences that block may see what was there before the others wrote.
cudaError_t sum_all(const int* x, int* partial, unsigned* ticket, int* sum, int count, int blocks, cudaStream_t stream,
                    bool with_fences = true);

// x[i] = i, and out[i] = x[threads - 1 - i] by a kernel that may begin before the one before it ends. Both in one
// graph.
cudaError_t write_early(int* x, int threads, cudaStream_t stream);
cudaError_t read_early(const int* x, int* out, int threads, bool waits, cudaStream_t stream);

// One warp: what lane l has of each warp operation on the value l in out[32 * operation + l]; see the test.
constexpr int kOperations = 12;
cudaError_t warp_operations(int* out, cudaStream_t stream);

// out[i] = i ^ 1 through shared memory, two neighbours of a warp meeting at __syncwarp or, which orders no memory, at a
// shuffle.
cudaError_t exchange(int* out, bool with_syncwarp, cudaStream_t stream);

// out[b] = b, if blocks ran in the order of their numbers, which they need not.
cudaError_t count_blocks(int* out, int blocks, cudaStream_t stream);

// d [16, 8] += a [16, 16] b [16, 8] by one warp, row-major, a and b bfloat16 or else float16.
cudaError_t product(const std::uint16_t* a, const std::uint16_t* b, float* d, bool bf16, cudaStream_t stream);

// out[i] = bits of number i as bf16 | as f16 << 16.
cudaError_t convert(const float* x, std::uint32_t* out, int count, cudaStream_t stream);

// Threads that do not meet.
enum class Mistake { kEarlyReturn, kBarrierInBranch, kWarpInBranch, kOtherBarrier, kHalfMask, kReturnBeforeShuffle };
cudaError_t diverge(Mistake mistake, int* out, cudaStream_t stream);

// out[i] = what thread i finds in dynamic shared memory of `bytes` bytes at 4 i, unwritten.
cudaError_t read_shared(std::uint32_t* out, int threads, int bytes, cudaStream_t stream);

// tokens[*length] = *length, ++*length, and the condition is whether more than that is wanted.
cudaError_t append(int* tokens, int* length, int wanted, cudaGraphConditionalHandle handle, cudaStream_t stream);

// out[block][t] = the sum over the cluster's blocks b of 100 b + (t + 1) % threads, + 10000 times the block's rank. A
// block that does not wait for its readers may be gone when they come.
cudaError_t sum_of_cluster(float* out, int blocks, int cluster, int threads, bool waits_for_readers,
                           cudaStream_t stream);

cudaError_t nothing(dim3 grid, dim3 block, int shared_bytes, cudaStream_t stream);
cudaError_t raise_shared_limit_of_nothing(int bytes);

}  // namespace sample
