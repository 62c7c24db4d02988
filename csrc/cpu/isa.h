// Which variant of a kernel runs. Every file named *_kernel.cpp is compiled once per level below, inside a namespace of
// the level's name; the dispatching file beside it picks one at run time.
#pragma once

#include <string>
#include <vector>

namespace dive::cpu {

// Each level but kAvx2Vnni, which is AVX2 with products of bytes, contains the ones before it; kAvx512Bf16 has these
// products too, as all processors with AVX512_BF16 do. kAmx has tile registers as well, which multiply bfloat16 and
// bytes. On other processors than x86 only kPortable exists; its vectors of 128 bits are on AArch64 those of NEON,
// which all have.
enum class Isa { kPortable, kAvx2, kAvx2Vnni, kAvx512, kAvx512Bf16, kAmx };

// The highest level that this build holds and this machine runs.
Isa best_isa();

// "portable", "avx2", "avx2_vnni", "avx512", "avx512_bf16" or "amx".
const char* isa_name(Isa isa);

// Every level that is usable here, lowest first: tests run them all.
std::vector<Isa> usable_isas();

// The usable level of that name; throws std::invalid_argument that lists the usable ones.
Isa isa_from_name(const std::string& name);

}  // namespace dive::cpu

// Declares a kernel's variants: DIVE_DECLARE_VARIANTS(void f(int)) declares portable::f, avx2::f, ... in namespace
// dive::cpu. DIVE_DISPATCH(isa, f, arguments...) calls the one of the level `isa`.
#if defined(DIVE_X86_VARIANTS)
#define DIVE_DECLARE_VARIANTS(...)       \
  namespace portable { __VA_ARGS__; }    \
  namespace avx2 { __VA_ARGS__; }        \
  namespace avx2_vnni { __VA_ARGS__; }   \
  namespace avx512 { __VA_ARGS__; }      \
  namespace avx512_bf16 { __VA_ARGS__; } \
  namespace amx { __VA_ARGS__; }
#define DIVE_DISPATCH(isa, function, ...)                                                     \
  ((isa) == ::dive::cpu::Isa::kAmx          ? ::dive::cpu::amx::function(__VA_ARGS__)         \
   : (isa) == ::dive::cpu::Isa::kAvx512Bf16 ? ::dive::cpu::avx512_bf16::function(__VA_ARGS__) \
   : (isa) == ::dive::cpu::Isa::kAvx512     ? ::dive::cpu::avx512::function(__VA_ARGS__)      \
   : (isa) == ::dive::cpu::Isa::kAvx2Vnni   ? ::dive::cpu::avx2_vnni::function(__VA_ARGS__)   \
   : (isa) == ::dive::cpu::Isa::kAvx2       ? ::dive::cpu::avx2::function(__VA_ARGS__)        \
                                            : ::dive::cpu::portable::function(__VA_ARGS__))
#else
#define DIVE_DECLARE_VARIANTS(...) \
  namespace portable { __VA_ARGS__; }
#define DIVE_DISPATCH(isa, function, ...) (static_cast<void>(isa), ::dive::cpu::portable::function(__VA_ARGS__))
#endif
