// Matrices times a few vectors: what a decoding step spends its time on, reading weights.
//
// Half precision goes through tensor cores for any batch. A block has 16 rows of a matrix; its 8 warps divide the
// columns and meet in shared memory. In m16n8k16 a lane holds pairs of neighbouring columns, but a sum may be taken in
// any order of its terms: here a lane loads 16 bytes, 8 columns, of its rows of weights and of its row of x, and gives
// them to two mma as if they were the pairs that it should hold. So both come straight from memory in their own layout.
// Across warps the 16-byte pieces are side by side: 512 bytes of every row. Weights go through shared memory, where
// each thread finds what it has asked for itself: so that more are on their way than registers could hold, all the
// time.
//
// float32 has no such instruction that keeps its precision: a warp per row of weights.
#include <algorithm>
#include <type_traits>

#include "cuda/device_math.cuh"
#include "cuda/launch.h"

namespace dive::cuda {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * kWarp;
constexpr int kTileRows = 16;
constexpr int kSlab = 32;  // columns that a warp takes at a time: 4 lanes of 8
// Slabs that a warp has on their way to shared memory at a time, of all matrices together: 2 rows * 16 bytes * 256
// threads * 6 are 48 KiB per block and, with three blocks, 144 KiB per multiprocessor; 4.3 TB/s * 1 us of latency want
// 33 KiB of each of 132. What is more is asked for while the kernel before this one still works.
constexpr int kSlabsAhead = 6;

struct Segment {
  const void* data;
  const float* bias;
  float* out;  // [B][rows]
  std::int64_t stride;
  std::int32_t rows, first_tile;
};

struct Product {
  Segment segments[3];
  std::int32_t count, columns, batch;
  const void* x;
};

struct GatedProduct {
  Matrix gate, up;
  const void* x;
  void* out;  // [B][rows]
  std::int32_t batch;
  cpu::GatedActivation activation;
};

// Which matrix a block's tile belongs to.
__device__ __forceinline__ const Segment& segment_of(const Product& product, int tile) {
  int s = 0;
  while (s + 1 < product.count && tile >= product.segments[s + 1].first_tile) ++s;
  return product.segments[s];
}

template <DType kDType>
__device__ __forceinline__ void multiply(float (&d)[4], const uint4& low, const uint4& high, const uint4& x) {
  const auto mma = [&](std::uint32_t a0, std::uint32_t a1, std::uint32_t a2, std::uint32_t a3, std::uint32_t b0,
                       std::uint32_t b1) {
    const std::uint32_t a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1};
    if constexpr (kDType == DType::kBFloat16) {
      mma_bf16(d, a, b);
    } else {
      mma_f16(d, a, b);
    }
  };
  mma(low.x, high.x, low.y, high.y, x.x, x.y);
  mma(low.z, high.z, low.w, high.w, x.z, x.w);
}

// The slabs on their way: 16 bytes of each of its rows are what a thread asks for, and what it reads itself.
template <int kMatrices>
struct Ring {
  static constexpr int kSlabs = kSlabsAhead / kMatrices;
  static constexpr std::size_t kBytes = std::size_t{kSlabs} * kMatrices * 2 * kThreads * sizeof(uint4);
  uint4* shared;

  // Of row `row`, or row + 8 in the second half.
  __device__ __forceinline__ uint4* at(int slab, int matrix, int half) const {
    return shared + ((slab * kMatrices + matrix) * 2 + half) * kThreads + threadIdx.x;
  }
};

