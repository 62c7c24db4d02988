#include "cpu/isa.h"

#include <stdexcept>

#include "cpu/features.h"

#if defined(DIVE_X86_VARIANTS) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace dive::cpu {
namespace {

// Whether threads of this process may use tile registers. Linux saves their 8 KiB for those processes alone that asked
// for it, since signal handlers need stacks with room for them; it refuses where one is too small.
// (Documentation/arch/x86/xstate.rst)
[[maybe_unused]] bool allows_tiles() {
#if defined(DIVE_X86_VARIANTS) && defined(__linux__) && defined(SYS_arch_prctl)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool allowed = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return allowed;
#else
  return false;
#endif
}

bool usable(Isa isa) {
  const Features& f = features();
  const bool avx2 = f.avx2 && f.fma && f.f16c;
  const bool avx512 = avx2 && f.avx512f && f.avx512bw && f.avx512vl && f.avx512dq;
  switch (isa) {
    case Isa::kPortable:
      return true;
#if defined(DIVE_X86_VARIANTS)
    case Isa::kAvx2:
      return avx2;
    case Isa::kAvx2Vnni:
      return avx2 && f.avx_vnni;
    case Isa::kAvx512:
      return avx512;
    case Isa::kAvx512Bf16:
      return avx512 && f.avx512_bf16 && f.avx512_vnni;  // every processor with the first has both
    case Isa::kAmx:
      return usable(Isa::kAvx512Bf16) && f.amx_bf16 && f.amx_int8 && allows_tiles();
#else
    default:
      static_cast<void>(avx512);
      return false;
#endif
  }
  return false;
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kPortable:
      return "portable";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx2Vnni:
      return "avx2_vnni";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx512Bf16:
      return "avx512_bf16";
    case Isa::kAmx:
      return "amx";
  }
  return "";
}

std::vector<Isa> usable_isas() {
  std::vector<Isa> found;
  for (const Isa isa : {Isa::kPortable, Isa::kAvx2, Isa::kAvx2Vnni, Isa::kAvx512, Isa::kAvx512Bf16, Isa::kAmx}) {
    if (usable(isa)) found.push_back(isa);
  }
  return found;
}

Isa best_isa() {
  static const Isa best = usable_isas().back();
  return best;
}

Isa isa_from_name(const std::string& name) {
  std::string known;
  for (const Isa isa : usable_isas()) {
    if (name == isa_name(isa)) return isa;
    known += (known.empty() ? "" : ", ") + std::string(isa_name(isa));
  }
  throw std::invalid_argument("isa: expected one of " + known + ", got " + name);
}

}  // namespace dive::cpu
