// What a layer's parts contribute reaches the residual stream, is steered there, and is normed for what follows:
//
//   h = residual + post(update);  h' = steer(h);  residual = h';  normed = norm(h')
//
// in one kernel, so that steering adds none to a step. A cluster of blocks has a tile of rows, each block a slice of
// their columns: many multiprocessors read an adapter's matrices, and sums over a row cross the blocks through their
// shared memory. The adapter's numbers are asked for before the kernel waits for the one before it.
//
// A row's sums are taken in an order that depends on sizes alone: the same with one row to a tile and with eight.
#include <type_traits>

#include "cuda/device_math.cuh"
#include "cuda/launch.h"

namespace dive::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
static_assert(kWarps == cpu::kRankBlock, "a warp has one rank of every block of ranks");
constexpr int kGroup = 8 * kWarp;       // columns of a slice that the lanes of a warp have at a time
constexpr float kInputRmsEps = 1e-12f;  // as in csrc/cpu/steer_rows.h
// Ranks whose numbers, of half precision, are brought into shared memory while the kernel waits. With registers in its
// place a block would not fit beside those of the kernel before.
constexpr int kAhead = 64;
constexpr int kMostCluster = 16;
// A slice narrower than this leaves most of a block without work.
constexpr int kLeastSlice = 64;

// A block's columns.
struct Slice {
  int width, first, count;

  __device__ Slice(int hidden_size, int blocks, int rank) {
    width = (hidden_size + blocks * cpu::kRankPanel - 1) / (blocks * cpu::kRankPanel) * cpu::kRankPanel;
    first = rank * width;
    count = max(0, min(width, hidden_size - first));
  }
};

// Where a block's shared memory has what, in floats; the same in all blocks of a cluster.
struct Layout {
  int ahead, h, meeting, warps, post, down, norm, totals, activated, scales, size;

  __host__ __device__ Layout(int rows, int width, int most_rank, bool half) {
    int next = 0;
    const auto take = [&](int count) {
      const int at = next;
      next += (count + 3) / 4 * 4;  // whole 16 bytes
      return at;
    };
    // [down, up][ranks][width] in half precision
    ahead = take(half ? (most_rank < kAhead ? most_rank : kAhead) * width : 0);
    h = take(rows * width);                  // [rows][width]
    meeting = take(kWarps * rows * kGroup);  // [warps][rows][kGroup]: parts of the push
    warps = take(rows * kWarps);             // [rows][warps]: parts of a sum
    post = take(rows);                       // what the cluster's blocks read: |update|^2,
    down = take(rows * (most_rank + 2));     // the first product, |h|^2 and the gate's,
    norm = take(rows);                       // |h'|^2
    totals = take(rows * (most_rank + 2));
    activated = take(rows * most_rank);
    scales = take(2 * rows);  // of a row: what it, and what its normed form, is multiplied by
    size = next;
  }
};

template <int kRows, bool kHalf>
struct Tile {
  const Steer& a;
  const int first_row, rows;
  const Slice slice;
  const Layout at;
  float* const shared;
  const Steering* steering;  // of all rows that are steered; null where none is
  unsigned acts;             // a bit for every row that is

  __device__ Tile(const Steer& arguments, int batch, float* memory)
      : a(arguments), first_row(blockIdx.y * kRows), rows(min(kRows, batch - first_row)),
        slice(arguments.hidden_size, cluster_size(), cluster_rank()),
        at(kRows, slice.width, arguments.most_rank, kHalf), shared(memory), steering(nullptr), acts(0) {
    for (int b = 0; a.steerings && b < rows; ++b) {
      const int adapter = a.adapters[first_row + b];
      if (adapter < 0) continue;
      const Steering* const own = a.steerings + adapter * a.steerings_stride;
      if (own->rank < 0) continue;
      steering = own;
      acts |= 1u << b;
    }
  }