// sums[m][tile] (+)= this warp's columns of rows `row` and `row + 8` of kMatrices matrices times x. The first weights
// are asked for before the kernel that writes x has ended.
template <DType kDType, int kMatrices, int kTiles>
__device__ __forceinline__ void multiply_slabs(const Ring<kMatrices>& ring,
                                               const std::uint16_t* const (&low)[kMatrices],
                                               const std::uint16_t* const (&high)[kMatrices], int columns,
                                               const std::uint16_t* x, int batch, float (&sums)[kMatrices][kTiles][4]) {
  constexpr int kSlabs = Ring<kMatrices>::kSlabs;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int count = ((columns + kSlab - 1) / kSlab - warp + kWarps - 1) / kWarps;
  const auto column = [&](int i) { return (warp + i * kWarps) * kSlab + lane % 4 * 8; };
  // Groups of copies are counted, so that there is one for every slab, also for one that is not there.
  const auto ask = [&](int i, int slab) {
    const int k = column(i);
#pragma unroll
    for (int m = 0; m < kMatrices; ++m) {
      if (k >= columns) continue;
      copy_ahead(ring.at(slab, m, 0), low[m] + k);
      copy_ahead(ring.at(slab, m, 1), high[m] + k);
    }
    end_group_of_copies();
  };
#pragma unroll
  for (int slab = 0; slab < kSlabs; ++slab) ask(slab, slab);
  take_turn();
  for (int first = 0; first < count; first += kSlabs) {
#pragma unroll
    for (int slab = 0; slab < kSlabs; ++slab) {
      const int i = first + slab, k = column(i);
      if (i >= count) break;
      uint4 numbers[kTiles];
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const int row = tile * kRowTile + lane / 4;
        // Of a tile's rows those that are not there are not read: all blocks together read x as often as there are
        // blocks.
        const bool there = k < columns && row < batch;
        numbers[tile] = there ? load_cached(x + static_cast<std::int64_t>(row) * columns + k) : uint4{};
      }
      wait_for_copies<kSlabs - 1>();
#pragma unroll
      for (int m = 0; m < kMatrices; ++m) {
        const uint4 weights[2] = {k < columns ? *ring.at(slab, m, 0) : uint4{},
                                  k < columns ? *ring.at(slab, m, 1) : uint4{}};
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          multiply<kDType>(sums[m][tile], weights[0], weights[1], numbers[tile]);
        }
      }
      // Its weights are in registers, or the products would not have begun.
      ask(i + kSlabs, slab);
    }
  }
}

// The warps' sums, brought together in shared memory [kWarps][kTiles * 8][16 + 1]: total(b, n).
template <int kTiles>
struct Meeting {
  static constexpr int kStride = kTileRows + 1;  // no two of a warp's numbers in one bank
  static constexpr int kFloats = kTiles * kRowTile * kStride, kRoom = kWarps * kFloats;
  float* shared;

  __device__ void put(const float (&sums)[kTiles][4]) const {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    float* const own = shared + warp * kFloats;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int n = lane / 4 + i / 2 * 8, b = tile * kRowTile + lane % 4 * 2 + i % 2;
        own[b * kStride + n] = sums[tile][i];
      }
    }
  }

  __device__ float total(int b, int n) const {
    float sum = 0;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) sum += shared[warp * kFloats + b * kStride + n];
    return sum;
  }
};

// Sets of 16 rows that a block has of every matrix: with many rows of x, which every block reads, fewer blocks read it
// from the L2 cache. Two matrices at a time have that by themselves; with four a step took longer on an H200.
constexpr int sets_of(int tiles) { return tiles > 1 ? 2 : 1; }

// Blocks that are to fit on a multiprocessor.
constexpr int blocks_of(int tiles) { return tiles == 1 ? 3 : tiles <= 4 ? 2 : 1; }

template <DType kDType, int kTiles, int kSets>
__global__ void __launch_bounds__(kThreads, blocks_of(kTiles)) project_kernel(const Product product) {
  const Segment& segment = segment_of(product, static_cast<int>(blockIdx.x));
  const int first = (static_cast<int>(blockIdx.x) - segment.first_tile) * kSets * kTileRows;
  const auto row = [&](int n) {
    return static_cast<const std::uint16_t*>(segment.data) + min(n, segment.rows - 1) * segment.stride;
  };
  const std::uint16_t *low[kSets], *high[kSets];
#pragma unroll
  for (int set = 0; set < kSets; ++set) {
    low[set] = row(first + set * kTileRows + threadIdx.x % kWarp / 4);
    high[set] = row(first + set * kTileRows + threadIdx.x % kWarp / 4 + 8);
  }
  float sums[kSets][kTiles][4] = {};
  multiply_slabs<kDType, kSets, kTiles>(Ring<kSets>{dynamic_shared_memory<uint4>()}, low, high, product.columns,
                                        static_cast<const std::uint16_t*>(product.x), product.batch, sums);
  __syncthreads();  // the sums meet where weights were
  const auto meeting = [&](int set) {
    return Meeting<kTiles>{dynamic_shared_memory<float>() + set * Meeting<kTiles>::kRoom};
  };
#pragma unroll
  for (int set = 0; set < kSets; ++set) meeting(set).put(sums[set]);
  __syncthreads();
  constexpr int kRows = kSets * kTileRows;
  for (int i = threadIdx.x; i < product.batch * kRows; i += kThreads) {
    const int b = i / kRows, n = i % kRows;
    if (first + n >= segment.rows) continue;
    const float bias = segment.bias ? segment.bias[first + n] : 0.0f;
    segment.out[static_cast<std::int64_t>(b) * segment.rows + first + n] =
        meeting(n / kTileRows).total(b, n % kTileRows) + bias;
  }
}

