// The instructions of the device that have no spelling in CUDA C++, and the number formats of the weights.
//
// Everything here is a thin name for one instruction; kernels include nothing else that is written in PTX. Tests on
// machines without a GPU replace this file by csrc/tests/cuda_on_host/cuda/ptx.h, which gives the same results bit
// for bit (but for the order of the sums inside one mma), so a change here is a change there.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace dive::cuda {

// bfloat16 and float16 travel as their bits, two to a 32-bit register with the element of the lower address in the
// lower half. Rounding is to nearest, ties to even; every NaN becomes the canonical 0x7fff.

__device__ __forceinline__ float bf16_to_float(std::uint16_t x) {
  return __uint_as_float(static_cast<std::uint32_t>(x) << 16);
}

__device__ __forceinline__ float f16_to_float(std::uint16_t x) { return __half2float(__ushort_as_half(x)); }

__device__ __forceinline__ std::uint16_t float_to_bf16(float x) {
  std::uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}

__device__ __forceinline__ std::uint16_t float_to_f16(float x) {
  std::uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}

__device__ __forceinline__ std::uint32_t pack_bf16(float lo, float hi) {
  std::uint32_t bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(hi), "f"(lo));
  return bits;
}

__device__ __forceinline__ std::uint32_t pack_f16(float lo, float hi) {
  std::uint32_t bits;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(hi), "f"(lo));
  return bits;
}

// d [16, 8] += a [16, 16] b [16, 8] by one warp, sums in float32. With lane = 4 g + t, a lane holds (PTX ISA, "Matrix
// Fragments for mma.m16n8k16"), each register a pair of neighbours, the first in its lower half:
//   a[0] = A[g, 2t..2t+1]    a[1] = A[g+8, 2t..]    a[2] = A[g, 2t+8..]    a[3] = A[g+8, 2t+8..]
//   b[0] = B[2t..2t+1, g]    b[1] = B[2t+8..2t+9, g]
//   d[0..1] = D[g, 2t..2t+1]                        d[2..3] = D[g+8, 2t..2t+1]
__device__ __forceinline__ void mma_bf16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void mma_f16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// 16 aligned bytes that no kernel of this graph writes and that are read once, such as weights: past the L1 cache,
// whole 128-byte lines into L2. Reading through .nc what an earlier kernel wrote is undefined where the kernels overlap
// (let_next_kernel_start), hence load_cached.
__device__ __forceinline__ uint4 load_streaming(const void* p) {
  uint4 x;
  asm("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
      : "l"(__cvta_generic_to_global(p)));
  return x;
}

// 16 aligned bytes that an earlier kernel, or this one, may have written.
__device__ __forceinline__ uint4 load_cached(const void* p) {
  uint4 x;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(__cvta_generic_to_global(p))
               : "memory");
  return x;
}

// Copies 16 aligned bytes to shared memory, while the thread goes on; nobody writes them meanwhile. The thread finds
// them there behind wait_for_copies(), other threads behind a barrier after that.
__device__ __forceinline__ void copy_ahead(void* shared, const void* p) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(
                   static_cast<unsigned>(__cvta_generic_to_shared(shared))),
               "l"(__cvta_generic_to_global(p))
               : "memory");
}

// What a thread has asked for since the last such call is a group, perhaps an empty one.
__device__ __forceinline__ void end_group_of_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for all groups of the thread's but the last kLeft.
template <int kLeft>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

// Waits for all copies of the thread's.
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Programmatic dependent launch (cudaLaunchAttributeProgrammaticStreamSerialization): a kernel begins while the one
// before it still runs, once every block of that one has called let_next_kernel_start() or ended, and sees its writes
// after wait_for_previous_kernel(). Architectures before 9.0 run kernels one after the other, where neither is needed.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Clusters of blocks, which architectures from 9.0 on have; the code for earlier ones must not be run. Blocks of a
// cluster run at the same time and reach each other's shared memory.
__device__ __forceinline__ unsigned cluster_rank() {
#if __CUDA_ARCH__ >= 900
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#else
  __trap();
#endif
}

__device__ __forceinline__ unsigned cluster_size() {
#if __CUDA_ARCH__ >= 900
  unsigned size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
#else
  __trap();
#endif
}

// All threads of the cluster wait for each other, and see what was written before, in shared memory too. No block may
// end before the last of its peers has read from it.
__device__ __forceinline__ void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __trap();
#endif
}

// cluster_sync() in two parts, for what may be done before the peers are there.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#else
  __trap();
#endif
}

__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __trap();
#endif
}

// What block `rank` has where `own` lies in this block's shared memory.
__device__ __forceinline__ float load_of_block(const float* own, unsigned rank) {
#if __CUDA_ARCH__ >= 900
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(own));
  unsigned there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  float x;
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(x) : "r"(there) : "memory");
  return x;
#else
  __trap();
#endif
}

// The block's dynamic shared memory, 16-byte aligned.
template <class T>
__device__ __forceinline__ T* dynamic_shared_memory() {
  extern __shared__ uint4 dive_dynamic_shared_memory[];
  return reinterpret_cast<T*>(dive_dynamic_shared_memory);
}

// The value of a conditional graph node, read when the node is reached next. Runtimes before 12.4 have none.
__device__ __forceinline__ void set_graph_condition(unsigned long long handle, unsigned value) {
#if CUDART_VERSION >= 12040
  cudaGraphSetConditional(handle, value);
#else
  __trap();
#endif
}

}  // namespace dive::cuda