  __device__ std::int64_t row(int b) const {
    return static_cast<std::int64_t>(first_row + b) * a.hidden_size + slice.first;
  }
  __device__ float* h(int b) const { return shared + at.h + b * slice.width; }
  __device__ float* down(int b) const { return shared + at.down + b * (a.most_rank + 2); }
  __device__ float* totals(int b) const { return shared + at.totals + b * (a.most_rank + 2); }

  // The part of the sums of value(b, d) over this block's columns to out[b * stride].
  template <class Value>
  __device__ __forceinline__ void add_up(float* out, int stride, Value value) const {
    const int warp = threadIdx.x / kWarp;
#pragma unroll
    for (int b = 0; b < kRows; ++b) {
      if (b >= rows) break;
      float sum = 0;
      for (int d = threadIdx.x; d < slice.count; d += kThreads) sum += value(b, d);
      sum = warp_sum(sum);
      if (threadIdx.x % kWarp == 0) shared[at.warps + b * kWarps + warp] = sum;
    }
    __syncthreads();
    if (threadIdx.x < static_cast<unsigned>(rows)) {
      float sum = 0;
      for (int w = 0; w < kWarps; ++w) sum += shared[at.warps + threadIdx.x * kWarps + w];
      out[threadIdx.x * stride] = sum;
    }
    __syncthreads();
  }

  // The sum over all blocks of what each has there.
  static __device__ __forceinline__ float gathered(const float* own) {
    float sum = 0;
    for (unsigned block = 0; block < cluster_size(); ++block) sum += load_of_block(own, block);
    return sum;
  }

  // h of all rows.
  __device__ void read_rows() const {
    const bool scaled = a.update && a.post.weight;
    if (scaled) {
      add_up(shared + at.post, 1, [&](int b, int d) {
        const float x = a.update[row(b) + d];
        return x * x;
      });
      cluster_sync();
      if (threadIdx.x < static_cast<unsigned>(rows)) {
        shared[at.scales + threadIdx.x] =
            1.0f / sqrtf(gathered(shared + at.post + threadIdx.x) / a.hidden_size + a.post.eps);
      }
      __syncthreads();
    }
#pragma unroll
    for (int b = 0; b < kRows; ++b) {
      if (b >= rows) break;
      for (int d = threadIdx.x; d < slice.count; d += kThreads) {
        const float x = a.residual[row(b) + d], update = a.update ? a.update[row(b) + d] : 0.0f;
        const float added = scaled ? update * shared[at.scales + b] * a.post.weight[slice.first + d] : update;
        h(b)[d] = a.update ? x + added : x;
      }
    }
    __syncthreads();
  }

  // Elements to column `column` of the slice in rank `rank` of the first, and of the second matrix.
  __device__ std::int64_t down_at(int rank, int column) const {
    const int before = rank / cpu::kRankBlock * cpu::kRankBlock;
    return (2 * static_cast<std::int64_t>(before) + rank % cpu::kRankBlock) * steering->columns + slice.first + column;
  }
  __device__ std::int64_t up_at(int rank, int column) const {
    const int before = rank / cpu::kRankBlock * cpu::kRankBlock, ranks = min(cpu::kRankBlock, steering->rank - before);
    const int panel = (slice.first + column) / cpu::kRankPanel;
    return (2 * static_cast<std::int64_t>(before) + ranks) * steering->columns +
           (static_cast<std::int64_t>(panel) * ranks + rank % cpu::kRankBlock) * cpu::kRankPanel +
           column % cpu::kRankPanel;
  }

  // Where 16 bytes of the first (0) or second matrix are brought to; a thread finds its own there.
  __device__ std::uint16_t* ahead(int matrix, int rank, int column) const {
    const int ranks = min(a.most_rank, kAhead);
    return reinterpret_cast<std::uint16_t*>(shared + at.ahead) + (matrix * ranks + rank) * slice.width + column;
  }

