#include "cpu/isa.h"

#include <stdexcept>

#include "cpu/features.h"

namespace dive::cpu {
namespace {

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
  }
  return "";
}

std::vector<Isa> usable_isas() {
  std::vector<Isa> found;
  for (const Isa isa : {Isa::kPortable, Isa::kAvx2, Isa::kAvx2Vnni, Isa::kAvx512, Isa::kAvx512Bf16}) {
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
