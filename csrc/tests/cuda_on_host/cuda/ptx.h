// csrc/cuda/ptx.h on the host: the same names and results. One mma adds its 16 products one after the other, in
// float32; the device rounds such sums in its own way.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace dive::cuda {

inline float bf16_to_float(std::uint16_t x) { return dive_host_cuda::bf16_to_float(x); }
inline float f16_to_float(std::uint16_t x) { return dive_host_cuda::f16_to_float(x); }
inline std::uint16_t float_to_bf16(float x) { return dive_host_cuda::float_to_bf16(x); }
inline std::uint16_t float_to_f16(float x) { return dive_host_cuda::float_to_f16(x); }
inline std::uint32_t pack_bf16(float lo, float hi) {
  return float_to_bf16(lo) | static_cast<std::uint32_t>(float_to_bf16(hi)) << 16;
}
inline std::uint32_t pack_f16(float lo, float hi) {
  return float_to_f16(lo) | static_cast<std::uint32_t>(float_to_f16(hi)) << 16;
}

// Every lane brings its registers, and sums its own four elements.
template <float (*to_float)(std::uint16_t)>
void mma_on_host(dive_host_cuda::Place place, float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  const auto word = [](std::uint32_t lo, std::uint32_t hi) { return std::uint64_t{hi} << 32 | lo; };
  const std::uint64_t words[3] = {word(a[0], a[1]), word(a[2], a[3]), word(b[0], b[1])};
  dive_host_cuda::gather(place, 0xffffffff, words, 3);
  const unsigned g = dive_host_cuda::lane() / 4, t = dive_host_cuda::lane() % 4;
  const auto element = [](std::uint64_t word, unsigned quarter) {
    return to_float(static_cast<std::uint16_t>(word >> 16 * quarter));
  };
  // Rows g and g + 8 of A, columns 2 t and 2 t + 1 of B. The lanes whose number ends in u hold what meets at 2 u,
  // 2 u + 1, 2 u + 8 and 2 u + 9.
  float rows[2][16], columns[2][16];
  for (unsigned u = 0; u < 4; ++u) {
    const std::uint64_t a_words[2] = {dive_host_cuda::gathered(4 * g + u, 0), dive_host_cuda::gathered(4 * g + u, 1)};
    for (unsigned j = 0; j < 2; ++j) {
      const std::uint64_t b_word = dive_host_cuda::gathered(4 * (2 * t + j) + u, 2);
      for (unsigned i = 0; i < 4; ++i) {
        const unsigned k = 2 * u + i % 2 + i / 2 * 8;
        rows[j][k] = element(a_words[i / 2], 2 * j + i % 2);
        columns[j][k] = element(b_word, i);
      }
    }
  }
  for (unsigned k = 0; k < 16; ++k) {
    for (unsigned i = 0; i < 4; ++i) d[i] += rows[i / 2][k] * columns[i % 2][k];
  }
}

inline void mma_bf16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2], DIVE_HOST_CUDA_HERE) {
  mma_on_host<bf16_to_float>({"mma_bf16", where}, d, a, b);
}
inline void mma_f16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2], DIVE_HOST_CUDA_HERE) {
  mma_on_host<f16_to_float>({"mma_f16", where}, d, a, b);
}

inline uint4 load_streaming(const void* p) { return *static_cast<const uint4*>(p); }
inline uint4 load_cached(const void* p) { return *static_cast<const uint4*>(p); }

// Sixteen bytes.
inline void move_uint4(void* to, const void* from) { *static_cast<uint4*>(to) = *static_cast<const uint4*>(from); }
inline void copy_ahead(void* shared, const void* p) { dive_host_cuda::copy_ahead(shared, p, move_uint4); }
inline void end_group_of_copies() { dive_host_cuda::end_group_of_copies(); }
template <int kLeft>
void wait_for_copies() {
  dive_host_cuda::wait_for_copies(kLeft, move_uint4);
}
inline void wait_for_copies() {
  end_group_of_copies();
  dive_host_cuda::wait_for_copies(0, move_uint4);
}

inline void wait_for_previous_kernel() { dive_host_cuda::wait_for_previous_kernel(); }
inline void let_next_kernel_start() { dive_host_cuda::let_next_kernel_start(); }

inline unsigned cluster_rank() { return dive_host_cuda::cluster_rank(); }
inline unsigned cluster_size() { return dive_host_cuda::cluster_size(); }
inline void cluster_sync(DIVE_HOST_CUDA_HERE) { dive_host_cuda::cluster_barrier({"cluster_sync", where}); }
// Nobody goes on before all have come, and nobody has come before wait.
inline void cluster_arrive() {}
inline void cluster_wait(DIVE_HOST_CUDA_HERE) { dive_host_cuda::cluster_barrier({"cluster_wait", where}); }
inline float load_of_block(const float* own, unsigned rank, DIVE_HOST_CUDA_HERE) {
  return *static_cast<const float*>(dive_host_cuda::of_block({"load_of_block", where}, own, rank));
}

template <class T>
T* dynamic_shared_memory() {
  return static_cast<T*>(dive_host_cuda::dynamic_shared_memory());
}

inline void set_graph_condition(cudaGraphConditionalHandle handle, unsigned value) {
  cudaGraphSetConditional(handle, value);
}

}  // namespace dive::cuda
