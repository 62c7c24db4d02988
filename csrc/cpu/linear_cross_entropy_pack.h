// The copies that feed linear_cross_entropy's products, and the sizes of their pieces. For its kernel file only.
//
// K words along a product's sums, R rows of a chunk, D, V as in linear_cross_entropy.h.
#pragma once

#include "cpu/gemm_tile.h"
#include "cpu/linear_cross_entropy_kernel.h"

namespace dive::cpu::DIVE_ISA {

constexpr std::int64_t round_up(std::int64_t n, std::int64_t unit) { return (n + unit - 1) / unit * unit; }
constexpr std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

// Vocabulary entries of a block: its logits for 256 rows take 192 KiB (AVX-512), a part of a level-two cache of 1 MiB
// that is read a few times while it is there. 8 and 24 tiles were within 2 % of 16 (Zen 5). With tile registers, twice
// as many of 256 entries took 5 to 15 % longer (a Xeon with 2 MiB).
template <class Words>
constexpr std::int64_t kBlock = (Words::kUnit == 1 ? 16 : 8) * Words::kTile;
// Words along D of one pass of the first product: the strip of kTile weight rows takes 27 KiB of the level-one cache
// (AVX-512), or with tile registers 38 of 48 KiB, which panels pass by (multiply loads them as what is not used again).
template <class Words>
constexpr std::int64_t kDepthBlock = Words::kUnit == 1 ? 576 : 288;
// Rows of the strip begin in different sets of the level-one cache, whatever D is.
template <class Words>
constexpr std::int64_t kStripStride = kDepthBlock<Words> + 16;
// Columns of D of one pass of the second product: with a block's height 432 KiB of packed weight (AVX-512).
constexpr std::int64_t kWidthBlock = 576;
// Words between two packed tiles of `depth`. A weight row is spread over all of them at once, so they begin in other
// sets of the level-one cache; and whole vectors are stored, the last of which reaches beyond its tile.
template <class Words>
constexpr std::int64_t tile_stride(std::int64_t depth) {
  return round_up(depth * Words::kTile, 32) + 16;
}
template <class Words>
constexpr std::int64_t kTileSpan = round_up(Words::kTile, kLanes);
static_assert(round_up(FloatWords::kTile, kLanes) - FloatWords::kTile <= 16);
static_assert(kWidthBlock % FloatWords::kTile == 0);

// Words that `numbers` along K take, to whole units.
template <class Words>
constexpr std::int64_t depth_of(std::int64_t numbers) {
  return round_up((numbers + Words::kDepth - 1) / Words::kDepth, Words::kUnit);
}

inline const void* row_of(const Matrix& matrix, std::int64_t row) {
  return static_cast<const char*>(matrix.data) + row * matrix.stride * size_of(matrix.dtype);
}

inline std::int64_t teacher_row(const LinearCrossEntropy& problem, std::int64_t n) {
  return problem.teacher_rows == nullptr ? n : problem.teacher_rows[n];
}

// Panel `panel` of the chunk's states, the teacher's after the student's, zeros past the matrix's edges.
template <class Words>
inline void pack_panel(const Chunk& chunk, int panel, typename Words::Word* out) {
  using Word = typename Words::Word;
  const LinearCrossEntropy& problem = *chunk.problem;
  const int student_panels = chunk.rows / kPanel;
  const bool is_teacher = panel >= student_panels;
  const Matrix& matrix = is_teacher ? problem.teacher_hidden : problem.hidden;
  const int row = panel % student_panels * kPanel;
  std::memset(out, 0, sizeof(Word) * static_cast<std::size_t>(chunk.depth * kPanel));
  constexpr std::int64_t kPass = kDepthBlock<Words>;
  Word buffer[kPass];
  for (int m = 0; m < kPanel && row + m < chunk.count; ++m) {
    const std::int64_t n = chunk.first + row + m;
    const void* source = row_of(matrix, is_teacher ? teacher_row(problem, n) : problem.rows[n]);
    for (std::int64_t k = 0; k < chunk.depth; k += kPass) {
      const std::int64_t count = smaller(kPass, chunk.depth - k);
      copy_words(source, matrix.dtype, problem.hidden_size, k, count, buffer);
      for (std::int64_t i = 0; i < count; ++i) out[(k + i) * kPanel + m] = buffer[i];
    }
  }
}

// Packs weight rows first ... first + count - 1, columns d ... d + width - 1, as [tiles][depth][kTile] words, zeros
// past the matrix's edges. What a vector holds beyond its kTile words is overwritten by the next row. (By way of a
// buffer, loads would span two stores and wait for both: the second product then lost a fifth of its speed.)
template <class Element>
inline void pack_weight(const LinearCrossEntropy& problem, std::int64_t first, std::int64_t count, std::int64_t d,
                        std::int64_t width, float* out) {
  constexpr int kTile = FloatWords::kTile;
  const std::int64_t stride = tile_stride<FloatWords>(count);
  const std::int64_t inside = problem.hidden_size - d;
  for (std::int64_t v = 0; v < count; ++v) {
    const Element* row = static_cast<const Element*>(row_of(problem.weight, first + v)) + d;
    float* words = out + v * kTile;
    std::int64_t i = 0;
    for (; i < width && i + kTileSpan<FloatWords> <= inside; i += kTile, words += stride) {
      for (int lane = 0; lane < kTileSpan<FloatWords>; lane += kLanes) store(words + lane, load(row + i + lane));
    }
    for (; i < width; i += kTile, words += stride) {
      copy_words(row, problem.weight.dtype, inside, i, kTile, words);
    }
  }
}

inline void pack_weight(const LinearCrossEntropy& problem, std::int64_t first, std::int64_t count, std::int64_t d,
                        std::int64_t width, float* out) {
  switch (problem.weight.dtype) {
    case DType::kFloat32:
      return pack_weight<float>(problem, first, count, d, width, out);
    case DType::kBFloat16:
      return pack_weight<Bf16>(problem, first, count, d, width, out);
    case DType::kFloat16:
      return pack_weight<F16>(problem, first, count, d, width, out);
  }
}

// The second product's operand of [count][kPanel] floats: they are it, where they are.
inline void make_words(const float*, std::int64_t, float*) {}

#if defined(__AVX512BF16__)
inline vu load_halves(const std::uint16_t* p) {
  return (vu)_mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

// The same with words of two rows' bfloat16, zeros up to a depth of whole units.
inline void pack_weight(const LinearCrossEntropy& problem, std::int64_t first, std::int64_t count, std::int64_t d,
                        std::int64_t width, std::uint32_t* out) {
  constexpr int kTile = PairWords::kTile;
  const std::int64_t depth = depth_of<PairWords>(count);
  const std::int64_t stride = tile_stride<PairWords>(depth);
  const std::int64_t inside = problem.hidden_size - d;
  for (std::int64_t k = 0; k < depth; ++k) {
    if (2 * k >= count) {
      for (std::int64_t i = 0; i < width; i += kTile) {
        std::memset(out + i / kTile * stride + k * kTile, 0, sizeof *out * kTile);
      }
      continue;
    }
    const bool has_high = 2 * k + 1 < count;
    const std::uint16_t* low = static_cast<const std::uint16_t*>(row_of(problem.weight, first + 2 * k)) + d;
    const std::uint16_t* high = has_high ? low + problem.weight.stride : low;
    std::uint32_t* words = out + k * kTile;
    std::int64_t i = 0;
    for (; i < width && i + kTileSpan<PairWords> <= inside; i += kTile, words += stride) {
      for (int lane = 0; lane < kTileSpan<PairWords>; lane += kLanes) {
        const vu upper = has_high ? load_halves(high + i + lane) << 16 : vu{};
        const vu word = load_halves(low + i + lane) | upper;
        std::memcpy(words + lane, &word, sizeof word);
      }
    }
    for (; i < width; i += kTile, words += stride) {
      for (std::int64_t lane = 0; lane < kTile; ++lane) {
        const bool is_inside = i + lane < inside;
        const std::uint32_t upper = is_inside && has_high ? high[i + lane] : 0;
        words[lane] = (is_inside ? low[i + lane] : 0) | upper << 16;
      }
    }
  }
}

inline vu rounded(const float* p) {
  const vh halves = reinterpret_cast<vh>(_mm512_cvtneps_pbh(_mm512_loadu_ps(p)));
  return __builtin_convertvector(halves, vu);
}

// Word k of the kLanes columns from `values` on, of [count][kPanel] floats: rows 2 k and 2 k + 1 rounded.
inline vu rounded_pair(const float* values, std::int64_t k, std::int64_t count) {
  const float* low = values + 2 * k * kPanel;
  vu word{};
  if (2 * k < count) word = rounded(low);
  if (2 * k + 1 < count) word |= rounded(low + kPanel) << 16;
  return word;
}

// The same in words; they may begin where the floats do, but with tile registers.
inline void make_words(const float* values, std::int64_t count, std::uint32_t* words) {
#if defined(__AMX_BF16__)
  // Rows of it, in the place of the columns.
  const std::int64_t depth = depth_of<PairWords>(count);
  for (int half = 0; half < kPanel; half += kLanes) {
    for (std::int64_t k = 0; k < depth; k += kLanes) {
      vu block[kLanes];
      unroll<kLanes>([&](auto i) { block[i] = rounded_pair(values + half, k + i, count); });
      transpose(block);
      unroll<kLanes>([&](auto i) { std::memcpy(words + (half + i) * depth + k, &block[i], sizeof block[i]); });
    }
  }
#else
  for (std::int64_t k = 0; k < (count + 1) / 2; ++k) {
    for (int half = 0; half < kPanel; half += kLanes) {
      const vu word = rounded_pair(values + half, k, count);
      std::memcpy(words + k * kPanel + half, &word, sizeof word);
    }
  }
#endif
}
#endif

}  // namespace dive::cpu::DIVE_ISA
