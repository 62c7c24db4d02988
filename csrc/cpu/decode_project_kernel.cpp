// Matrices times a few vectors. Weights are widened to float32 in registers: reading them is what takes the time.
#include "cpu/decode_rows.h"

namespace dive::cpu::DIVE_ISA {
namespace {

// How far ahead of its use memory is asked for: four rows, if that is no less than 4 KiB, which are some 150
// nanoseconds at 25 GB/s and core, about the latency, and no more than 16 KiB, which is what L1 holds beside the rest.
template <class Element>
Ahead ahead_of(const Weight& weight, std::int64_t end, const void* next) {
  const std::int64_t row = weight.row_stride * static_cast<std::int64_t>(sizeof(Element)), rows = 4 * row;
  const std::int64_t distance = rows < 4096 ? 4096 : rows > 16384 ? 16384 : rows;
  return {distance, static_cast<const char*>(weight.data) + end * row, static_cast<const char*>(next)};
}

// Products of rows n ... n + rows - 1 of the weight with rows `first` ... of the batch, and their scales and bias.
template <class Element>
inline void weight_block(const Weight& weight, std::int64_t n, int rows, const float* x, int first, int count,
                         const Ahead& ahead, vf* out) {
  const Element* w = static_cast<const Element*>(weight.data) + n * weight.row_stride;
  // The first part of the batch finds the weights in memory, the others in L1.
  const Ahead& asked = first ? Ahead{} : ahead;
  dot_block(w, weight.row_stride, rows, x + first * weight.columns, count, weight.columns, asked, out);
  // One expression for all cases, so that every caller's compiled form rounds alike.
  const vf scales = weight.scales ? load_some(weight.scales + n, rows) : splat(1.0f);
  const vf bias = weight.bias ? load_some(weight.bias + n, rows) : splat(0.0f);
  for (int b = 0; b < count; ++b) out[b] = out[b] * scales + bias;
}

// Calls body(n, rows, first row of the batch, rows of the batch) for every block of weights, and within it for every
// part of the batch.
template <class Body>
inline void for_blocks(std::int64_t begin, std::int64_t end, int batch, Body body) {
  for (std::int64_t n = begin; n < end; n += kLanes) {
    const int rows = end - n < kLanes ? static_cast<int>(end - n) : kLanes;
    for (int b = 0; b < batch; b += kBatchTile) body(n, rows, b, batch - b < kBatchTile ? batch - b : kBatchTile);
  }
}

}  // namespace

void project_rows(const Weight& weight, std::int64_t begin, std::int64_t end, const float* x, int batch,
                  float* outputs, bool add, const void* next) {
  with_elements(weight.dtype, weight.scales != nullptr, [&](auto* type) {
    using Element = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    const Ahead ahead = ahead_of<Element>(weight, end, next);
    for_blocks(begin, end, batch, [&](std::int64_t n, int rows, int first, int count) {
      vf found[kBatchTile];
      weight_block<Element>(weight, n, rows, x, first, count, ahead, found);
      for (int b = 0; b < count; ++b) {
        float* out = outputs + (first + b) * weight.rows + n;
        store_some(out, add ? load_some(out, rows) + found[b] : found[b], rows);
      }
    });
  });
}

void project_gated_rows(const Weight& gate, const Weight& up, std::int64_t begin, std::int64_t end, const float* x,
                        int batch, GatedActivation activation, float* outputs, const void* next) {
  const auto block = [&](const Weight& weight, std::int64_t n, int rows, int first, int count, const void* after,
                         vf* found) {
    with_elements(weight.dtype, weight.scales != nullptr, [&](auto* type) {
      using Element = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
      weight_block<Element>(weight, n, rows, x, first, count, ahead_of<Element>(weight, end, after), found);
    });
  };
  for_blocks(begin, end, batch, [&](std::int64_t n, int rows, int first, int count) {
    vf gates[kBatchTile], ups[kBatchTile];
    block(gate, n, rows, first, count, next, gates);
    block(up, n, rows, first, count, nullptr, ups);
    for (int b = 0; b < count; ++b) {
      store_some(outputs + (first + b) * gate.rows + n, activate(activation, gates[b]) * ups[b], rows);
    }
  });
}

void quantize_rows(const Weight& weight, std::int64_t begin, std::int64_t end, std::int8_t* out, float* scales) {
  with_elements(weight.dtype, false, [&](auto* type) {
    using Element = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    const std::int64_t K = weight.columns;
    for (std::int64_t n = begin; n < end; ++n) {
      const Element* row = static_cast<const Element*>(weight.data) + n * weight.row_stride;
      vf largest = {};
      for (std::int64_t k = 0; k < K; k += kLanes) {
        const vf v = load_some(row + k, K - k);
        largest = max(select(v < splat(0.0f), -v, v), largest);
      }
      float most = 0;
      for (int i = 0; i < kLanes; ++i) most = largest[i] > most ? largest[i] : most;
      scales[n] = most / 127;
      const vf inverse = splat(most > 0 ? 127 / most : 0.0f);
      const vf shifter = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low mantissa bits
      for (std::int64_t k = 0; k < K; k += kLanes) {
        const vi whole = (vi)(load_some(row + k, K - k) * inverse + shifter) - (vi)shifter;
        const vb narrow = __builtin_convertvector(whole, vb);
        std::memcpy(out + n * K + k, &narrow, static_cast<std::size_t>(K - k < kLanes ? K - k : kLanes));
      }
    }
  });
}

void embed_row(const Weight& embedding, std::int64_t token, float scale, float* out) {
  const float factor = embedding.scales ? embedding.scales[token] * scale : scale;
  with_elements(embedding.dtype, embedding.scales != nullptr, [&](auto* type) {
    using Element = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    const Element* row = static_cast<const Element*>(embedding.data) + token * embedding.row_stride;
    for (std::int64_t k = 0; k < embedding.columns; k += kLanes) {
      const std::int64_t rest = embedding.columns - k;
      store_some(out + k, load_some(row + k, rest) * splat(factor), rest);
    }
  });
}

}  // namespace dive::cpu::DIVE_ISA
