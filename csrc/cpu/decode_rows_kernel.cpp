// What a decoding step does to rows of activations besides projections and attention.
#include "cpu/decode_rows.h"

namespace dive::cpu::DIVE_ISA {

void norm_row(const float* x, const float* weight, float eps, std::int64_t size, float* out) {
  vf squares[4] = {};  // side by side, because one sum would wait for every addition's latency
  std::int64_t i = 0;
  for (; i + 4 * kLanes <= size; i += 4 * kLanes) {
    unroll<4>([&](auto j) { squares[j] += load(x + i + j * kLanes) * load(x + i + j * kLanes); });
  }
  for (; i < size; i += kLanes) {
    const vf v = load_some(x + i, size - i);
    squares[0] += v * v;
  }
  const float mean = sum((squares[0] + squares[1]) + (squares[2] + squares[3])) / static_cast<float>(size);
  const vf inverse = splat(1.0f / sqrtf(mean + eps));
  for (i = 0; i < size; i += kLanes) {
    const std::int64_t rest = size - i;
    store_some(out + i, load_some(x + i, rest) * inverse * load_some(weight + i, rest), rest);
  }
}

void rotate_head(float* x, const float* cos, const float* sin, int head_size) {
  const std::int64_t half = head_size / 2;
  for (std::int64_t i = 0; i < half; i += kLanes) {
    const std::int64_t rest = half - i;
    const vf low = load_some(x + i, rest), high = load_some(x + half + i, rest);
    store_some(x + i, low * load_some(cos + i, rest) - high * load_some(sin + i, rest), rest);
    store_some(x + half + i, high * load_some(cos + half + i, rest) + low * load_some(sin + half + i, rest), rest);
  }
}

void gate_range(GatedActivation activation, const float* gate, const float* up, std::int64_t count, float* out) {
  for (std::int64_t i = 0; i < count; i += kLanes) {
    const std::int64_t rest = count - i;
    store_some(out + i, activate(activation, load_some(gate + i, rest)) * load_some(up + i, rest), rest);
  }
}

void add_range(const float* a, const float* b, std::int64_t count, float* out) {
  for (std::int64_t i = 0; i < count; i += kLanes) {
    const std::int64_t rest = count - i;
    store_some(out + i, load_some(a + i, rest) + load_some(b + i, rest), rest);
  }
}

void softcap_range(float* x, std::int64_t count, float cap) {
  for (std::int64_t i = 0; i < count; i += kLanes) {
    const std::int64_t rest = count - i;
    store_some(x + i, splat(cap) * tanh(load_some(x + i, rest) / splat(cap)), rest);
  }
}

void narrow_range(const float* x, std::int64_t count, DType dtype, void* out) {
  with_elements(dtype, [&](auto* type) {
    using Element = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    Element* target = static_cast<Element*>(out);
    for (std::int64_t i = 0; i < count; i += kLanes) store_some(target + i, load_some(x + i, count - i), count - i);
  });
}

// A cache line's words, as vectors.
constexpr std::int64_t kLine = 64, kLineVectors = kLine / static_cast<std::int64_t>(sizeof(vu));

// Folds whole cache lines into `sums` by add(sum, words), asking for memory ahead.
template <class F>
void fold_lines(const void* data, std::int64_t bytes, vu (&sums)[kLineVectors], F add) {
  const char* p = static_cast<const char*>(data);
  const Ahead ahead{true};
  std::int64_t touched = 0;
  for (std::int64_t i = 0; i + kLine <= bytes; i += kLine) {
    if (i >= touched) {
      ahead.touch(p + i);
      touched += kTouch;
    }
    unroll<kLineVectors>([&](auto j) {
      vu v;
      std::memcpy(&v, p + i + j * sizeof(vu), sizeof v);
      sums[j] = add(sums[j], v);
    });
  }
}

std::uint32_t read_range(const void* data, std::int64_t bytes) {
  vu sums[kLineVectors] = {};
  fold_lines(data, bytes, sums, [](vu sum, vu words) { return sum + words; });
  std::uint32_t total = 0;
  for (const vu& v : sums) {
    for (int lane = 0; lane < kLanes; ++lane) total += v[lane];
  }
  return total;
}

std::uint64_t digest_range(const void* data, std::int64_t bytes, std::uint64_t place) {
  // Turned from line to line, so that words which change places or change alike do not cancel.
  vu sums[kLineVectors] = {};
  fold_lines(data, bytes, sums, [](vu sum, vu words) { return (sum << 5 | sum >> 27) + words; });
  std::uint64_t total = 0;
  std::uint64_t word = place * (kLine / 4);
  for (const vu& v : sums) {
    for (int lane = 0; lane < kLanes; ++lane) {
      // The mixing of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
      std::uint64_t x = v[lane] + ++word * 0x9e3779b97f4a7c15;
      x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
      x = (x ^ x >> 27) * 0x94d049bb133111eb;
      total += x ^ x >> 31;
    }
  }
  return total;
}

// A NaN counts as larger than every number, as it does for torch.argmax.
std::int64_t argmax_range(const float* x, std::int64_t count) {
  constexpr auto larger = [](auto a, auto b) { return (a > b) | ((a != a) & (b == b)); };
  float most = x[0];
  std::int64_t found = 0, i = 0;
  if (count >= kLanes) {
    vf best = load(x);
    vi index, where;
    for (int lane = 0; lane < kLanes; ++lane) index[lane] = lane;
    where = index;
    for (i = kLanes; i + kLanes <= count; i += kLanes) {
      index += kLanes;
      const vf v = load(x + i);
      const vi wins = larger(v, best);
      best = select(wins, v, best);
      where = wins ? index : where;
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      if (larger(best[lane], most) || (!larger(most, best[lane]) && where[lane] < found)) {
        most = best[lane];
        found = where[lane];
      }
    }
  }
  for (; i < count; ++i) {
    if (larger(x[i], most)) {
      most = x[i];
      found = i;
    }
  }
  return found;
}

}  // namespace dive::cpu::DIVE_ISA
