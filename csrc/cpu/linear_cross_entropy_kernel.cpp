// The two matrix products of linear_cross_entropy and the row passes between them.
//
// Vectors run along rows of hidden states, so that a softmax over the vocabulary adds whole vectors and never across
// one, and the weight is read as it lies. T, N, D, V, K as in linear_cross_entropy.h, R rows of a chunk.
#include "cpu/linear_cross_entropy_kernel.h"

#include "cpu/gemm_tile.h"
#include "cpu/linear_cross_entropy_pack.h"
#include "cpu/linear_cross_entropy_rows.h"

namespace dive::cpu::DIVE_ISA {
namespace {

// Rows of a chunk: the more, the fewer times the weight is read and copied (once a product and chunk), but the packed
// states of one pass over D (at most 2304 bytes a row) should stay in the level-two cache, and logits take V * 4 bytes
// a row. On two cores of a Zen 5 (1 MiB of level two each) 256 rows were 9 % faster than 128 in float32 and 15 % in
// bfloat16; 512 rows would gain another 3 to 7 % for twice the memory. With tile registers, whose products wait for the
// weight, they gain 12 % where D is 4096, and lose 6 % where it is 576 and writing the logits takes longer than them.
template <class Words>
std::int64_t most_rows(std::int64_t hidden_size) {
  return Words::kUnit > 1 && hidden_size > 1024 ? 512 : 256;
}

// Whether the level multiplies these operands as bfloat16 pairs.
bool multiplies_pairs([[maybe_unused]] const LinearCrossEntropy& problem) {
#if defined(__AVX512BF16__)
  return problem.hidden.dtype == DType::kBFloat16 && problem.weight.dtype == DType::kBFloat16;
#else
  return false;
#endif
}

// Calls f with the words that are multiplied.
template <class F>
decltype(auto) with_words([[maybe_unused]] bool pairs, F f) {
#if defined(__AVX512BF16__)
  if (pairs) return f(PairWords{});
#endif
  return f(FloatWords{});
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

// Products of `count` weight rows from `first` with every panel: out is [panels][padded][kPanel].
template <class Words>
void multiply_block(const Chunk& chunk, std::int64_t first, std::int64_t count, void* scratch, float* out) {
  using Word = typename Words::Word;
  const LinearCrossEntropy& problem = *chunk.problem;
  const int panels = chunk.rows / kPanel * (problem.teacher_hidden.data == nullptr ? 1 : 2);
  constexpr int kTile = Words::kTile;
  const std::int64_t padded = round_up(count, kTile);
  const std::int64_t passes = round_up(chunk.depth, kDepthBlock<Words>) / kDepthBlock<Words>;
  const std::int64_t pass_depth = round_up((chunk.depth + passes - 1) / passes, Words::kUnit);
  Word* strip = static_cast<Word*>(scratch);
  const Word* states = static_cast<const Word*>(chunk.states);
  for (std::int64_t k = 0; k < chunk.depth; k += pass_depth) {
    const std::int64_t depth = smaller(pass_depth, chunk.depth - k);
    for (std::int64_t v = 0; v < padded; v += kTile) {
      for (std::int64_t i = 0; i < kTile; ++i) {
        Word* row = strip + i * kStripStride<Words>;
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
        const Word* numbers = states + (panel * chunk.depth + k) * kPanel;
        float* logits = out + (panel * padded + v) * kPanel;
        if constexpr (Words::kUnit == 1) {
          multiply<Words, kStripStride<Words>, 1>(strip, numbers, depth, k > 0, logits, prefetch);
        } else {
          multiply(strip, kStripStride<Words>, numbers, depth, k > 0, logits, prefetch);
        }
      }
    }
  }
}

// Adds to the slice's gradient the weight rows from `first` times their logits' gradient dz, panels of `count` rows in
// words. `following` are the logits of the next block's `following_count` tokens.
template <class Words>
void multiply_gradient(const Chunk& chunk, std::int64_t first, std::int64_t count, const typename Words::Word* dz,
                       const float* following, std::int64_t following_count, void* scratch, float* gradient) {
  using Word = typename Words::Word;
  constexpr int kTile = Words::kTile;
  const std::int64_t total = round_up(chunk.problem->hidden_size, kTile);
  const std::int64_t depth = depth_of<Words>(count);
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
      const Word* const numbers = dz + panel * depth * kPanel;
      for (std::int64_t i = 0; i < width; i += kTile) {
        const Word* const tile = packed + i / kTile * tile_stride<Words>(depth);
        float* const sums = gradient + (panel * total + d + i) * kPanel;
        if constexpr (Words::kUnit == 1) {
          multiply<Words, 1, kTile>(tile, numbers, depth, true, sums, prefetch);
        } else {
          multiply(numbers, depth, tile, depth, true, sums, prefetch);
        }
      }
    }
  }
}

// A block of logits, [R / kPanel][padded][kPanel] of the student and after them of the teacher, where there is one.
struct Block {
  template <class Words>
  Block(Words, const Chunk& chunk, const Slice& slice, std::int64_t first)
      : online(chunk.problem->teacher_hidden.data != nullptr), panels(chunk.rows / kPanel), first(first),
        count(smaller(kBlock<Words>, slice.end - first)), panel_floats(round_up(count, Words::kTile) * kPanel) {}

