// Vectors of floats as wide as the level a kernel is compiled for, in the compilers' own vector types, so that one
// source serves every level. Include it in *_kernel.cpp files only: everything here lives in the level's namespace, and
// nothing of the standard library's inline code may be shared between levels (the linker would keep one copy, perhaps
// one with instructions the machine lacks).
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if !defined(DIVE_ISA)
#error "compiled once per level with -DDIVE_ISA=<namespace>"
#endif

namespace dive::cpu::DIVE_ISA {

#if defined(__AVX512F__)
inline constexpr int kLanes = 16;
#elif defined(__AVX2__)
inline constexpr int kLanes = 8;
#else
inline constexpr int kLanes = 4;
#endif

// 32 vector registers, where others have 16.
#if defined(__AVX512F__) || defined(__aarch64__)
inline constexpr bool kManyRegisters = true;
#else
inline constexpr bool kManyRegisters = false;
#endif

typedef float vf __attribute__((vector_size(4 * kLanes)));
typedef std::int32_t vi __attribute__((vector_size(4 * kLanes)));

inline vf load(const float* p) {
  vf v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }

inline vf splat(float x) { return x - vf{}; }

inline vi splat(std::int32_t x) { return x - vi{}; }

// Lane by lane `mask ? a : b`; a mask comes from a comparison.
inline vf select(vi mask, vf a, vf b) { return mask ? a : b; }

// As the comparison goes: a NaN in `a` is lost, one in `b` stays.
inline vf max(vf a, vf b) { return select(a > b, a, b); }

inline float sum(vf v) {
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
}

// e^x within 2 units in the last place; 0 below -87.3 (no denormals), infinite above 88.7, NaN for NaN.
// x = n ln 2 + f with |f| <= ln 2 / 2, ln 2 in two parts so that n ln 2 is exact in the first (Cody and Waite); the
// polynomial is the one of Cephes' expf.
inline vf exp(vf x) {
  const vf shifter = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low mantissa bits
#if defined(__AVX512F__)
  const vf in = (vf)_mm512_maskz_min_ps(0xffff, (__m512)splat(89.0f), (__m512)x);  // NaN where x is it
#else
  const vf in = select(x > splat(89.0f), splat(89.0f), select(x < splat(-89.0f), splat(-89.0f), x));
#endif
  const vf shifted = in * splat(1.44269504088896341f) + shifter;
  const vf n = shifted - shifter;
  const vf f = (in - n * splat(0.693359375f)) - n * splat(-2.12194440e-4f);
  vf p = splat(1.9875691500e-4f);
  p = p * f + splat(1.3981999507e-3f);
  p = p * f + splat(8.3334519073e-3f);
  p = p * f + splat(4.1665795894e-2f);
  p = p * f + splat(1.6666665459e-1f);
  p = p * f + splat(5.0000001201e-1f);
  p = p * (f * f) + f + splat(1.0f);
#if defined(__AVX512F__)
  const __mmask16 kept = _mm512_cmp_ps_mask((__m512)x, (__m512)splat(-87.3f), _CMP_NLT_UQ);
  return (vf)_mm512_maskz_scalef_ps(kept, (__m512)p, (__m512)n);
#else
  // 2^n as two factors, since n reaches 128.
  const vi bits = (vi)shifted - (vi)shifter;
  const vi half = bits >> 1;
  const vf result = p * (vf)((half + 127) << 23) * (vf)((bits - half + 127) << 23);
  return select(x < splat(-87.3f), splat(0.0f), result);
#endif
}

inline vf sigmoid(vf x) { return splat(1.0f) / (splat(1.0f) + exp(-x)); }

inline float widen_bfloat16(std::uint16_t x) {
  const std::uint32_t bits = static_cast<std::uint32_t>(x) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Round to nearest, ties to even; NaN stays NaN.
inline std::uint16_t round_to_bfloat16(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (x != x) return 0x7fc0;
  return static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float widen_float16(std::uint16_t x) {
#if defined(__F16C__)
  return _cvtsh_ss(x);
#elif defined(__aarch64__)
  __fp16 value;
  std::memcpy(&value, &x, sizeof value);
  return value;
#else
  const std::uint32_t sign = static_cast<std::uint32_t>(x & 0x8000) << 16;
  const std::uint32_t magnitude = x & 0x7fff;
  // The exponent moves from bias 15 to 127 by a multiplication, which also normalizes denormals.
  std::uint32_t bits = magnitude << 13;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  value *= 5.192296858534828e33f;  // 2^112
  std::memcpy(&bits, &value, sizeof bits);
  if (magnitude >= 0x7c00) bits = 0x7f800000 | (magnitude & 0x3ff) << 13;
  bits |= sign;
  std::memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

// Round to nearest, ties to even; NaN stays NaN.
inline std::uint16_t round_to_float16(float x) {
#if defined(__F16C__)
  return static_cast<std::uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__aarch64__)
  const __fp16 rounded = static_cast<__fp16>(x);
  std::uint16_t bits;
  std::memcpy(&bits, &rounded, sizeof bits);
  return bits;
#else
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const std::uint32_t sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  std::uint32_t result;
  if (bits > 0x7f800000) {
    result = 0x7e00;
  } else if (bits >= 0x477ff000) {  // 65520, halfway between the largest finite number and the next power of two
    result = 0x7c00;
  } else if (bits < 0x38800000) {  // below 2^-14 float16 counts in units of 2^-24, as float32 does from 0.5 on
    float magnitude;
    std::memcpy(&magnitude, &bits, sizeof bits);
    magnitude += 0.5f;
    std::memcpy(&result, &magnitude, sizeof result);
    result -= 0x3f000000;
  } else {
    result = (bits - (112u << 23) + 0xfff + (bits >> 13 & 1)) >> 13;
  }
  return static_cast<std::uint16_t>(sign | result);
#endif
}

// Stored 16-bit elements; load() widens them and store() rounds to nearest, ties to even.
struct Bf16 {
  std::uint16_t bits;
};
struct F16 {
  std::uint16_t bits;
};
typedef std::uint32_t vu __attribute__((vector_size(4 * kLanes)));
typedef std::uint16_t vh __attribute__((vector_size(2 * kLanes)));

inline vf load(const Bf16* p) {
  // GCC 12 makes six instructions of a conversion to 512 bits that is one, and takes NEON's number by number.
#if defined(__AVX512F__)
  const __m256i narrow = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return (vf)((vu)_mm512_maskz_cvtepu16_epi32(0xffff, narrow) << 16);
#elif defined(__aarch64__)
  uint16x4_t narrow;
  std::memcpy(&narrow, p, sizeof narrow);
  return (vf)vshll_n_u16(narrow, 16);
#else
  vh narrow;
  std::memcpy(&narrow, p, sizeof narrow);
  return (vf)(__builtin_convertvector(narrow, vu) << 16);
#endif
}

inline void store(Bf16* p, vf v) {
  const vu bits = (vu)v;
  const vu rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const vh narrow = __builtin_convertvector(v == v ? rounded : vu{} + 0x7fc0, vh);
  std::memcpy(p, &narrow, sizeof narrow);
}

inline vf load(const F16* p) {
#if defined(__AVX512F__)
  // The unmasked form starts from an undefined register, which GCC 12 warns of.
  return (vf)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__aarch64__)
  float16x4_t narrow;
  std::memcpy(&narrow, p, sizeof narrow);
  return (vf)vcvt_f32_f16(narrow);
#else
  vf v;
  for (int i = 0; i < kLanes; ++i) v[i] = widen_float16(p[i].bits);
  return v;
#endif
}

inline void store(F16* p, vf v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__aarch64__)
  const float16x4_t narrow = vcvt_f16_f32((float32x4_t)v);
  std::memcpy(p, &narrow, sizeof narrow);
#else
  for (int i = 0; i < kLanes; ++i) p[i].bits = round_to_float16(v[i]);
#endif
}

// The first `count` < kLanes elements, zero in the lanes after them; nothing beyond them is read or written.
template <typename Element>
inline vf load_partial(const Element* p, int count) {
  Element padded[kLanes] = {};
  std::memcpy(padded, p, count * sizeof(Element));
  return load(padded);
}

template <typename Element>
inline void store_partial(Element* p, vf v, int count) {
  Element padded[kLanes];
  store(padded, v);
  std::memcpy(p, padded, count * sizeof(Element));
}

#if defined(__AVX512F__)
template <>
inline vf load_partial(const float* p, int count) {
  return (vf)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p);
}
#elif defined(__AVX2__)
template <>
inline vf load_partial(const float* p, int count) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return (vf)_mm256_maskload_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(count), lane));
}
#endif

}  // namespace dive::cpu::DIVE_ISA
