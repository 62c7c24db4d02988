// What linear_cross_entropy.cpp hands to its kernels: one chunk of rows, cut into slices of the vocabulary.
//
// R rows of a chunk, padded to whole panels.
#pragma once

#include <cstdint>

#include "cpu/linear_cross_entropy.h"

namespace dive::cpu {

// What the scratch memory of a level's kernels must hold.
struct Blocking {
  int panel;                  // rows of hidden states side by side: R is a multiple of it
  int tile;                   // vocabulary entries multiplied together: slices begin at multiples of it
  std::int64_t most_rows;     // R of a chunk, where memory allows
  bool pairs;                 // a word of the packed operands is two bfloat16, else one float32
  std::int64_t depth;         // words along D, padded
  std::int64_t width;         // hidden_size, padded
  std::int64_t block;         // vocabulary entries of a block
  std::int64_t slice_floats;  // scratch of a slice, beside `block` floats for each of R
};

// A token whose probability under the target or the teacher's top is known: it takes `share` from a logit's gradient.
struct Mark {
  std::int32_t token;
  std::int32_t row;  // of the chunk
  float q;           // teacher's probability; 0 for a target
  float share;
  bool is_target;
};

// Per row of the chunk, over a slice of the vocabulary. Each sum's terms are relative to `max`, the largest logit so
// far: e_v = e^(z_v - max).
struct RowSums {
  float* max;
  double* sum;              // sum e_v
  double* centred;          // sum e_v (z_v - max)
  double* weighted_logits;  // sum c_v z_v
  std::int32_t* best;       // first token of the largest logit, -1 before there is one
  float* target_logit;      // 0 where the target is in another slice
  double* top_logits;       // sum over the teacher's top of q_v z_v
  float* teacher_max;
  double* teacher_sum;  // sum f_v, f_v = e^(teacher's z_v - teacher_max)
  double* cross;        // sum f_v ((teacher's z_v - teacher_max) - (z_v - max))
};

struct Chunk {
  const LinearCrossEntropy* problem;
  bool pairs;          // as in Blocking
  std::int64_t first;  // the chunk's first counted row
  int count;           // rows that are there
  int rows;            // R
  std::int64_t depth;  // as in Blocking
  void* states;        // [R / panel, or twice that with a teacher's after the student's][depth][panel] words
  // By row, for the gradient: e_v p_share - c_v smoothing_share - f_v q_share, minus the marks.
  const float* max;
  const float* p_share;
  const float* smoothing_share;
  const float* teacher_max;
  const float* q_share;
};

struct Slice {
  std::int64_t begin, end;  // of the vocabulary
  const Mark* marks;        // sorted by token
  std::int64_t mark_count;
  float* logits;  // the slice's, or room for one block where no gradient is wanted
  float* scratch;
  float* gradient;  // [R / panel][width / tile][tile][panel], the last two exchanged by products in tile registers
  RowSums sums;
};

DIVE_DECLARE_VARIANTS(Blocking blocking(const LinearCrossEntropy& problem))
// Packs panels begin ... end - 1 of chunk.states.
DIVE_DECLARE_VARIANTS(void pack_states(const Chunk& chunk, int begin, int end))
// Logits of the slice and their sums; keeps the logits if keep_logits.
DIVE_DECLARE_VARIANTS(void sum_slice(const Chunk& chunk, const Slice& slice, bool keep_logits))
// From the kept logits, the slice's part of the gradient.
DIVE_DECLARE_VARIANTS(void differentiate_slice(const Chunk& chunk, const Slice& slice))
// tail_mean_weight . hidden of counted row n.
DIVE_DECLARE_VARIANTS(double tail_product(const Chunk& chunk, std::int64_t n))
// The gradient's rows begin ... end - 1 of the chunk: the slices' parts added in order and rounded once.
DIVE_DECLARE_VARIANTS(void write_gradient(const Chunk& chunk, const Slice* slices, int slice_count, int begin, int end))

}  // namespace dive::cpu