template <DType kDType, int kTiles>
__global__ void __launch_bounds__(kThreads, blocks_of(kTiles)) project_gated_kernel(const GatedProduct product) {
  const int rows = product.gate.rows, first = blockIdx.x * kTileRows, g = threadIdx.x % kWarp / 4;
  const auto row = [&](const Matrix& matrix, int n) {
    return static_cast<const std::uint16_t*>(matrix.data) + min(n, rows - 1) * matrix.stride;
  };
  const std::uint16_t* const low[2] = {row(product.gate, first + g), row(product.up, first + g)};
  const std::uint16_t* const high[2] = {row(product.gate, first + g + 8), row(product.up, first + g + 8)};
  float sums[2][kTiles][4] = {};
  multiply_slabs<kDType, 2, kTiles>(Ring<2>{dynamic_shared_memory<uint4>()}, low, high, product.gate.columns,
                                    static_cast<const std::uint16_t*>(product.x), product.batch, sums);
  __syncthreads();  // the sums meet where weights were
  float* const shared = dynamic_shared_memory<float>();
  const Meeting<kTiles> gates{shared}, ups{shared + Meeting<kTiles>::kRoom};
  gates.put(sums[0]);
  ups.put(sums[1]);
  __syncthreads();
  for (int i = threadIdx.x; i < product.batch * kTileRows; i += kThreads) {
    const int b = i / kTileRows, n = first + i % kTileRows;
    if (n >= rows) continue;
    const float gate = gates.total(b, i % kTileRows) + (product.gate.bias ? product.gate.bias[n] : 0.0f);
    const float up = ups.total(b, i % kTileRows) + (product.up.bias ? product.up.bias[n] : 0.0f);
    static_cast<std::uint16_t*>(product.out)[static_cast<std::int64_t>(b) * rows + n] =
        Format<kDType>::narrow(gated(product.activation, gate) * up);
  }
}

// found[b] = x[first + b] . row, in all lanes.
__device__ __forceinline__ void dot_rows(const float* row, const float* x, int first, int count, int columns,
                                         float (&found)[kRowTile]) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int b = 0; b < kRowTile; ++b) found[b] = 0;
  for (int k = lane; k < columns; k += kWarp) {
    const float weight = row[k];
#pragma unroll
    for (int b = 0; b < kRowTile; ++b) {
      if (b < count) found[b] += weight * x[static_cast<std::int64_t>(first + b) * columns + k];
    }
  }
#pragma unroll
  for (int b = 0; b < kRowTile; ++b) found[b] = warp_sum(found[b]);
}

__global__ void __launch_bounds__(kThreads) project_float_kernel(const Product product) {
  take_turn();
  const Segment& segment = segment_of(product, static_cast<int>(blockIdx.x));
  const int n = (static_cast<int>(blockIdx.x) - segment.first_tile) * kWarps + threadIdx.x / kWarp;
  if (n >= segment.rows) return;
  const float* const row = static_cast<const float*>(segment.data) + n * segment.stride;
  for (int first = 0; first < product.batch; first += kRowTile) {
    const int count = min(product.batch - first, kRowTile), b = threadIdx.x % kWarp;
    float found[kRowTile];
    dot_rows(row, static_cast<const float*>(product.x), first, count, product.columns, found);
#pragma unroll
    for (int i = 0; i < kRowTile; ++i) {
      if (b != i || i >= count) continue;
      segment.out[static_cast<std::int64_t>(first + i) * segment.rows + n] =
          found[i] + (segment.bias ? segment.bias[n] : 0.0f);
    }
  }
}

