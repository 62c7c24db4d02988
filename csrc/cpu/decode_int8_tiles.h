// Products of int8 weights with rows of activations in tile registers, for decode_project_kernel.cpp alone. A weight
// costs about the same for 16 rows as for one, and that is less than reading it.
//
// bfloat16 weights stay out of tiles. With x in three parts of 8 bits, 16 rows of weights by 32 columns at a time, a
// step of SmolLM2 on two cores of a Xeon took 0.5 of the time for 32 rows, 0.6 for 16 and 0.9 for 8, but 1.1 to 1.2
// times as long for one: a tile reads from 16 places of a matrix at once, where a line of int8 weights is one, and
// neither asking for the next 16 rows in the order of their addresses nor reading them so brought the memory's speed
// back. Few rows in vectors and more in tiles is no way either: these sums round in another order, and a row's result
// would depend on its batch.
#pragma once

#include <optional>

#include "cpu/decode_int8.h"

#if defined(__AMX_INT8__)

namespace dive::cpu::DIVE_ISA {

// Rows of x that meet weights together: the digits of 16 of them fill three tiles.
inline constexpr int kTileBatch = 16;

// x in the digits of Int8Products, digit d of a group's row b as row 3 b + d of a tile. A group of kTileBatch rows, or
// fewer, is their scales and its tiles of 64 columns, all of one tile's rows before the next ones'. Lines of weights
// lie as a tile wants them: its product with them adds 64 columns to the sums [16 digits][16 rows of weights].
struct Int8Tiles {
  static constexpr int kDigits = Int8Products::kDigits, kTiles = kDigits * kTileBatch / kTileRows;
  static constexpr int kSplits = kTileRowBytes / kLanes;
  static constexpr std::int64_t kTileBytes = kTileRows * kTileRowBytes, kTileFloats = kTileBytes / 4;

  static int tiles(int rows) { return (kDigits * rows + kTileRows - 1) / kTileRows; }
  static std::int64_t steps(std::int64_t columns) { return (columns + kTileRowBytes - 1) / kTileRowBytes; }
  static std::int64_t group_size(int rows, std::int64_t columns) {
    return kTileBatch + tiles(rows) * steps(columns) * kTileFloats;
  }
  static std::int64_t size(int batch, std::int64_t columns) {
    const int rest = batch % kTileBatch;
    return batch / kTileBatch * group_size(kTileBatch, columns) + (rest > 0 ? group_size(rest, columns) : 0);
  }

  static void arrange(const float* x, int batch, std::int64_t columns, float* out) {
    const std::int64_t all = steps(columns);
    for (int b = 0; b < batch; ++b) {
      float* const group = out + b / kTileBatch * group_size(kTileBatch, columns);
      const float* const row = x + b * columns;
      const int first = b % kTileBatch * kDigits;
      const vf inverse = Int8Products::scale(row, columns, group + b % kTileBatch);
      for (std::int64_t step = 0; step < all; ++step) {
        for (int split = 0; split < kSplits; ++split) {
          const std::int64_t at = step * kTileRowBytes + split * kLanes;
          Bytes digits[kDigits];
          Int8Products::split(at < columns ? load_some(row + at, columns - at) * inverse : vf{}, digits);
          for (int d = 0; d < kDigits; ++d) {
            std::memcpy(tile_row(group, first + d, step, all) + split * kLanes, &digits[d], sizeof digits[d]);
          }
        }
      }
    }
    // A last tile's other rows are multiplied as well.
    float* const group = out + batch / kTileBatch * group_size(kTileBatch, columns);
    for (int row = batch % kTileBatch * kDigits; row % kTileRows != 0; ++row) {
      for (std::int64_t step = 0; step < all; ++step) std::memset(tile_row(group, row, step, all), 0, kTileRowBytes);
    }
  }

  // out[b] = scalar products of x's row first + b, of `count` in one group, with the 16 rows of weights from `w` on.
  static void block(const std::int8_t* w, const float* x, int first, int count, std::int64_t columns,
                    const Ahead& ahead, vf* out) {
    const float* const group = x + first / kTileBatch * group_size(kTileBatch, columns);
    const int row = first % kTileBatch, tile = kDigits * row / kTileRows;
    const auto* numbers = reinterpret_cast<const char*>(group + kTileBatch) + tile * steps(columns) * kTileBytes;
    vi sums[kTiles * kTileRows];
    const int used = tiles(row + count) - tile;
    if (used == 1) add<1>(w, numbers, columns, ahead, sums);
    if (used == 2) add<2>(w, numbers, columns, ahead, sums);
    if (used == 3) add<3>(w, numbers, columns, ahead, sums);
    for (int b = 0; b < count; ++b) {
      out[b] = Int8Products::total(sums + kDigits * (row + b) - tile * kTileRows) * splat(group[row + b]);
    }
  }