  bool online;
  int panels;
  std::int64_t first, count, panel_floats;

  std::int64_t floats() const { return panels * panel_floats * (online ? 2 : 1); }
  std::int64_t student(int panel) const { return panel * panel_floats; }
  std::int64_t teacher(int panel) const { return (panels + panel) * panel_floats; }
};

template <class Words>
void compute_logits(const Chunk& chunk, const Block& block, float* scratch, float* logits) {
  multiply_block<Words>(chunk, block.first, block.count, scratch, logits);
  for (std::int64_t panel = 0; panel < block.floats(); panel += block.panel_floats) {
    finish_logits(*chunk.problem, block.first, block.count, logits + panel);
  }
}

template <class Words>
void sum_slice(const Chunk& chunk, const Slice& slice, bool keep_logits) {
  const LinearCrossEntropy& problem = *chunk.problem;
  [[maybe_unused]] const typename Words::Registers registers;
  clear(slice.sums, chunk.rows);
  const Mark* mark = slice.marks;
  float* logits = slice.logits;
  for (std::int64_t first = slice.begin; first < slice.end; first += kBlock<Words>) {
    const Block block(Words{}, chunk, slice, first);
    compute_logits<Words>(chunk, block, slice.scratch, logits);
    for (int panel = 0; panel < block.panels; ++panel) {
      const float* z = logits + block.student(panel);
      const float* teacher = block.online ? logits + block.teacher(panel) : nullptr;
      for (int half = 0; half < kPanel; half += kLanes) {
        sum_lanes(problem, slice.sums, panel * kPanel + half, first, block.count, z + half,
                  block.online ? teacher + half : nullptr);
      }
    }
    for (; mark != slice.marks + slice.mark_count && mark->token < first + block.count; ++mark) {
      const std::int64_t row = mark->row / kPanel * block.panel_floats + mark->row % kPanel;
      const float z = logits[row + (mark->token - first) * kPanel];
      if (mark->is_target) {
        slice.sums.target_logit[mark->row] = z;
      } else {
        slice.sums.top_logits[mark->row] += static_cast<double>(mark->q) * static_cast<double>(z);
      }
    }
    if (keep_logits) logits += block.floats();
  }
}

template <class Words>
void differentiate_slice(const Chunk& chunk, const Slice& slice) {
  const LinearCrossEntropy& problem = *chunk.problem;
  const std::int64_t width = round_up(problem.hidden_size, Words::kTile);
  [[maybe_unused]] const typename Words::Registers registers;
  std::memset(slice.gradient, 0, sizeof(float) * static_cast<std::size_t>(width * chunk.rows));
  auto* const words = reinterpret_cast<typename Words::Word*>(slice.scratch);
  float* const copies = slice.scratch + kBlock<Words> * chunk.rows;
  const Mark* mark = slice.marks;
  const float* logits = slice.logits;
  for (std::int64_t first = slice.begin; first < slice.end; first += kBlock<Words>) {
    const Block block(Words{}, chunk, slice, first);
    // A panel's gradient becomes words while it is in the level-one cache.
    const std::int64_t panel_words = depth_of<Words>(block.count) * kPanel;
    const Mark* const marks = mark;
    for (int panel = 0; panel < block.panels; ++panel) {
      const float* z = logits + block.student(panel);
      const float* teacher = block.online ? logits + block.teacher(panel) : nullptr;
      float* const dz = Words::kDepth == 1 ? slice.scratch + panel * panel_words : copies;
      differentiate_logits(chunk, panel * kPanel, first, block.count, z, teacher, dz);
      for (mark = marks; mark != slice.marks + slice.mark_count && mark->token < first + block.count; ++mark) {
        if (mark->row / kPanel == panel) dz[(mark->token - first) * kPanel + mark->row % kPanel] -= mark->share;
      }
      make_words(dz, block.count, words + panel * panel_words);
    }
    const float* following = logits + block.floats();
    const std::int64_t following_count = smaller(kBlock<Words>, slice.end - first - block.count);
    multiply_gradient<Words>(chunk, first, block.count, words, following, following_count, copies, slice.gradient);
    logits = following;
  }
}

std::uint16_t round_to(DType dtype, float value) {
  return dtype == DType::kBFloat16 ? round_to_bfloat16(value) : round_to_float16(value);
}

// Where a slice's gradient [R / panel][width / tile][tile][panel] has row m's number d, in tiles [panel][tile].
template <class Words>
std::int64_t place_of(std::int64_t m, std::int64_t d, std::int64_t width) {
  const std::int64_t panel = m / kPanel * width * kPanel;
  if constexpr (Words::kUnit == 1) return panel + d * kPanel + m % kPanel;
  return panel + (d / Words::kTile * kPanel + m % kPanel) * Words::kTile + d % Words::kTile;
}

template <class Words>
void write_gradient(const Chunk& chunk, const Slice* slices, int slice_count, int begin, int end) {
  const LinearCrossEntropy& problem = *chunk.problem;
  const std::int64_t D = problem.hidden_size;
  const std::int64_t width = round_up(D, Words::kTile);
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
        value += slices[i].gradient[place_of<Words>(m, d, width)];
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

}  // namespace

Blocking blocking(const LinearCrossEntropy& problem) {
  const bool pairs = multiplies_pairs(problem);
  return with_words(pairs, [&](auto words) -> Blocking {
    using Words = decltype(words);
    constexpr int kTile = Words::kTile;
    constexpr std::int64_t block = kBlock<Words>, strip = kTile * kStripStride<Words>;
    constexpr std::int64_t packed = kWidthBlock / kTile * tile_stride<Words>(depth_of<Words>(block));
    return {.panel = kPanel,
            .tile = kTile,
            .most_rows = most_rows<Words>(problem.hidden_size),
            .pairs = pairs,
            .depth = depth_of<Words>(problem.hidden_size),
            .width = round_up(problem.hidden_size, kTile),
            .block = block,
            .slice_floats = strip > packed ? strip : packed};
  });
}

void pack_states(const Chunk& chunk, int begin, int end) {
  with_words(chunk.pairs, [&](auto words) {
    using Words = decltype(words);
    for (int panel = begin; panel < end; ++panel) {
      auto* const states = static_cast<typename Words::Word*>(chunk.states);
      pack_panel<Words>(chunk, panel, states + panel * chunk.depth * kPanel);
    }
  });
}

void sum_slice(const Chunk& chunk, const Slice& slice, bool keep_logits) {
  with_words(chunk.pairs, [&](auto words) { sum_slice<decltype(words)>(chunk, slice, keep_logits); });
}

void differentiate_slice(const Chunk& chunk, const Slice& slice) {
  with_words(chunk.pairs, [&](auto words) { differentiate_slice<decltype(words)>(chunk, slice); });
}

double tail_product(const Chunk& chunk, std::int64_t n) {
  const LinearCrossEntropy& problem = *chunk.problem;
  const float* tail = problem.tail_mean_weight + teacher_row(problem, n) * problem.hidden_size;
  constexpr std::int64_t kPass = 576;
  float buffer[kPass];
  double total = 0;
  for (std::int64_t d = 0; d < problem.hidden_size; d += kPass) {
    const std::int64_t count = smaller(kPass, problem.hidden_size - d);
    widen(row_of(problem.hidden, problem.rows[n]), problem.hidden.dtype, d, count, buffer);
    for (std::int64_t i = 0; i < count; ++i) total += static_cast<double>(tail[d + i]) * static_cast<double>(buffer[i]);
  }
  return total;
}

void write_gradient(const Chunk& chunk, const Slice* slices, int slice_count, int begin, int end) {
  with_words(chunk.pairs, [&](auto words) { write_gradient<decltype(words)>(chunk, slices, slice_count, begin, end); });
}

}  // namespace dive::cpu::DIVE_ISA
