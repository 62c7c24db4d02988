// Matrices times a few vectors. Weights are widened to float32 in registers: reading them is what takes the time.
#include "cpu/decode_int8.h"
#include "cpu/decode_int8_tiles.h"
#include "cpu/decode_pairs.h"

namespace dive::cpu::DIVE_ISA {
namespace {

// Rows of weights that are computed side by side, and the vectors that their results take.
constexpr int kBlockRows = kInt8Rows, kBlockVectors = kLineVectors;

#if !defined(__AMX_INT8__)
using Int8Rows = Int8Vectors;
#endif

// Calls f with a null pointer to the form in which a weight of that dtype is read, and the inputs in that form.
template <class F>
inline void with_rows(const Weight& weight, const Inputs& x, F f) {
  switch (weight.dtype) {
    case DType::kFloat32:
      return f(static_cast<PlainRows<float>*>(nullptr), x.plain);
    case DType::kBFloat16:
      return f(static_cast<PairedRows*>(nullptr), x.paired);
    case DType::kFloat16:
      return f(static_cast<PlainRows<F16>*>(nullptr), x.plain);
  }
}

// Scalar products of the block of rows from n on, of those before `end`, with rows `first` ... of the batch:
// kBlockVectors for each of these.
inline void dot_rows(const Weight& weight, std::int64_t n, std::int64_t end, const Inputs& x, int batch, int first,
                     int count, const Ahead& ahead, vf* out) {
  if (weight.scales) {
    const auto* w = static_cast<const std::int8_t*>(weight.data) + n * weight.row_stride;
    return Int8Rows::block(w, x.int8, batch, first, count, weight.columns, ahead, out);
  }
  with_rows(weight, x, [&](auto* type, const float* numbers) {
    using Rows = std::remove_pointer_t<decltype(type)>;
    const float* from = numbers + first * Rows::x_stride(weight.columns);
    for (int v = 0; v < kBlockVectors; ++v) {
      const std::int64_t row = n + v * kLanes, rest = end - row;
      if (rest <= 0) break;
      const auto* w = static_cast<const typename Rows::Element*>(weight.data) + row * weight.row_stride;
      const int rows = rest < kLanes ? static_cast<int>(rest) : kLanes;
      dot_block<Rows, kBlockVectors>(w, weight.row_stride, rows, from, count, weight.columns, ahead, out + v);
    }
  });
}

// The same with scales and bias. For a worker that reads rows up to `end`, then from `next` on.
inline void weight_block(const Weight& weight, std::int64_t n, std::int64_t end, const Inputs& x, int batch, int first,
                         int count, const void* next, vf* out) {
  const std::int64_t row = weight.row_stride * (weight.scales ? 1 : size_of(weight.dtype));
  const Ahead ahead{true, static_cast<const char*>(weight.data) + end * row, static_cast<const char*>(next)};
  // The first part of the batch finds the weights in memory, the others in a cache.
  dot_rows(weight, n, end, x, batch, first, count, first ? Ahead{} : ahead, out);
  for (int v = 0; v < kBlockVectors; ++v) {
    const std::int64_t at = n + v * kLanes, rest = end - at;
    if (rest <= 0) break;
    // One expression for all cases, so that every caller's compiled form rounds alike.
    const vf scales = weight.scales ? load_some(weight.scales + at, rest) : splat(1.0f);
    const vf bias = weight.bias ? load_some(weight.bias + at, rest) : splat(0.0f);
    for (int b = v; b < count * kBlockVectors; b += kBlockVectors) out[b] = out[b] * scales + bias;
  }
}

// Rows of the batch that meet a weight together.
int batch_tile(const Weight& weight, int batch) { return weight.scales ? Int8Rows::most_rows(batch) : kBatchTile; }

constexpr int kMostRows = Int8Rows::kMostRows > kBatchTile ? Int8Rows::kMostRows : kBatchTile;

// Calls body(n, first row of the batch, rows of the batch) for every block of weights, and within it for every part of
// the batch, `most` rows of it or fewer.
template <class Body>
inline void for_blocks(std::int64_t begin, std::int64_t end, int batch, int most, Body body) {
  for (std::int64_t n = begin; n < end; n += kBlockRows) {
    for (int b = 0; b < batch; b += most) body(n, b, batch - b < most ? batch - b : most);
  }
}

}  // namespace

std::int64_t paired_size(int batch, std::int64_t columns) { return batch * PairedRows::x_stride(columns); }

std::int64_t int8_size(int batch, std::int64_t columns) { return Int8Rows::size(batch, columns); }

void arrange_pairs(const float* x, int batch, std::int64_t columns, float* out) {
  for (int b = 0; b < batch; ++b) PairedRows::arrange(x + b * columns, columns, out + paired_size(b, columns));
}

void arrange_int8(const float* x, int batch, std::int64_t columns, float* out) {
  Int8Rows::arrange(x, batch, columns, out);
}

void project_rows(const Weight& weight, std::int64_t begin, std::int64_t end, const Inputs& x, int batch,
                  float* outputs, bool add, const void* next) {
  const Int8Rows::Registers registers(weight.scales ? batch : 0);
  for_blocks(begin, end, batch, batch_tile(weight, batch), [&](std::int64_t n, int first, int count) {
    vf found[kMostRows * kBlockVectors];
    weight_block(weight, n, end, x, batch, first, count, next, found);
    for (int b = 0; b < count; ++b) {
      for (int v = 0; v < kBlockVectors; ++v) {
        const std::int64_t at = n + v * kLanes, rest = end - at;
        if (rest <= 0) break;
        float* out = outputs + (first + b) * weight.rows + at;
        const vf one = found[b * kBlockVectors + v];
        store_some(out, add ? load_some(out, rest) + one : one, rest);
      }
    }
  });
}

void project_gated_rows(const Weight& gate, const Weight& up, std::int64_t begin, std::int64_t end, const Inputs& x,
                        int batch, GatedActivation activation, float* outputs, const void* next) {
  const Int8Rows::Registers registers(gate.scales || up.scales ? batch : 0);
  const int of_gate = batch_tile(gate, batch), of_up = batch_tile(up, batch), most = of_gate < of_up ? of_gate : of_up;
  for_blocks(begin, end, batch, most, [&](std::int64_t n, int first, int count) {
    vf gates[kMostRows * kBlockVectors], ups[kMostRows * kBlockVectors];
    weight_block(gate, n, end, x, batch, first, count, next, gates);
    weight_block(up, n, end, x, batch, first, count, nullptr, ups);
    for (int b = 0; b < count; ++b) {
      for (int v = 0; v < kBlockVectors; ++v) {
        const std::int64_t at = n + v * kLanes, rest = end - at;
        if (rest <= 0) break;
        const int i = b * kBlockVectors + v;
        store_some(outputs + (first + b) * gate.rows + at, activate(activation, gates[i]) * ups[i], rest);
      }
    }
  });
}

void quantize_rows(const Weight& weight, std::int64_t begin, std::int64_t end, std::int8_t* out, float* scales) {
  with_elements(weight.dtype, [&](auto* type) {
    using Element = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    const std::int64_t K = weight.columns, stride = int8_stride(K);
    for (std::int64_t n = begin; n < end || n % kInt8Rows; ++n) {
      std::int8_t* const words = out + n / kInt8Rows * kInt8Rows * stride + n % kInt8Rows * kInt8Columns;
      if (n >= end) {
        for (std::int64_t k = 0; k < K; k += kInt8Columns) std::memset(words + k * kInt8Rows, 0, kInt8Columns);
        continue;
      }
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
        const Bytes narrow = __builtin_convertvector(whole, Bytes);
        for (int i = 0; i < kLanes && k + i < K; i += kInt8Columns) {
          std::memcpy(words + (k + i) * kInt8Rows, reinterpret_cast<const char*>(&narrow) + i, kInt8Columns);
        }
      }
    }
  });
}

void embed_row(const Weight& embedding, std::int64_t token, float scale, float* out) {
  with_elements(embedding.dtype, [&](auto* type) {
    using Element = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    const Element* row = static_cast<const Element*>(embedding.data) + token * embedding.row_stride;
    for (std::int64_t k = 0; k < embedding.columns; k += kLanes) {
      const std::int64_t rest = embedding.columns - k;
      store_some(out + k, load_some(row + k, rest) * splat(scale), rest);
    }
  });
}

}  // namespace dive::cpu::DIVE_ISA
