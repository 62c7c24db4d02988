// What this CPU can execute and how many of its cores this process may use.
#pragma once

#include <optional>
#include <string>
#include <vector>

namespace dive::cpu {

// Instruction sets usable here: the processor has them and the operating system saves their registers.
// Kernels choose their variant from these flags once, at run time.
struct Features {
  bool sse4_2 = false;
  bool avx2 = false;
  bool fma = false;
  bool f16c = false;
  bool avx_vnni = false;
  bool avx512f = false;
  bool avx512bw = false;
  bool avx512vl = false;
  bool avx512dq = false;
  bool avx512_bf16 = false;
  bool avx512_vnni = false;
  bool amx_bf16 = false;  // of the processor, which a process must ask for as well (isa.cpp)
  bool amx_int8 = false;
  bool neon = false;

  // Whether avx512_bf16 multiplies pairs of bfloat16 in no more time than a fused multiply-add takes for half as many
  // float32: so on AMD's processors (Zen 4, Zen 5). Intel's take more: on an Emerald Rapids, twice 1024 x 576 x 49152
  // products take 1.7 times as long in pairs as widened to float32. (Where it shows, AMX is what Intel has for them.)
  bool bf16_pairs_are_quick = false;
};

// Detected once; the same object at every call.
const Features& features();

// The names of the flags set in features(), spelled as Linux spells them in /proc/cpuinfo ("neon" on AArch64).
std::vector<std::string> instruction_sets();

// Whether products of bfloat16 take no longer here than those of float32, by whoever uses what the processor has;
// none where it is not known, which is on other processors than x86.
std::optional<bool> bf16_products_are_quick();

// Marketing name of the processor, empty where it offers none.
std::string brand();

struct Cores {
  int logical;   // hardware threads the process may run on
  int physical;  // distinct cores among them
};

// Counts under the calling thread's affinity mask (Linux); elsewhere every hardware thread counts as a core.
Cores cores();

}  // namespace dive::cpu