__global__ void __launch_bounds__(kThreads) project_gated_float_kernel(const GatedProduct product) {
  take_turn();
  const int rows = product.gate.rows, n = blockIdx.x * kWarps + threadIdx.x / kWarp;
  if (n >= rows) return;
  const auto row = [&](const Matrix& m) { return static_cast<const float*>(m.data) + n * m.stride; };
  const auto bias = [&](const Matrix& m) { return m.bias ? m.bias[n] : 0.0f; };
  for (int first = 0; first < product.batch; first += kRowTile) {
    const int count = min(product.batch - first, kRowTile), b = threadIdx.x % kWarp;
    float gates[kRowTile], ups[kRowTile];
    const float* const x = static_cast<const float*>(product.x);
    dot_rows(row(product.gate), x, first, count, product.gate.columns, gates);
    dot_rows(row(product.up), x, first, count, product.up.columns, ups);
#pragma unroll
    for (int i = 0; i < kRowTile; ++i) {
      if (b != i || i >= count) continue;
      static_cast<float*>(product.out)[static_cast<std::int64_t>(first + i) * rows + n] =
          gated(product.activation, gates[i] + bias(product.gate)) * (ups[i] + bias(product.up));
    }
  }
}

// Calls f with the number of row tiles, one of 1, 2, 4, 8, as a constant.
template <class F>
cudaError_t with_tiles(int batch, F f) {
  if (batch <= 1 * kRowTile) return f(std::integral_constant<int, 1>{});
  if (batch <= 2 * kRowTile) return f(std::integral_constant<int, 2>{});
  if (batch <= 4 * kRowTile) return f(std::integral_constant<int, 4>{});
  return f(std::integral_constant<int, 8>{});
}

template <DType kDType>
cudaError_t project_half(cudaStream_t stream, const Product& product, int tiles) {
  return with_tiles(product.batch, [&](auto kTiles) {
    constexpr int kSets = sets_of(kTiles);
    const std::size_t bytes = std::max(Ring<kSets>::kBytes, kSets * Meeting<kTiles>::kRoom * sizeof(float));
    const auto kernel = project_kernel<kDType, kTiles, kSets>;
    if (const cudaError_t error = allow_shared(kernel, bytes); error != cudaSuccess) return error;
    return launch(stream, tiles, kThreads, bytes, kernel, product);
  });
}

template <DType kDType>
cudaError_t project_gated_half(cudaStream_t stream, const GatedProduct& product) {
  return with_tiles(product.batch, [&](auto kTiles) {
    const std::size_t bytes = std::max(Ring<2>::kBytes, 2 * Meeting<kTiles>::kRoom * sizeof(float));
    const auto kernel = project_gated_kernel<kDType, kTiles>;
    if (const cudaError_t error = allow_shared(kernel, bytes); error != cudaSuccess) return error;
    return launch(stream, (product.gate.rows + kTileRows - 1) / kTileRows, kThreads, bytes, kernel, product);
  });
}

}  // namespace

cudaError_t project(cudaStream_t stream, DType dtype, const Matrix* matrices, int count, const void* x, int batch,
                    float* const* outputs) {
  const int sets = sets_of((batch + kRowTile - 1) / kRowTile);
  const int tile_rows = dtype == DType::kFloat32 ? kWarps : sets * kTileRows;
  Product product{{}, count, matrices[0].columns, batch, x};
  int tiles = 0;
  for (int i = 0; i < count; ++i) {
    product.segments[i] = {matrices[i].data, matrices[i].bias, outputs[i], matrices[i].stride, matrices[i].rows, tiles};
    tiles += (matrices[i].rows + tile_rows - 1) / tile_rows;
  }
  if (dtype == DType::kFloat32) return launch(stream, tiles, kThreads, 0, project_float_kernel, product);
  if (dtype == DType::kBFloat16) return project_half<DType::kBFloat16>(stream, product, tiles);
  return project_half<DType::kFloat16>(stream, product, tiles);
}

cudaError_t project_gated(cudaStream_t stream, DType dtype, cpu::GatedActivation activation, const Matrix& gate,
                          const Matrix& up, const void* x, int batch, void* out) {
  const GatedProduct product{gate, up, x, out, batch, activation};
  if (dtype == DType::kFloat32) {
    return launch(stream, (gate.rows + kWarps - 1) / kWarps, kThreads, 0, project_gated_float_kernel, product);
  }
  if (dtype == DType::kBFloat16) return project_gated_half<DType::kBFloat16>(stream, product);
  return project_gated_half<DType::kFloat16>(stream, product);
}

}  // namespace dive::cuda
