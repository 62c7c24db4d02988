// Matrices times a few vectors. Weights are widened to float32 in registers: reading them is what takes the time.
#include "cpu/decode_inputs.h"

namespace dive::cpu::DIVE_ISA {
namespace {

// Calls f with a null pointer to the form in which a weight of that kind is read, and the inputs in that form.
template <class F>
inline void with_rows(const Weight& weight, const Inputs& x, F f) {
  if (weight.scales) {
#if defined(__AVX512VNNI__)
    return f(static_cast<DigitRows*>(nullptr), x.digits);
#else
    return f(static_cast<PlainRows<Int8>*>(nullptr), x.plain);
#endif
  }
  switch (weight.dtype) {
    case DType::kFloat32:
      return f(static_cast<PlainRows<float>*>(nullptr), x.plain);
    case DType::kBFloat16:
      return f(static_cast<PairedRows*>(nullptr), x.paired);
    case DType::kFloat16:
      return f(static_cast<PlainRows<F16>*>(nullptr), x.plain);
  }
}

// For a worker that reads rows up to `end`, then from `next` on.
template <class Element>
Ahead ahead_of(const Weight& weight, std::int64_t end, const void* next) {
  const std::int64_t row = weight.row_stride * static_cast<std::int64_t>(sizeof(Element));
  return {true, static_cast<const char*>(weight.data) + end * row, static_cast<const char*>(next)};
}

// Products of rows n ... n + rows - 1 of the weight with rows `first` ... of the batch, and their scales and bias.
template <class Rows>
inline void weight_block(const Weight& weight, std::int64_t n, int rows, const float* x, int first, int count,
                         const Ahead& ahead, vf* out) {
  const auto* w = static_cast<const typename Rows::Element*>(weight.data) + n * weight.row_stride;
  // The first part of the batch finds the weights in memory, the others in L1.
  const Ahead& asked = first ? Ahead{} : ahead;
  const float* from = x + first * Rows::x_stride(weight.columns);
  dot_block<Rows>(w, weight.row_stride, rows, from, count, weight.columns, asked, out);
  // One expression for all cases, so that every caller's compiled form rounds alike.
  const vf scales = weight.scales ? load_some(weight.scales + n, rows) : splat(1.0f);
  const vf bias = weight.bias ? load_some(weight.bias + n, rows) : splat(0.0f);
  for (int b = 0; b < count; ++b) out[b] = out[b] * scales + bias;
}

// Rows of the batch that meet a weight together. They are read again for every row of weights, so they are to fit into
// L1: on a Xeon whose L1 has 48 KiB, 8 rows of 1536 numbers took 25 cycles a line of weights, twice 4 of them took 15.
int batch_tile(const Weight& weight, const Inputs& x) {
  constexpr std::int64_t kSmallL1 = 24576;  // of 32 KiB, with room for what passes through
  int most = kFew;
  with_rows(weight, x, [&](auto* type, const float*) {
    using Rows = std::remove_pointer_t<decltype(type)>;
    const std::int64_t bytes = Rows::x_stride(weight.columns) * static_cast<std::int64_t>(sizeof(float));
    if (bytes * Rows::kMostRows <= kSmallL1) most = Rows::kMostRows;
  });
  return most;
}

// Calls body(n, rows, first row of the batch, rows of the batch) for every block of weights, and within it for every
// part of the batch, `most` rows of it or fewer.
template <class Body>
inline void for_blocks(std::int64_t begin, std::int64_t end, int batch, int most, Body body) {
  for (std::int64_t n = begin; n < end; n += kLanes) {
    const int rows = end - n < kLanes ? static_cast<int>(end - n) : kLanes;
    for (int b = 0; b < batch; b += most) body(n, rows, b, batch - b < most ? batch - b : most);
  }
}

}  // namespace

std::int64_t paired_size(std::int64_t columns) { return PairedRows::x_stride(columns); }

std::int64_t digits_size([[maybe_unused]] std::int64_t columns) {
#if defined(__AVX512VNNI__)
  return DigitRows::x_stride(columns);
#else
  return 0;
#endif
}

void arrange_pairs(const float* x, int batch, std::int64_t columns, float* out) {
  for (int b = 0; b < batch; ++b) PairedRows::arrange(x + b * columns, columns, out + b * paired_size(columns));
}

void arrange_digits([[maybe_unused]] const float* x, [[maybe_unused]] int batch, [[maybe_unused]] std::int64_t columns,
                    [[maybe_unused]] float* out) {
#if defined(__AVX512VNNI__)
  for (int b = 0; b < batch; ++b) DigitRows::arrange(x + b * columns, columns, out + b * digits_size(columns));
#endif
}

void project_rows(const Weight& weight, std::int64_t begin, std::int64_t end, const Inputs& x, int batch,
                  float* outputs, bool add, const void* next) {
  with_rows(weight, x, [&](auto* type, const float* numbers) {
    using Rows = std::remove_pointer_t<decltype(type)>;
    const Ahead ahead = ahead_of<typename Rows::Element>(weight, end, next);
    for_blocks(begin, end, batch, batch_tile(weight, x), [&](std::int64_t n, int rows, int first, int count) {
      vf found[kBatchTile];
      weight_block<Rows>(weight, n, rows, numbers, first, count, ahead, found);
      for (int b = 0; b < count; ++b) {
        float* out = outputs + (first + b) * weight.rows + n;
        store_some(out, add ? load_some(out, rows) + found[b] : found[b], rows);
      }
    });
  });
}

void project_gated_rows(const Weight& gate, const Weight& up, std::int64_t begin, std::int64_t end, const Inputs& x,
                        int batch, GatedActivation activation, float* outputs, const void* next) {
  const auto block = [&](const Weight& weight, std::int64_t n, int rows, int first, int count, const void* after,
                         vf* found) {
    with_rows(weight, x, [&](auto* type, const float* numbers) {
      using Rows = std::remove_pointer_t<decltype(type)>;
      const Ahead ahead = ahead_of<typename Rows::Element>(weight, end, after);
      weight_block<Rows>(weight, n, rows, numbers, first, count, ahead, found);
    });
  };
  const int of_gate = batch_tile(gate, x), of_up = batch_tile(up, x), most = of_gate < of_up ? of_gate : of_up;
  for_blocks(begin, end, batch, most, [&](std::int64_t n, int rows, int first, int count) {
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
