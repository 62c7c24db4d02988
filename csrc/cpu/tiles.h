// Tile registers (AMX): eight of 16 rows of 64 bytes. For *_kernel.cpp files only, at the level that has them.
//
// Intel's manual, volume 1, chapter 18: tdpbf16ps adds to a tile of 16 x 16 float32 the products of a tile of 16 rows
// of 16 pairs of bfloat16 with one of 16 pairs of rows of 16; denormals count as zero.
#pragma once

#include "cpu/vec.h"

#if defined(__AMX_BF16__)

namespace dive::cpu::DIVE_ISA {

inline constexpr int kTileRows = 16, kTileRowBytes = 64;

// All eight tiles whole, as long as it lives. A thread that holds none is switched without their 8 KiB.
class WholeTiles {
 public:
  WholeTiles() {
    Config config;
    for (int tile = 0; tile < 8; ++tile) {
      config.row_bytes[tile] = kTileRowBytes;
      config.rows[tile] = kTileRows;
    }
    // GCC 12 takes the instruction to read eight bytes of it.
    __asm__ volatile("" : : "r"(&config) : "memory");
    _tile_loadconfig(&config);
  }
  ~WholeTiles() { _tile_release(); }
  WholeTiles(const WholeTiles&) = delete;
  WholeTiles& operator=(const WholeTiles&) = delete;

 private:
  struct alignas(64) Config {
    std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
    std::uint16_t row_bytes[16] = {};
    std::uint8_t rows[16] = {};
  };
};

// GCC does not know that a tile is loaded from memory: what was stored before this is there.
inline void settle_memory() { __asm__ volatile("" ::: "memory"); }

}  // namespace dive::cpu::DIVE_ISA

#endif
