// The two matrix products of linear_cross_entropy and the row passes between them.
//
// Vectors run along rows of hidden states, so that a softmax over the vocabulary adds whole vectors and never across
// one, and the weight is read as it lies. T, N, D, V, K as in linear_cross_entropy.h, R rows of a chunk.
#include "cpu/linear_cross_entropy_kernel.h"

#include "cpu/gemm_tile.h"
#include "cpu/linear_cross_entropy_rows.h"

namespace dive::cpu::DIVE_ISA {
namespace {

constexpr std::int64_t round_up(std::int64_t n, std::int64_t unit) { return (n + unit - 1) / unit * unit; }
constexpr std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

// Vocabulary entries of a block: its logits for 256 rows take 192 KiB (AVX-512), a part of a level-two cache of 1 MiB
// that is read a few times while it is there. 8 and 24 tiles were within 2 % of 16 (Zen 5).
constexpr std::int64_t kBlock = 16 * kTile;
// Words along D of one pass of the first product: the strip of kTile weight rows takes 27 KiB of the level-one cache.
constexpr std::int64_t kDepthBlock = 576;
// Rows of the strip begin in different sets of the level-one cache, whatever D is.
constexpr std::int64_t kStripStride = kDepthBlock + 16;
// Columns of D of one pass of the second product: with a block's height 432 KiB of packed weight.
constexpr std::int64_t kWidthBlock = 576;
// Words between two packed tiles of `depth`. A weight row is spread over all of them at once, so they begin in other
// sets of the level-one cache; and whole vectors are stored, the last of which reaches beyond its tile.
constexpr std::int64_t tile_stride(std::int64_t depth) { return round_up(depth * kTile, 32) + 16; }
constexpr std::int64_t kTileSpan = round_up(kTile, kLanes);
static_assert(kTileSpan - kTile <= 16);
static_assert(kWidthBlock % kTile == 0);

const void* row_of(const Matrix& matrix, std::int64_t row) {
  return static_cast<const char*>(matrix.data) + row * matrix.stride * size_of(matrix.dtype);
}

std::int64_t teacher_row(const LinearCrossEntropy& problem, std::int64_t n) {
  return problem.teacher_rows == nullptr ? n : problem.teacher_rows[n];
}

// Columns d ... d + width - 1 of weight rows first ... first + count - 1, as far as they are there.
void prefetch_weight(const LinearCrossEntropy& problem, std::int64_t first, std::int64_t count, std::int64_t d,
                     std::int64_t width, Prefetch& prefetch) {
  const std::int64_t size = size_of(problem.weight.dtype);
  const std::int64_t rows = smaller(count, problem.vocabulary - first);
  if (rows <= 0) return;
  prefetch.add(static_cast<const char*>(row_of(problem.weight, first)) + d * size, rows,
               smaller(width, problem.hidden_size - d) * size, problem.weight.stride * size);
}

template <class Words>
void pack_panel(const Chunk& chunk, int panel, typename Words::Word* out) {
  using Word = typename Words::Word;
  const LinearCrossEntropy& problem = *chunk.problem;
  const int student_panels = chunk.rows / kPanel;
  const bool is_teacher = panel >= student_panels;
  const Matrix& matrix = is_teacher ? problem.teacher_hidden : problem.hidden;
  const int row = panel % student_panels * kPanel;
  std::memset(out, 0, sizeof(Word) * static_cast<std::size_t>(chunk.depth * kPanel));
  Word buffer[kDepthBlock];
  for (int m = 0; m < kPanel && row + m < chunk.count; ++m) {
    const std::int64_t n = chunk.first + row + m;
    const void* source = row_of(matrix, is_teacher ? teacher_row(problem, n) : problem.rows[n]);
    for (std::int64_t k = 0; k < chunk.depth; k += kDepthBlock) {
      const std::int64_t count = smaller(kDepthBlock, chunk.depth - k);
      copy_words(source, matrix.dtype, problem.hidden_size, k, count, buffer);
      for (std::int64_t i = 0; i < count; ++i) out[(k + i) * kPanel + m] = buffer[i];
    }
  }
}

// Products of `count` weight rows from `first` with every panel: out is [panels][padded][kPanel].
template <class Words>
void multiply_block(const Chunk& chunk, std::int64_t first, std::int64_t count, void* scratch, float* out) {
  using Word = typename Words::Word;
  const LinearCrossEntropy& problem = *chunk.problem;
  const int panels = chunk.rows / kPanel * (problem.teacher_hidden.data == nullptr ? 1 : 2);
  const std::int64_t padded = round_up(count, kTile);
  const std::int64_t passes = round_up(chunk.depth, kDepthBlock) / kDepthBlock;
  const std::int64_t pass_depth = (chunk.depth + passes - 1) / passes;
  Word* strip = static_cast<Word*>(scratch);
  const Word* states = static_cast<const Word*>(chunk.states);
  for (std::int64_t k = 0; k < chunk.depth; k += pass_depth) {
    const std::int64_t depth = smaller(pass_depth, chunk.depth - k);
    for (std::int64_t v = 0; v < padded; v += kTile) {
      for (std::int64_t i = 0; i < kTile; ++i) {
        Word* row = strip + i * kStripStride;
        if (v + i < count) {
          const void* source = row_of(problem.weight, first + v + i);
          copy_words(source, problem.weight.dtype, problem.hidden_size, k, depth, row);
        } else {
          std::memset(row, 0, sizeof(Word) * static_cast<std::size_t>(depth));
        }
      }
      Prefetch prefetch;
      const std::int64_t next = v + kTile < padded ? v + kTile : count;
      prefetch_weight(problem, first + next, kTile, k * Words::kDepth, depth * Words::kDepth, prefetch);
      prefetch.spread(panels * depth);
      for (std::int64_t panel = 0; panel < panels; ++panel) {
        multiply_tile<Words, kStripStride, 1>(strip, states + (panel * chunk.depth + k) * kPanel, depth, k > 0,
                                              out + (panel * padded + v) * kPanel, prefetch);
      }
    }
  }
}

// Packs weight rows first ... first + count - 1, columns d ... d + width - 1, as [tiles][depth][kTile] words, zeros
// past the matrix's edges. What a vector holds beyond its kTile words is overwritten by the next row. (By way of a
// buffer, loads would span two stores and wait for both: the second product then lost a fifth of its speed.)
template <class Element>
void pack_weight(const LinearCrossEntropy& problem, std::int64_t first, std::int64_t count, std::int64_t d,
                 std::int64_t width, float* out) {
  const std::int64_t stride = tile_stride(count);
  const std::int64_t inside = problem.hidden_size - d;
  for (std::int64_t v = 0; v < count; ++v) {
    const Element* row = static_cast<const Element*>(row_of(problem.weight, first + v)) + d;
    float* words = out + v * kTile;
    std::int64_t i = 0;
    for (; i < width && i + kTileSpan <= inside; i += kTile, words += stride) {
      for (int lane = 0; lane < kTileSpan; lane += kLanes) store(words + lane, load(row + i + lane));
    }
    for (; i < width; i += kTile, words += stride) {
      copy_words(row, problem.weight.dtype, inside, i, kTile, words);
    }
  }
}

void pack_weight(const LinearCrossEntropy& problem, std::int64_t first, std::int64_t count, std::int64_t d,
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

#if defined(__AVX512BF16__)
vu load_halves(const std::uint16_t* p) {
  vh halves;
  std::memcpy(&halves, p, sizeof halves);
  return __builtin_convertvector(halves, vu);
}

// The same with words of two rows' bfloat16.
void pack_weight(const LinearCrossEntropy& problem, std::int64_t first, std::int64_t count, std::int64_t d,
                 std::int64_t width, std::uint32_t* out) {
  const std::int64_t depth = (count + 1) / 2;
  const std::int64_t stride = tile_stride(depth);
  const std::int64_t inside = problem.hidden_size - d;
  for (std::int64_t k = 0; k < depth; ++k) {
    const bool has_high = 2 * k + 1 < count;
    const std::uint16_t* low = static_cast<const std::uint16_t*>(row_of(problem.weight, first + 2 * k)) + d;
    const std::uint16_t* high = has_high ? low + problem.weight.stride : low;
    std::uint32_t* words = out + k * kTile;
    std::int64_t i = 0;
    for (; i < width && i + kLanes <= inside; i += kTile, words += stride) {
      const vu upper = has_high ? load_halves(high + i) << 16 : vu{};
      const vu word = load_halves(low + i) | upper;
      std::memcpy(words, &word, sizeof word);
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

vu rounded(const float* p) {
  const vh halves = reinterpret_cast<vh>(_mm512_cvtneps_pbh(_mm512_loadu_ps(p)));
  return __builtin_convertvector(halves, vu);
}

// Rounds [count][kPanel] floats to [(count + 1) / 2][kPanel] words in place.
void round_to_words(float* values, std::int64_t count) {
  for (std::int64_t k = 0; k < (count + 1) / 2; ++k) {
    for (int half = 0; half < kPanel; half += kLanes) {
      const float* low = values + 2 * k * kPanel + half;
      vu word = rounded(low);
      if (2 * k + 1 < count) word |= rounded(low + kPanel) << 16;
      std::memcpy(values + k * kPanel + half, &word, sizeof word);
    }
  }
}
#endif

// Adds to the slice's gradient the weight rows from `first` times their logits' gradient dz, [panels][count][kPanel].
// `following` are the logits of the next block's `following_count` tokens.
template <class Words>
void multiply_gradient(const Chunk& chunk, std::int64_t first, std::int64_t count, const float* dz,
                       const float* following, std::int64_t following_count, void* scratch, float* gradient) {
  using Word = typename Words::Word;
  const std::int64_t total = round_up(chunk.problem->hidden_size, kTile);
  const std::int64_t depth = (count + Words::kDepth - 1) / Words::kDepth;
  const std::int64_t panels = chunk.rows / kPanel;
  Word* packed = static_cast<Word*>(scratch);
  for (std::int64_t d = 0; d < total; d += kWidthBlock) {
    const std::int64_t width = smaller(kWidthBlock, total - d);
    const bool is_last = d + width == total;
    pack_weight(*chunk.problem, first, count, d, width, packed);
    Prefetch prefetch;
    if (is_last) {
      prefetch_weight(*chunk.problem, first + count, following_count, 0, kWidthBlock, prefetch);
      const std::int64_t tokens = round_up(following_count, kTile);
      prefetch.add(following, following_count > 0 ? 1 : 0, tokens * chunk.rows * std::int64_t{sizeof(float)}, 0);
    } else {
      prefetch_weight(*chunk.problem, first, count, d + width, kWidthBlock, prefetch);
    }
    prefetch.spread(panels * (width / kTile) * depth);
    for (std::int64_t panel = 0; panel < panels; ++panel) {
      for (std::int64_t i = 0; i < width; i += kTile) {
        multiply_tile<Words, 1, kTile>(packed + i / kTile * tile_stride(depth),
                                       reinterpret_cast<const Word*>(dz + panel * count * kPanel), depth, true,
                                       gradient + (panel * total + d + i) * kPanel, prefetch);
      }
    }
  }
}

std::uint16_t round_to(DType dtype, float value) {
  return dtype == DType::kBFloat16 ? round_to_bfloat16(value) : round_to_float16(value);
}

}  // namespace

Blocking blocking(const LinearCrossEntropy& problem) {
  constexpr std::int64_t strip = kTile * kStripStride;
  constexpr std::int64_t packed = kWidthBlock / kTile * tile_stride(kBlock);
  return {kPanel, kTile, round_up(problem.hidden_size, kTile), kBlock, strip > packed ? strip : packed};
}

bool multiplies_pairs([[maybe_unused]] const LinearCrossEntropy& problem) {
#if defined(__AVX512BF16__)
  return problem.hidden.dtype == DType::kBFloat16 && problem.weight.dtype == DType::kBFloat16;
#else
  return false;
#endif
}

void pack_states(const Chunk& chunk, int begin, int end) {
  for (int panel = begin; panel < end; ++panel) {
    const std::int64_t offset = panel * chunk.depth * kPanel;
#if defined(__AVX512BF16__)
    if (chunk.pairs) {
      pack_panel<BFloat16Words>(chunk, panel, static_cast<std::uint32_t*>(chunk.states) + offset);
      continue;
    }
#endif
    pack_panel<FloatWords>(chunk, panel, static_cast<float*>(chunk.states) + offset);
  }
}

void sum_slice(const Chunk& chunk, const Slice& slice, bool keep_logits) {
  const LinearCrossEntropy& problem = *chunk.problem;
  const bool online = problem.teacher_hidden.data != nullptr;
  clear(slice.sums, chunk.rows);
  const Mark* mark = slice.marks;
  float* logits = slice.logits;
  for (std::int64_t first = slice.begin; first < slice.end; first += kBlock) {
    const std::int64_t count = smaller(kBlock, slice.end - first);
    const std::int64_t panel_floats = round_up(count, kTile) * kPanel;
    const std::int64_t student_floats = panel_floats * (chunk.rows / kPanel);
#if defined(__AVX512BF16__)
    if (chunk.pairs) {
      multiply_block<BFloat16Words>(chunk, first, count, slice.scratch, logits);
    } else
#endif
      multiply_block<FloatWords>(chunk, first, count, slice.scratch, logits);
    for (int panel = 0; panel < chunk.rows / kPanel; ++panel) {
      float* z = logits + panel * panel_floats;
      float* teacher = online ? z + student_floats : nullptr;
      finish_logits(problem, first, count, z);
      if (online) finish_logits(problem, first, count, teacher);
      for (int half = 0; half < kPanel; half += kLanes) {
        const float* lanes = online ? teacher + half : nullptr;
        sum_lanes(problem, slice.sums, panel * kPanel + half, first, count, z + half, lanes);
      }
    }
    for (; mark != slice.marks + slice.mark_count && mark->token < first + count; ++mark) {
      const float z = logits[mark->row / kPanel * panel_floats + (mark->token - first) * kPanel + mark->row % kPanel];
      if (mark->is_target) {
        slice.sums.target_logit[mark->row] = z;
      } else {
        slice.sums.top_logits[mark->row] += static_cast<double>(mark->q) * static_cast<double>(z);
      }
    }
    if (keep_logits) logits += student_floats * (online ? 2 : 1);
  }
}

void differentiate_slice(const Chunk& chunk, const Slice& slice) {
  const LinearCrossEntropy& problem = *chunk.problem;
  const bool online = problem.teacher_hidden.data != nullptr;
  const std::int64_t width = round_up(problem.hidden_size, kTile);
  std::memset(slice.gradient, 0, sizeof(float) * static_cast<std::size_t>(width * chunk.rows));
  float* dz = slice.scratch;
  float* packed = dz + kBlock * chunk.rows;
  const Mark* mark = slice.marks;
  const float* logits = slice.logits;
  for (std::int64_t first = slice.begin; first < slice.end; first += kBlock) {
    const std::int64_t count = smaller(kBlock, slice.end - first);
    const std::int64_t panel_floats = round_up(count, kTile) * kPanel;
    const std::int64_t student_floats = panel_floats * (chunk.rows / kPanel);
    const float* following = logits + student_floats * (online ? 2 : 1);
    const std::int64_t following_count = smaller(kBlock, slice.end - first - count);
    for (int panel = 0; panel < chunk.rows / kPanel; ++panel) {
      const float* z = logits + panel * panel_floats;
      differentiate_logits(chunk, panel * kPanel, first, count, z, online ? z + student_floats : nullptr,
                           dz + panel * count * kPanel);
    }
    for (; mark != slice.marks + slice.mark_count && mark->token < first + count; ++mark) {
      dz[(mark->row / kPanel * count + mark->token - first) * kPanel + mark->row % kPanel] -= mark->share;
    }
#if defined(__AVX512BF16__)
    if (chunk.pairs) {
      for (int panel = 0; panel < chunk.rows / kPanel; ++panel) round_to_words(dz + panel * count * kPanel, count);
      multiply_gradient<BFloat16Words>(chunk, first, count, dz, following, following_count, packed, slice.gradient);
    } else
#endif
      multiply_gradient<FloatWords>(chunk, first, count, dz, following, following_count, packed, slice.gradient);
    logits = following;
  }
}

double tail_product(const Chunk& chunk, std::int64_t n) {
  const LinearCrossEntropy& problem = *chunk.problem;
  const float* tail = problem.tail_mean_weight + teacher_row(problem, n) * problem.hidden_size;
  float buffer[kDepthBlock];
  double total = 0;
  for (std::int64_t d = 0; d < problem.hidden_size; d += kDepthBlock) {
    const std::int64_t count = smaller(kDepthBlock, problem.hidden_size - d);
    widen(row_of(problem.hidden, problem.rows[n]), problem.hidden.dtype, d, count, buffer);
    for (std::int64_t i = 0; i < count; ++i) total += static_cast<double>(tail[d + i]) * static_cast<double>(buffer[i]);
  }
  return total;
}

void write_gradient(const Chunk& chunk, const Slice* slices, int slice_count, int begin, int end) {
  const LinearCrossEntropy& problem = *chunk.problem;
  const std::int64_t D = problem.hidden_size;
  const std::int64_t width = round_up(D, kTile);
  for (int m = begin; m < end; ++m) {
    const std::int64_t n = chunk.first + m;
    const bool has_tail = problem.tail_mean_weight != nullptr && problem.kl_share != nullptr;
    const float* tail = has_tail ? problem.tail_mean_weight + teacher_row(problem, n) * D : nullptr;
    const float tail_share = has_tail ? problem.kl_share[n] : 0.0f;
    // A row without a share in the loss gets zeros, also where its hidden state holds NaN.
    const bool counts = (problem.ce_share != nullptr && problem.ce_share[n] != 0) ||
                        (problem.kl_share != nullptr && problem.kl_share[n] != 0);
    for (std::int64_t d = 0; d < D; ++d) {
      float value = 0;
      for (int i = 0; counts && i < slice_count; ++i) {
        value += slices[i].gradient[(m / kPanel * width + d) * kPanel + m % kPanel];
      }
      if (tail_share != 0) value -= tail_share * tail[d];
      const std::int64_t at = n * D + d;
      if (problem.hidden.dtype == DType::kFloat32) {
        static_cast<float*>(problem.gradient)[at] = value;
      } else {
        static_cast<std::uint16_t*>(problem.gradient)[at] = round_to(problem.hidden.dtype, value);
      }
    }
  }
}

}  // namespace dive::cpu::DIVE_ISA
