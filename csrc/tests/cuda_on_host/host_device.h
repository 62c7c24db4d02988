// What device code calls, in host C++. Where the device's result is an approximation (__expf, rsqrtf, ...) this one
// is the C library's, so last bits differ.
#pragma once

#include <math.h>

#include <bit>
#include <concepts>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <source_location>
#include <type_traits>

#include "block.h"
#include "host_types.h"

// Where the kernel calls a function, if this is the default of its last parameter.
#define DIVE_HOST_CUDA_HERE std::source_location where = std::source_location::current()

// Meeting places. All threads, or lanes, must come by the same line of the kernel; masks must name all 32 lanes.
inline void __syncthreads(DIVE_HOST_CUDA_HERE) { dive_host_cuda::barrier({"__syncthreads", where}, false); }
inline int __syncthreads_count(int predicate, DIVE_HOST_CUDA_HERE) {
  return static_cast<int>(dive_host_cuda::barrier({"__syncthreads_count", where}, predicate != 0));
}
inline int __syncthreads_or(int predicate, DIVE_HOST_CUDA_HERE) {
  return dive_host_cuda::barrier({"__syncthreads_or", where}, predicate != 0) != 0;
}
inline int __syncthreads_and(int predicate, DIVE_HOST_CUDA_HERE) {
  return dive_host_cuda::barrier({"__syncthreads_and", where}, predicate == 0) == 0;
}
inline void __syncwarp(unsigned mask = 0xffffffff, DIVE_HOST_CUDA_HERE) {
  dive_host_cuda::gather({"__syncwarp", where}, mask, nullptr, 0, dive_host_cuda::Orders::kMemory);
}

namespace dive_host_cuda {

// What CUDA's shuffles and reductions take.
template <class T>
concept Word = std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8);

template <Word T>
void gather_value(Place place, unsigned mask, T value) {
  std::uint64_t word = 0;
  std::memcpy(&word, &value, sizeof value);
  gather(place, mask, &word, 1);
}

template <Word T>
T gathered_value(unsigned lane) {
  const std::uint64_t word = gathered(lane);
  T value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

// The value of lane `source(own, first, last)` in the lane's group of `width`, of the own lane if that is outside.
template <Word T, class Source>
T shuffle(Place place, unsigned mask, T value, int width, Source source) {
  if (width < 1 || width > 32 || (width & (width - 1))) fail(place, "the width must be 1, 2, 4, 8, 16 or 32");
  gather_value(place, mask, value);
  const int own = static_cast<int>(lane()), first = own & ~(width - 1), last = first + width - 1;
  const int lane = source(own, first, last);
  return gathered_value<T>(static_cast<unsigned>(lane));
}

template <Word T, class Combine>
T reduce(Place place, unsigned mask, T value, Combine combine) {
  gather_value(place, mask, value);
  T result = gathered_value<T>(0);
  for (unsigned lane = 1; lane < 32; ++lane) result = combine(result, gathered_value<T>(lane));
  return result;
}

inline unsigned ballot(Place place, unsigned mask, bool predicate) {
  gather_value(place, mask, static_cast<unsigned>(predicate));
  unsigned bits = 0;
  for (unsigned lane = 0; lane < 32; ++lane) bits |= gathered_value<unsigned>(lane) << lane;
  return bits;
}

}  // namespace dive_host_cuda

