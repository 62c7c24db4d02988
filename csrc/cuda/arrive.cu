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
  int ahead, h, warps, post, down, norm, totals, activated, gates, scales, size;

  __host__ __device__ Layout(int rows, int width, int most_rank, bool half) {
    int next = 0;
    const auto take = [&](int count) {
      const int at = next;
      next += (count + 3) / 4 * 4;  // whole 16 bytes
      return at;
    };
    // [down, up][ranks][width] in half precision
    ahead = take(half ? (most_rank < kAhead ? most_rank : kAhead) * width : 0);
    h = take(rows * width);               // [rows][width]
    warps = take(rows * kWarps);          // [rows][warps]: parts of a sum
    post = take(rows);                    // what the cluster's blocks read: |update|^2,
    down = take(rows * (most_rank + 2));  // the first product, |h|^2 and the gate's,
    norm = take(rows);                    // |h'|^2
    totals = take(rows * (most_rank + 2));
    activated = take(rows * most_rank);  // [ranks][rows]
    gates = take(rows);
    scales = take(2 * rows);  // of a row: what it, and what its normed form, is multiplied by
    size = next;
  }
};

// Sums over rows that are not there are taken as well, of zeros: loops of a known length, whose loads are all on their
// way before the first is needed.
template <int kRows, bool kHalf>
struct Tile {
  // Ranks that a warp multiplies at a time, so that it has several sums to give away in any case.
  static constexpr int kRanks = kRows == 1 ? 4 : 1;

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
    if (!a.steerings) return;
    int adapters[kRows];
#pragma unroll
    for (int b = 0; b < kRows; ++b) adapters[b] = b < rows ? a.adapters[first_row + b] : -1;
    int adapter = -1;
#pragma unroll
    for (int b = 0; b < kRows; ++b) {
      if (adapters[b] < 0) continue;
      adapter = adapters[b];
      acts |= 1u << b;
    }
    if (adapter < 0) return;
    const Steering* const own = a.steerings + adapter * a.steerings_stride;
    if (own->rank >= 0) steering = own;
  }

  // Of a row that is not there, the last one's.
  __device__ std::int64_t row(int b) const {
    return static_cast<std::int64_t>(first_row + min(b, rows - 1)) * a.hidden_size + slice.first;
  }
  __device__ float* h(int b) const { return shared + at.h + b * slice.width; }
  __device__ float* down(int b) const { return shared + at.down + b * (a.most_rank + 2); }
  __device__ float* totals(int b) const { return shared + at.totals + b * (a.most_rank + 2); }

  // The part of the sums of value(b, d) over this block's columns to out[b * stride].
  template <class Value>
  __device__ __forceinline__ void add_up(float* out, int stride, Value value) const {
    float sums[kRows] = {};
#pragma unroll 2
    for (int d = threadIdx.x; d < slice.count; d += kThreads) {
#pragma unroll
      for (int b = 0; b < kRows; ++b) sums[b] += value(b, d);
    }
    const Share share = scatter_sums(sums, kWarp);
    if (share.speaks) shared[at.warps + share.first * kWarps + threadIdx.x / kWarp] = sums[0];
    __syncthreads();
    if (threadIdx.x < kRows) {
      float sum = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += shared[at.warps + threadIdx.x * kWarps + w];
      out[threadIdx.x * stride] = sum;
    }
    __syncthreads();
  }

  // The sum over all blocks of what each has there.
  static __device__ __forceinline__ float gathered(const float* own) {
    const unsigned blocks = cluster_size();
    float parts[kMostCluster], sum = 0;
#pragma unroll
    for (unsigned block = 0; block < kMostCluster; ++block) {
      parts[block] = block < blocks ? load_of_block(own, block) : 0.0f;
    }
#pragma unroll
    for (unsigned block = 0; block < kMostCluster; ++block) sum += parts[block];
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
      if (threadIdx.x < kRows) {
        shared[at.scales + threadIdx.x] =
            1.0f / sqrtf(gathered(shared + at.post + threadIdx.x) / a.hidden_size + a.post.eps);
      }
      __syncthreads();
    }