  __device__ void ask_ahead() const {
    if (!kHalf || !steering) return;
    const auto* const matrices = static_cast<const std::uint16_t*>(steering->matrices);
    for (int r = threadIdx.x / kWarp; r < min(steering->rank, kAhead); r += kWarps) {
      for (int column = threadIdx.x % kWarp * 8; column < slice.count; column += kGroup) {
        copy_ahead(ahead(0, r, column), matrices + down_at(r, column));
        copy_ahead(ahead(1, r, column), matrices + up_at(r, column));
      }
    }
  }

  // Eight numbers of the first (0) or second matrix.
  __device__ __forceinline__ void eight(int matrix, int rank, int column, float (&out)[8]) const {
    const std::int64_t element = matrix ? up_at(rank, column) : down_at(rank, column);
    if constexpr (kHalf) {
      const uint4 packed = rank < kAhead
                               ? *reinterpret_cast<const uint4*>(ahead(matrix, rank, column))
                               : load_streaming(static_cast<const std::uint16_t*>(steering->matrices) + element);
      const std::uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
      const bool bf16 = steering->dtype == DType::kBFloat16;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const auto bits = static_cast<std::uint16_t>(words[i / 2] >> (16 * (i % 2)));
        out[i] = bf16 ? bf16_to_float(bits) : f16_to_float(bits);
      }
    } else if (steering->dtype == DType::kFloat32) {
      load_eight<DType::kFloat32, true>(static_cast<const float*>(steering->matrices) + element, out);
    } else if (steering->dtype == DType::kBFloat16) {
      load_eight<DType::kBFloat16, true>(static_cast<const std::uint16_t*>(steering->matrices) + element, out);
    } else {
      load_eight<DType::kFloat16, true>(static_cast<const std::uint16_t*>(steering->matrices) + element, out);
    }
  }

  // This block's part of one rank's first product.
  __device__ __forceinline__ void multiply_rank(int rank) const {
    const int lane = threadIdx.x % kWarp;
    float sums[kRows] = {};
    for (int column = lane * 8; column < slice.count; column += kGroup) {
      float weights[8];
      eight(0, rank, column, weights);
#pragma unroll
      for (int b = 0; b < kRows; ++b) {
        if (b >= rows) break;
#pragma unroll
        for (int i = 0; i < 8; ++i) sums[b] = fmaf(weights[i], h(b)[column + i], sums[b]);
      }
    }
#pragma unroll
    for (int b = 0; b < kRows; ++b) {
      if (b >= rows) break;
      const float sum = warp_sum(sums[b]);
      if (lane == 0) down(b)[rank] = sum;
    }
  }

  // phi of the first product, of all rows.
  __device__ void activate() const {
    const int rank = steering->rank, warp = threadIdx.x / kWarp;
    add_up(down(0) + rank, a.most_rank + 2, [&](int b, int d) { return h(b)[d] * h(b)[d]; });
    if (steering->gate_direction) {
      add_up(down(0) + rank + 1, a.most_rank + 2,
             [&](int b, int d) { return h(b)[d] * steering->gate_direction[slice.first + d]; });
    }
    for (int r = warp; r < rank; r += kWarps) multiply_rank(r);
    cluster_sync();
    const int numbers = rank + (steering->gate_direction ? 2 : 1);
    for (int i = threadIdx.x; i < rows * numbers; i += kThreads) {
      totals(i / numbers)[i % numbers] = gathered(down(i / numbers) + i % numbers);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < rows * rank; i += kThreads) {
      const int b = i / rank, r = i % rank;
      const float inverse =
          steering->normalize_input ? 1.0f / sqrtf(totals(b)[rank] / a.hidden_size + kInputRmsEps) : 1.0f;
      shared[at.activated + b * a.most_rank + r] =
          activated(steering->activation, fmaf(totals(b)[r], inverse, steering->bias ? steering->bias[r] : 0.0f));
    }
    __syncthreads();
  }

  // One rank's part of the push for eight columns.
  __device__ __forceinline__ void push_rank(int rank, int column, float (&sums)[kRows][8]) const {
    float weights[8];
    eight(1, rank, column, weights);
#pragma unroll
    for (int b = 0; b < kRows; ++b) {
      if (b >= rows) break;
      const float number = shared[at.activated + b * a.most_rank + rank];
#pragma unroll
      for (int i = 0; i < 8; ++i) sums[b][i] = fmaf(number, weights[i], sums[b][i]);
    }
  }

  // h becomes h', but for the length.
  __device__ void push() const {
    const int rank = steering->rank, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    float* const meeting = shared + at.meeting;
    for (int group = 0; group < slice.count; group += kGroup) {
      const int column = group + lane * 8;
      float sums[kRows][8] = {};
      for (int r = warp; column < slice.count && r < rank; r += kWarps) push_rank(r, column, sums);
#pragma unroll
      for (int b = 0; b < kRows; ++b) {
#pragma unroll
        for (int i = 0; i < 8; ++i) meeting[(warp * kRows + b) * kGroup + lane * 8 + i] = sums[b][i];
      }
      __syncthreads();
      const int d = group + threadIdx.x;
#pragma unroll
      for (int b = 0; b < kRows; ++b) {
        if (b >= rows || d >= slice.count || !(acts >> b & 1)) continue;
        float sum = 0;
        for (int w = 0; w < kWarps; ++w) sum += meeting[(w * kRows + b) * kGroup + threadIdx.x];
        if (steering->static_push) sum += steering->static_push[slice.first + d];
        // A push of zero leaves every bit, that of -0 too.
        if (sum != 0) h(b)[d] = fmaf(gate(b), sum, h(b)[d]);
      }
      __syncthreads();
    }
  }

  __device__ float gate(int b) const {
    if (!steering->gate_direction) return steering->alpha;
    return steering->alpha * sigmoid(totals(b)[steering->rank + 1] + steering->gate_offset);
  }

  // What rows, and their normed forms, are multiplied by. No block reads from another one behind this.
  __device__ void measure() const {
    add_up(shared + at.norm, 1, [&](int b, int d) { return h(b)[d] * h(b)[d]; });
    cluster_sync();
    if (threadIdx.x < static_cast<unsigned>(rows)) {
      const int b = threadIdx.x;
      const float after = gathered(shared + at.norm + b);
      float factor = 1;
      if (steering && steering->preserve_norm && (acts >> b & 1)) {
        const float before = totals(b)[steering->rank];
        // Equal sums give exactly 1, also where both underflow or overflow, so that no push is no change.
        factor = before == after ? 1.0f : sqrtf(before) / (after > 0 ? sqrtf(after) : 1.0f);
      }
      shared[at.scales + b] = factor;
      shared[at.scales + kRows + b] = 1.0f / sqrtf(after * factor * factor / a.hidden_size + a.norm.eps);
    }
  }

  template <DType kDType>
  __device__ void write_rows() const {
    auto* const normed = static_cast<typename Format<kDType>::Element*>(a.normed);
    const bool kept = steering && steering->preserve_norm;
#pragma unroll
    for (int b = 0; b < kRows; ++b) {
      if (b >= rows) break;
      for (int d = threadIdx.x; d < slice.count; d += kThreads) {
        const float x = kept ? h(b)[d] * shared[at.scales + b] : h(b)[d];
        a.residual[row(b) + d] = x;
        if (!a.norm.weight) continue;
        normed[row(b) + d] = Format<kDType>::narrow(x * shared[at.scales + kRows + b] * a.norm.weight[slice.first + d]);
      }
    }
  }
};