template <dive_host_cuda::Word T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, DIVE_HOST_CUDA_HERE) {
  return dive_host_cuda::shuffle({"__shfl_sync", where}, mask, value, width,
                                 [=](int, int first, int) { return first + (source & (width - 1)); });
}
template <dive_host_cuda::Word T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, DIVE_HOST_CUDA_HERE) {
  return dive_host_cuda::shuffle({"__shfl_xor_sync", where}, mask, value, width, [=](int own, int, int last) {
    return (own ^ (bits & 31)) > last ? own : own ^ (bits & 31);
  });
}
template <dive_host_cuda::Word T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, DIVE_HOST_CUDA_HERE) {
  return dive_host_cuda::shuffle({"__shfl_down_sync", where}, mask, value, width, [=](int own, int, int last) {
    const int source = own + static_cast<int>(delta & 31);
    return source > last ? own : source;
  });
}
template <dive_host_cuda::Word T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, DIVE_HOST_CUDA_HERE) {
  return dive_host_cuda::shuffle({"__shfl_up_sync", where}, mask, value, width, [=](int own, int first, int) {
    const int source = own - static_cast<int>(delta & 31);
    return source < first ? own : source;
  });
}
inline unsigned __ballot_sync(unsigned mask, int predicate, DIVE_HOST_CUDA_HERE) {
  return dive_host_cuda::ballot({"__ballot_sync", where}, mask, predicate != 0);
}
inline int __any_sync(unsigned mask, int predicate, DIVE_HOST_CUDA_HERE) {
  return dive_host_cuda::ballot({"__any_sync", where}, mask, predicate != 0) != 0;
}
inline int __all_sync(unsigned mask, int predicate, DIVE_HOST_CUDA_HERE) {
  return dive_host_cuda::ballot({"__all_sync", where}, mask, predicate != 0) == 0xffffffff;
}
#define DIVE_HOST_CUDA_REDUCE(name, T, expression)                                                        \
  inline T name(unsigned mask, T value, DIVE_HOST_CUDA_HERE) {                                            \
    return dive_host_cuda::reduce({#name, where}, mask, value, [](T a, T b) -> T { return expression; }); \
  }
DIVE_HOST_CUDA_REDUCE(__reduce_add_sync, unsigned, a + b)
DIVE_HOST_CUDA_REDUCE(__reduce_min_sync, unsigned, a < b ? a : b)
DIVE_HOST_CUDA_REDUCE(__reduce_max_sync, unsigned, a < b ? b : a)
DIVE_HOST_CUDA_REDUCE(__reduce_min_sync, int, a < b ? a : b)
DIVE_HOST_CUDA_REDUCE(__reduce_max_sync, int, a < b ? b : a)
DIVE_HOST_CUDA_REDUCE(__reduce_and_sync, unsigned, a& b)
DIVE_HOST_CUDA_REDUCE(__reduce_or_sync, unsigned, a | b)
DIVE_HOST_CUDA_REDUCE(__reduce_xor_sync, unsigned, a ^ b)
#undef DIVE_HOST_CUDA_REDUCE

// Atomics. None of float, on purpose: their sums depend on the order. Another thread may run after each. Relaxed, as
// the device's are.
namespace dive_host_cuda {

template <class T>
concept Atomic = std::same_as<T, int> || std::same_as<T, unsigned> || std::same_as<T, unsigned long long>;

template <Atomic T, class Update>
T atomic(T* address, Update update) {
  T old = __atomic_load_n(address, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(address, &old, update(old), false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  after_atomic(address);
  return old;
}

}  // namespace dive_host_cuda

#define DIVE_HOST_CUDA_ATOMIC(name, expression)                                     \
  template <dive_host_cuda::Atomic T>                                               \
  T name(T* address, std::type_identity_t<T> x) {                                   \
    return dive_host_cuda::atomic(address, [x](T old) -> T { return expression; }); \
  }
// Wraps around as the device does, where signed addition in C++ must not.
DIVE_HOST_CUDA_ATOMIC(atomicAdd, static_cast<T>(std::make_unsigned_t<T>(old) + std::make_unsigned_t<T>(x)))
DIVE_HOST_CUDA_ATOMIC(atomicMax, old < x ? x : old)
DIVE_HOST_CUDA_ATOMIC(atomicMin, x < old ? x : old)
DIVE_HOST_CUDA_ATOMIC(atomicExch, (static_cast<void>(old), x))
DIVE_HOST_CUDA_ATOMIC(atomicOr, old | x)
DIVE_HOST_CUDA_ATOMIC(atomicAnd, old& x)
#undef DIVE_HOST_CUDA_ATOMIC
inline unsigned atomicInc(unsigned* address, unsigned limit) {
  return dive_host_cuda::atomic(address, [limit](unsigned old) { return old >= limit ? 0 : old + 1; });
}
template <dive_host_cuda::Atomic T>
T atomicCAS(T* address, std::type_identity_t<T> compare, std::type_identity_t<T> value) {
  return dive_host_cuda::atomic(address, [=](T old) { return old == compare ? value : old; });
}

inline void __threadfence() { dive_host_cuda::fence(); }
inline void __threadfence_block() { dive_host_cuda::fence(); }
inline void __threadfence_system() { dive_host_cuda::fence(); }
inline void __nanosleep(unsigned) { dive_host_cuda::yield(); }

[[noreturn]] inline void __trap(DIVE_HOST_CUDA_HERE) { dive_host_cuda::fail({"__trap", where}, "the kernel gave up"); }
inline long long clock64() {
  static long long ticks = 0;
  return __atomic_add_fetch(&ticks, 1, __ATOMIC_RELAXED);
}

// Loads and stores with a hint, which the host has no use for.
template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
T __ldca(const T* p) {
  return *p;
}
template <class T>
void __stcg(T* p, std::type_identity_t<T> x) {
  *p = x;
}
template <class T>
void __stcs(T* p, std::type_identity_t<T> x) {
  *p = x;
}

// Bits.
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return std::countl_zero(static_cast<unsigned long long>(x)); }
inline int __ffs(int x) { return x ? std::countr_zero(static_cast<unsigned>(x)) + 1 : 0; }
inline int __ffsll(long long x) { return x ? std::countr_zero(static_cast<unsigned long long>(x)) + 1 : 0; }
inline unsigned __brev(unsigned x) {
  unsigned y = 0;
  for (int i = 0; i < 32; ++i) y |= (x >> i & 1) << (31 - i);
  return y;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(std::uint64_t{a} * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const std::uint64_t bytes = std::uint64_t{y} << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned choice = selector >> 4 * i, byte = static_cast<unsigned>(bytes >> 8 * (choice & 7) & 0xff);
    result |= (choice & 8 ? (byte & 0x80 ? 0xffu : 0u) : byte) << 8 * i;
  }
  return result;
}
inline int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 32; i += 8) c += static_cast<std::int8_t>(a >> i) * static_cast<std::int8_t>(b >> i);
  return c;
}
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return std::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return std::bit_cast<double>(x); }

