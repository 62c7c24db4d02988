// float16 as far as kernels that compute in float32 need it: bits and conversions, no arithmetic.
#pragma once

#include "cuda_runtime.h"
#include "formats.h"

struct __half {
  std::uint16_t bits;
};
struct alignas(4) __half2 {
  __half x, y;
};
using half = __half;
using half2 = __half2;

inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline unsigned short __half_as_ushort(__half x) { return x.bits; }
inline float __half2float(__half x) { return dive_host_cuda::f16_to_float(x.bits); }
inline __half __float2half_rn(float x) { return {dive_host_cuda::float_to_f16(x)}; }
inline __half __float2half(float x) { return __float2half_rn(x); }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline float2 __half22float2(__half2 v) { return {__half2float(v.x), __half2float(v.y)}; }