template <DType kDType, int kRows, bool kHalf>
__global__ void __launch_bounds__(kThreads) arrive_kernel(const Steer a, int batch) {
  let_next_kernel_start();
  const Tile<kRows, kHalf> tile(a, batch, dynamic_shared_memory<float>());
  tile.ask_ahead();
  wait_for_previous_kernel();
  tile.read_rows();
  if (tile.steering) {
    wait_for_copies();
    tile.activate();
    tile.push();
  }
  if (a.norm.weight || (tile.steering && tile.steering->preserve_norm)) tile.measure();
  cluster_sync();
  tile.template write_rows<kDType>();
}

// Calls f with a kernel for the arguments' types.
template <DType kDType, class F>
cudaError_t with_kernel(int rows, bool half, F f) {
  if (rows == 1) return half ? f(arrive_kernel<kDType, 1, true>) : f(arrive_kernel<kDType, 1, false>);
  return half ? f(arrive_kernel<kDType, kTileOfArrivals, true>) : f(arrive_kernel<kDType, kTileOfArrivals, false>);
}

template <class F>
cudaError_t with_kernel(DType dtype, int rows, bool half, F f) {
  if (dtype == DType::kFloat32) return with_kernel<DType::kFloat32>(rows, half, f);
  if (dtype == DType::kBFloat16) return with_kernel<DType::kBFloat16>(rows, half, f);
  return with_kernel<DType::kFloat16>(rows, half, f);
}

