#include "cpu/features.h"

#include <algorithm>
#include <cstdint>
#include <fstream>
#include <set>
#include <thread>
#include <utility>

#if defined(__x86_64__) || defined(__i386__)
#define DIVE_X86 1
#include <cpuid.h>
#endif

#if defined(__linux__)
#include <sched.h>

#include <cerrno>
#include <memory>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace dive::cpu {
namespace {

#if defined(DIVE_X86)

struct Registers {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};

// All zero where the processor does not know the leaf, which reads as "feature absent".
Registers cpuid(unsigned leaf, unsigned subleaf = 0) {
  Registers r;
  if (!__get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx)) return {};
  return r;
}

bool bit(unsigned word, int position) { return (word >> position & 1U) != 0; }

// Which register states the operating system saves on a context switch (XCR0). Written as assembly because the
// intrinsic needs -mxsave, and this file must run on every x86.
std::uint64_t saved_states() {
  std::uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<std::uint64_t>(high) << 32) | low;
}

// Bit positions: Intel SDM volume 2A, CPUID; state masks: volume 1, 13.3.
Features detect() {
  constexpr std::uint64_t kYmm = 0x6;        // SSE and AVX
  constexpr std::uint64_t kZmm = 0xe6;       // those, opmask, and both halves of the AVX-512 state
  constexpr std::uint64_t kTiles = 0x60000;  // AMX configuration and data

  Features f;
  const Registers base = cpuid(1);
  const Registers extended = cpuid(7, 0);
  const Registers extended1 = extended.eax >= 1 ? cpuid(7, 1) : Registers{};
  const bool os_saves_extended_state = bit(base.ecx, 27);
  const std::uint64_t states = os_saves_extended_state ? saved_states() : 0;

  f.sse4_2 = bit(base.ecx, 20);
  if ((states & kYmm) == kYmm && bit(base.ecx, 28)) {
    f.avx2 = bit(extended.ebx, 5);
    f.fma = bit(base.ecx, 12);
    f.f16c = bit(base.ecx, 29);
    f.avx_vnni = bit(extended1.eax, 4);
  }
  if ((states & kZmm) == kZmm && bit(extended.ebx, 16)) {
    f.avx512f = true;
    f.avx512dq = bit(extended.ebx, 17);
    f.avx512bw = bit(extended.ebx, 30);
    f.avx512vl = bit(extended.ebx, 31);
    f.avx512_vnni = bit(extended.ecx, 11);
    f.avx512_bf16 = bit(extended1.eax, 5);
  }
  const Registers vendor = cpuid(0);  // its name in ebx, edx, ecx: "Auth" "enti" "cAMD"
  f.bf16_pairs_are_quick =
      f.avx512_bf16 && vendor.ebx == 0x68747541U && vendor.edx == 0x69746e65U && vendor.ecx == 0x444d4163U;
  if ((states & kTiles) == kTiles && bit(extended.edx, 24)) {
    f.amx_bf16 = bit(extended.edx, 22);
    f.amx_int8 = bit(extended.edx, 25);
  }
  return f;
}

#else

Features detect() {
  Features f;
#if defined(__ARM_NEON)
  f.neon = true;
#endif
  return f;
}

#endif

#if defined(__linux__)

std::vector<int> allowed_cpus() {
  // The kernel refuses a mask shorter than its own, so it grows until it fits.
  for (int capacity = 1024; capacity <= 1 << 20; capacity *= 2) {
    const std::unique_ptr<cpu_set_t, void (*)(cpu_set_t*)> mask(CPU_ALLOC(capacity), [](cpu_set_t* p) { CPU_FREE(p); });
    if (!mask) return {};
    const std::size_t bytes = CPU_ALLOC_SIZE(capacity);
    CPU_ZERO_S(bytes, mask.get());
    if (sched_getaffinity(0, bytes, mask.get()) == 0) {
      std::vector<int> cpus;
      for (int cpu = 0; cpu < capacity; ++cpu) {
        if (CPU_ISSET_S(cpu, bytes, mask.get())) cpus.push_back(cpu);
      }
      return cpus;
    }
    if (errno != EINVAL) return {};
  }
  return {};
}

// -1 where the kernel offers no such file.
int topology(int cpu, const char* entry) {
  std::ifstream file("/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/" + entry);
  int value = -1;
  return file >> value ? value : -1;
}

#endif

}  // namespace

const Features& features() {
  static const Features detected = detect();
  return detected;
}

std::vector<std::string> instruction_sets() {
  const Features& f = features();
  const std::pair<const char*, bool> table[] = {
      {"sse4_2", f.sse4_2},
      {"avx2", f.avx2},
      {"fma", f.fma},
      {"f16c", f.f16c},
      {"avx_vnni", f.avx_vnni},
      {"avx512f", f.avx512f},
      {"avx512bw", f.avx512bw},
      {"avx512vl", f.avx512vl},
      {"avx512dq", f.avx512dq},
      {"avx512_bf16", f.avx512_bf16},
      {"avx512_vnni", f.avx512_vnni},
      {"amx_bf16", f.amx_bf16},
      {"amx_int8", f.amx_int8},
      {"neon", f.neon},
  };
  std::vector<std::string> names;
  for (const auto& [name, usable] : table) {
    if (usable) names.emplace_back(name);
  }
  return names;
}

std::optional<bool> bf16_products_are_quick() {
#if defined(DIVE_X86)
  return features().amx_bf16 || features().bf16_pairs_are_quick;
#else
  return std::nullopt;
#endif
}

std::string brand() {
  std::string text;
#if defined(DIVE_X86)
  for (unsigned leaf = 0x80000002U; leaf <= 0x80000004U; ++leaf) {
    const Registers r = cpuid(leaf);
    for (const unsigned word : {r.eax, r.ebx, r.ecx, r.edx}) {
      for (int shift = 0; shift < 32; shift += 8) {
        const char character = static_cast<char>(word >> shift & 0xffU);
        if (character != '\0') text += character;
      }
    }
  }
#elif defined(__APPLE__)
  char name[128];
  std::size_t size = sizeof name;
  if (sysctlbyname("machdep.cpu.brand_string", name, &size, nullptr, 0) == 0) text = name;
#endif
  const auto first = text.find_first_not_of(' ');
  if (first == std::string::npos) return {};
  return text.substr(first, text.find_last_not_of(' ') - first + 1);
}

Cores cores() {
#if defined(__linux__)
  const std::vector<int> cpus = allowed_cpus();
  if (!cpus.empty()) {
    const int logical = static_cast<int>(cpus.size());
    std::set<std::pair<int, int>> distinct;
    for (const int cpu : cpus) {
      const int core = topology(cpu, "core_id");
      if (core < 0) return {logical, logical};
      distinct.emplace(topology(cpu, "physical_package_id"), core);
    }
    return {logical, static_cast<int>(distinct.size())};
  }
#endif
  const int logical = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  return {logical, logical};
}

}  // namespace dive::cpu