// Arithmetic. glibc declares functions of the first few names, which it does not export.
#define __expf(x) expf(x)
#define __logf(x) logf(x)
#define __log2f(x) log2f(x)
#define __sinf(x) sinf(x)
#define __cosf(x) cosf(x)
#define __powf(x, y) powf(x, y)
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1 / sqrtf(x); }
inline float __frsqrt_rn(float x) { return static_cast<float>(1 / sqrt(static_cast<double>(x))); }
inline float __frcp_rn(float x) { return 1 / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __saturatef(float x) { return x > 0 ? fminf(x, 1) : 0; }
inline int __float2int_rn(float x) { return static_cast<int>(nearbyintf(x)); }
inline int __float2int_rz(float x) { return static_cast<int>(x); }
inline int __float2int_rd(float x) { return static_cast<int>(floorf(x)); }
inline int __float2int_ru(float x) { return static_cast<int>(ceilf(x)); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __uint2float_rn(unsigned x) { return static_cast<float>(x); }

// Of a NaN and a number, the number, as on the device.
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }
#define DIVE_HOST_CUDA_MIN_MAX(T)                  \
  inline T min(T a, T b) { return b < a ? b : a; } \
  inline T max(T a, T b) { return a < b ? b : a; }
DIVE_HOST_CUDA_MIN_MAX(int)
DIVE_HOST_CUDA_MIN_MAX(unsigned)
DIVE_HOST_CUDA_MIN_MAX(long)
DIVE_HOST_CUDA_MIN_MAX(unsigned long)
DIVE_HOST_CUDA_MIN_MAX(long long)
DIVE_HOST_CUDA_MIN_MAX(unsigned long long)
#undef DIVE_HOST_CUDA_MIN_MAX