 private:
  static char* tile_row(float* group, int row, std::int64_t step, std::int64_t all) {
    float* const tile = group + kTileBatch + (row / kTileRows * all + step) * kTileFloats;
    return reinterpret_cast<char*>(tile) + row % kTileRows * kTileRowBytes;
  }

  template <int kUsed>
  static void add(const std::int8_t* w, const char* x, std::int64_t columns, const Ahead& ahead, vi* sums) {
    const std::int64_t all = steps(columns), stride = all * kTileBytes, lines = int8_lines(columns);
    alignas(kTileRowBytes) std::int8_t rest[kTileBytes] = {};
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    for (std::int64_t step = 0; step < all; ++step, x += kTileBytes, w += kTileBytes) {
      if (ahead.asks) {
        if (step % 2 == 0) ahead.touch(w);
        // Every other line: all 16 of them at a time keep the loads waiting, and the processor asks for a line's
        // neighbour.
        const char* const asked = ahead.of(w, kLinesAhead);
        for (int line = 0; line < kTileRows; line += 2) ask_for_line(asked + line * kLineBytes);
      }
      const std::int8_t* weights = w;
      if (lines - step * kTileRows < kTileRows) {
        std::memcpy(rest, w, static_cast<std::size_t>((lines - step * kTileRows) * kLineBytes));
        weights = rest;
      }
      settle_memory();
      _tile_loadd(3, weights, kTileRowBytes);
      _tile_loadd(4, x, kTileRowBytes);
      if constexpr (kUsed > 1) _tile_loadd(5, x + stride, kTileRowBytes);
      if constexpr (kUsed > 2) _tile_loadd(6, x + 2 * stride, kTileRowBytes);
      _tile_dpbssd(0, 4, 3);
      if constexpr (kUsed > 1) _tile_dpbssd(1, 5, 3);
      if constexpr (kUsed > 2) _tile_dpbssd(2, 6, 3);
    }
    _tile_stored(0, sums, kTileRowBytes);
    if constexpr (kUsed > 1) _tile_stored(1, sums + kTileRows, kTileRowBytes);
    if constexpr (kUsed > 2) _tile_stored(2, sums + 2 * kTileRows, kTileRowBytes);
    settle_memory();
  }
};

// Few rows in vectors, more of them in tiles: whole numbers are added up exactly in either, so that a row's result does
// not depend on which it was. In tiles a step of one row took 13 % longer, one of 4 rows as long, of 8 rows 15 % and of
// 16 rows 27 % less (SmolLM2 on two cores of a Xeon). What one row loses is lost by functions without a tile as well,
// as if the processor lowered its frequency; that was not measured.
struct Int8Rows {
  static constexpr int kMostRows = kTileBatch, kFewRows = 4;
  static_assert(kMostRows >= Int8Vectors::kMostRows && kFewRows <= Int8Vectors::kMostRows);

  // What must be there while blocks are multiplied.
  class Registers {
   public:
    explicit Registers(int batch) {
      if (batch > kFewRows) tiles_.emplace();
    }

   private:
    std::optional<WholeTiles> tiles_;
  };

  static int most_rows(int batch) { return batch > kFewRows ? kTileBatch : Int8Vectors::kMostRows; }

  static std::int64_t size(int batch, std::int64_t columns) {
    return batch > kFewRows ? Int8Tiles::size(batch, columns) : Int8Vectors::size(batch, columns);
  }

  static void arrange(const float* x, int batch, std::int64_t columns, float* out) {
    if (batch > kFewRows) return Int8Tiles::arrange(x, batch, columns, out);
    Int8Vectors::arrange(x, batch, columns, out);
  }

  static void block(const std::int8_t* w, const float* x, int batch, int first, int count, std::int64_t columns,
                    const Ahead& ahead, vf* out) {
    if (batch <= kFewRows) return Int8Vectors::block(w, x, batch, first, count, columns, ahead, out);
    Int8Tiles::block(w, x, first, count, columns, ahead, out);
  }
};

}  // namespace dive::cpu::DIVE_ISA

#endif