#pragma unroll 2
    for (int d = threadIdx.x; d < slice.count; d += kThreads) {
      const float weight = scaled ? a.post.weight[slice.first + d] : 0.0f;
      float x[kRows], update[kRows];
#pragma unroll
      for (int b = 0; b < kRows; ++b) {
        x[b] = a.residual[row(b) + d];
        update[b] = a.update ? a.update[row(b) + d] : 0.0f;
      }
#pragma unroll
      for (int b = 0; b < kRows; ++b) {
        const float added = scaled ? update[b] * shared[at.scales + b] * weight : update[b];
        h(b)[d] = b >= rows ? 0.0f : a.update ? x[b] + added : x[b];
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

  // Where 16 bytes of the first (0) or second matrix are brought to.
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

  __device__ __forceinline__ float widened(std::uint16_t bits) const {
    return steering->dtype == DType::kBFloat16 ? bf16_to_float(bits) : f16_to_float(bits);
  }

  // Eight numbers of the first matrix.
  __device__ __forceinline__ void eight(int rank, int column, float (&out)[8]) const {
    const std::int64_t element = down_at(rank, column);
    if constexpr (kHalf) {
      const uint4 packed = rank < kAhead
                               ? *reinterpret_cast<const uint4*>(ahead(0, rank, column))
                               : load_streaming(static_cast<const std::uint16_t*>(steering->matrices) + element);
      const std::uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
      for (int i = 0; i < 8; ++i) out[i] = widened(static_cast<std::uint16_t>(words[i / 2] >> (16 * (i % 2))));
    } else if (steering->dtype == DType::kFloat32) {
      load_eight<DType::kFloat32, true>(static_cast<const float*>(steering->matrices) + element, out);
    } else if (steering->dtype == DType::kBFloat16) {
      load_eight<DType::kBFloat16, true>(static_cast<const std::uint16_t*>(steering->matrices) + element, out);
    } else {
      load_eight<DType::kFloat16, true>(static_cast<const std::uint16_t*>(steering->matrices) + element, out);
    }
  }

  // One number of the second matrix, where it lies.
  __device__ __forceinline__ float one(int rank, int column) const {
    const std::int64_t element = up_at(rank, column);
    if (!kHalf && steering->dtype == DType::kFloat32) return static_cast<const float*>(steering->matrices)[element];
    return widened(static_cast<const std::uint16_t*>(steering->matrices)[element]);
  }

  // This block's part of the first product.
  __device__ void multiply() const {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    // Once at the least: a block without columns adds zeros to the others' sums.
    for (int group = 0; group == 0 || group < slice.count; group += kGroup) {
      const int column = group + lane * 8;
      const bool there = column < slice.count;
      float x[kRows][8];
#pragma unroll
      for (int b = 0; b < kRows; ++b) {
#pragma unroll
        for (int i = 0; i < 8; ++i) x[b][i] = there ? h(b)[column + i] : 0.0f;
      }
      for (int first = warp; first < steering->rank; first += kRanks * kWarps) {
        float sums[kRanks * kRows] = {};
#pragma unroll
        for (int j = 0; j < kRanks; ++j) {
          const int rank = first + j * kWarps;
          float weights[8] = {};
          if (there && rank < steering->rank) eight(rank, column, weights);
#pragma unroll
          for (int b = 0; b < kRows; ++b) {
#pragma unroll
            for (int i = 0; i < 8; ++i) sums[j * kRows + b] = fmaf(weights[i], x[b][i], sums[j * kRows + b]);
          }
        }
        const Share share = scatter_sums(sums, kWarp);
        const int rank = first + share.first / kRows * kWarps;
        if (!share.speaks || rank >= steering->rank) continue;
        float* const to = down(share.first % kRows) + rank;
        *to = group ? *to + sums[0] : sums[0];
      }
    }
  }

  // phi of the first product, and the gate, of all rows.
  __device__ void activate() const {
    const int rank = steering->rank, numbers = rank + (steering->gate_direction ? 2 : 1);
    add_up(down(0) + rank, a.most_rank + 2, [&](int b, int d) { return h(b)[d] * h(b)[d]; });
    if (steering->gate_direction) {
      add_up(down(0) + rank + 1, a.most_rank + 2,
             [&](int b, int d) { return h(b)[d] * steering->gate_direction[slice.first + d]; });
    }
    multiply();
    cluster_sync();
#pragma unroll 1
    for (int i = threadIdx.x; i < rows * numbers; i += kThreads) {
      totals(i / numbers)[i % numbers] = gathered(down(i / numbers) + i % numbers);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kRows * rank; i += kThreads) {
      const int r = i / kRows, b = min(i % kRows, rows - 1);
      const float inverse =
          steering->normalize_input ? 1.0f / sqrtf(totals(b)[rank] / a.hidden_size + kInputRmsEps) : 1.0f;
      shared[at.activated + i] =
          activated(steering->activation, fmaf(totals(b)[r], inverse, steering->bias ? steering->bias[r] : 0.0f));
    }
    if (threadIdx.x < static_cast<unsigned>(rows)) {
      const float open =
          steering->gate_direction ? sigmoid(totals(threadIdx.x)[rank + 1] + steering->gate_offset) : 1.0f;
      shared[at.gates + threadIdx.x] = steering->alpha * open;
    }
    __syncthreads();
  }

  // One rank's part of the push for one column.
  __device__ __forceinline__ void push_rank(int rank, float weight, float (&sums)[kRows]) const {
    const float* const numbers = shared + at.activated + rank * kRows;
#pragma unroll
    for (int b = 0; b < kRows; ++b) sums[b] = fmaf(numbers[b], weight, sums[b]);
  }

  // h becomes h', but for the length. A column is one thread's from here on.
  __device__ void push() const {
    const int near = kHalf ? min(steering->rank, kAhead) : 0;
    for (int d = threadIdx.x; d < slice.count; d += kThreads) {
      float sums[kRows] = {};
#pragma unroll 8
      for (int r = 0; r < near; ++r) push_rank(r, widened(*ahead(1, r, d)), sums);
#pragma unroll 8
      for (int r = near; r < steering->rank; ++r) push_rank(r, one(r, d), sums);
      const float fixed = steering->static_push ? steering->static_push[slice.first + d] : 0.0f;
#pragma unroll
      for (int b = 0; b < kRows; ++b) {
        const float sum = sums[b] + fixed;
        // A push of zero leaves every bit, that of -0 too.
        if (sum != 0 && acts >> b & 1) h(b)[d] = fmaf(shared[at.gates + b], sum, h(b)[d]);
      }
    }
  }

  // What rows, and their normed forms, are multiplied by. No block reads from another one behind this.
  __device__ void measure() const {
    add_up(shared + at.norm, 1, [&](int b, int d) { return h(b)[d] * h(b)[d]; });
    cluster_sync();
    if (threadIdx.x < static_cast<unsigned>(rows)) {
      const int b = threadIdx.x;
      const float after = gathered(shared + at.norm + b);
      float factor = 1;
      if (steering && steering->preserve_norm && acts >> b & 1) {
        const float before = totals(b)[steering->rank];
        // Equal sums give exactly 1, also where both underflow or overflow, so that no push is no change.
        factor = before == after ? 1.0f : sqrtf(before) / (after > 0 ? sqrtf(after) : 1.0f);
      }
      shared[at.scales + b] = factor;
      shared[at.scales + kRows + b] = 1.0f / sqrtf(after * factor * factor / a.hidden_size + a.norm.eps);
    }
    __syncthreads();
  }

  template <DType kDType>
  __device__ void write_rows() const {
    auto* const normed = static_cast<typename Format<kDType>::Element*>(a.normed);
    const bool kept = steering && steering->preserve_norm;
    for (int d = threadIdx.x; d < slice.count; d += kThreads) {
      const float weight = a.norm.weight ? a.norm.weight[slice.first + d] : 0.0f;
#pragma unroll
      for (int b = 0; b < kRows; ++b) {
        if (b >= rows) break;
        const float x = kept ? h(b)[d] * shared[at.scales + b] : h(b)[d];
        a.residual[row(b) + d] = x;
        if (a.norm.weight) normed[row(b) + d] = Format<kDType>::narrow(x * shared[at.scales + kRows + b] * weight);
      }
    }
  }
};

template <DType kDType, int kRows, bool kHalf>
__global__ void __launch_bounds__(kThreads, kRows == 1 ? 4 : 2) arrive_kernel(const Steer a, int batch) {
  const Tile<kRows, kHalf> tile(a, batch, dynamic_shared_memory<float>());
  tile.ask_ahead();
  take_turn();
  tile.read_rows();
  if (tile.steering) {
    wait_for_copies();
    // All threads', which is known behind the barriers of the sums that come first.
    tile.activate();
    tile.push();
  }
  if (a.norm.weight || (tile.steering && tile.steering->preserve_norm)) tile.measure();
  cluster_arrive();
  tile.template write_rows<kDType>();
  cluster_wait();
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