int width_of(int hidden_size, int blocks) {
  return (hidden_size + blocks * cpu::kRankPanel - 1) / (blocks * cpu::kRankPanel) * cpu::kRankPanel;
}

std::size_t shared_bytes(int rows, int hidden_size, int blocks, int most_rank, bool half) {
  return Layout(rows, width_of(hidden_size, blocks), most_rank, half).size * sizeof(float);
}

// Whether the device runs the kernels in clusters of so many blocks. What is allowed of a kernel holds for the process,
// and so for decoders of all sizes: all that the device has.
cudaError_t runs_clusters(DType dtype, int hidden_size, int most_rank, int blocks, int most_shared, bool* runs) {
  *runs = true;
  for (const int rows : {1, kTileOfArrivals}) {
    for (const bool half : {false, true}) {
      const cudaError_t error = with_kernel(dtype, rows, half, [&](auto kernel) {
        const std::size_t bytes = shared_bytes(rows, hidden_size, blocks, most_rank, half);
        cudaError_t set = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
        if (set == cudaSuccess) {
          set = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most_shared);
        }
        if (set != cudaSuccess) return set;
        int clusters = 0;
        const ClusterLaunch launch(nullptr, dim3(static_cast<unsigned>(blocks)), blocks, kThreads, bytes);
        const cudaError_t error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &launch.config);
        *runs = *runs && error == cudaSuccess && clusters > 0;
        return error;
      });
      if (error != cudaSuccess) return error;
    }
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t blocks_of_arrivals(DType dtype, int hidden_size, int most_rank, int device, int* blocks) {
  *blocks = 0;
  int major = 0, most_shared = 0;
  cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&most_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  if (error != cudaSuccess || major < 9) return error;
  // Code compiled for earlier architectures, which later devices run as well, has no clusters.
  cudaFuncAttributes attributes{};
  error = cudaFuncGetAttributes(&attributes, arrive_kernel<DType::kFloat32, 1, false>);
  if (error != cudaSuccess || attributes.ptxVersion < 90) return error;
  for (int size = kMostCluster; size > 0; size /= 2) {
    const bool narrow = size > 1 && width_of(hidden_size, size) < kLeastSlice;
    if (narrow ||
        shared_bytes(kTileOfArrivals, hidden_size, size, most_rank, true) > static_cast<std::size_t>(most_shared))
      continue;
    bool runs = false;
    error = runs_clusters(dtype, hidden_size, most_rank, size, most_shared, &runs);
    static_cast<void>(cudaGetLastError());
    if (error == cudaSuccess && runs) {
      *blocks = size;
      return cudaSuccess;
    }
  }
  return cudaSuccess;
}

cudaError_t arrive(cudaStream_t stream, DType dtype, const Steer& a, int batch, int blocks, int tile) {
  return with_kernel(dtype, tile, a.half, [&](auto kernel) {
    const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>((batch + tile - 1) / tile));
    const std::size_t bytes = shared_bytes(tile, a.hidden_size, blocks, a.most_rank, a.half);
    return launch(ClusterLaunch(stream, grid, blocks, kThreads, bytes), kernel, a, batch);
  });
}

}  // namespace dive::cuda
