// CUDA's keywords and vector types as plain C++.
#pragma once

#include <cstddef>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
// Blocks run one after the other, so one copy does. It keeps what the block before left in it; dynamic shared memory,
// which is filled with NaN, shows more mistakes.
#define __shared__ static

// CUDA's pairs and quadruples are aligned to their size, up to 16 bytes; triples like their element.
#define DIVE_HOST_CUDA_VECTORS(T, name, pair, quadruple)             \
  struct name##2 {                                                   \
    alignas(pair) T x;                                               \
    T y;                                                             \
  };                                                                 \
  struct name##3 { T x, y, z; };                                     \
  struct name##4 {                                                   \
    alignas(quadruple) T x;                                          \
    T y, z, w;                                                       \
  };                                                                 \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }         \
  inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; } \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
DIVE_HOST_CUDA_VECTORS(signed char, char, 2, 4)
DIVE_HOST_CUDA_VECTORS(unsigned char, uchar, 2, 4)
DIVE_HOST_CUDA_VECTORS(short, short, 4, 8)
DIVE_HOST_CUDA_VECTORS(unsigned short, ushort, 4, 8)
DIVE_HOST_CUDA_VECTORS(int, int, 8, 16)
DIVE_HOST_CUDA_VECTORS(unsigned, uint, 8, 16)
DIVE_HOST_CUDA_VECTORS(float, float, 8, 16)
DIVE_HOST_CUDA_VECTORS(long long, longlong, 16, 16)
DIVE_HOST_CUDA_VECTORS(unsigned long long, ulonglong, 16, 16)
DIVE_HOST_CUDA_VECTORS(double, double, 16, 16)
#undef DIVE_HOST_CUDA_VECTORS

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
};

// Of the thread that runs.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
inline constexpr int warpSize = 32;
