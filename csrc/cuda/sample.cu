// From logits to the next token, as engine/sampler.h says, by one block per row; and the loop's bookkeeping.
//
// Weights are the host's, to the bit (engine/draws.h; this file is compiled without contraction of products and sums).
// Their sums are of whole numbers, weight * 2^40 rounded down, so that no order of adding matters and shared counters
// can be used. Thresholds are found digit by digit of the numbers' bits, from the most significant one: no sorting.
//
// V vocabulary.
#include "cuda/device_math.cuh"
#include "cuda/launch.h"
#include "engine/draws.h"

namespace dive::cuda {
namespace {

using Mass = unsigned long long;
using Bits = std::uint32_t;

constexpr int kThreads = 1024, kWarps = kThreads / kWarp;
// The sum of a vocabulary's weights, 2^18 of at most 1, is below 2^58.
constexpr float kOne = 1099511627776.0f;         // 2^40
constexpr int kDigit = 11, kBins = 1 << kDigit;  // 32 bits in three digits

struct Part {
  Mass mass;      // of the tokens above the threshold
  unsigned ties;  // tokens at it
};

struct Shared {
  Mass bins[kBins];
  Part parts[kWarps];
  double sums[kWarps];
  Best bests[kWarps];
  float barred[engine::kMostLoopEos];  // logits of barred tokens, as they came
  Mass before;                         // what lies above the found bin
  int bin;
  std::int64_t token;
  unsigned word;
};

// Numbers in an order that unsigned integers have as well.
__device__ __forceinline__ Bits ordered(float x) {
  const Bits bits = __float_as_uint(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float unordered(Bits bits) {
  return __uint_as_float(bits & 0x80000000u ? bits & 0x7fffffffu : ~bits);
}

// The logits of a row with the penalty in them.
struct Values {
  const float* logits;
  const std::uint8_t* seen;  // or null
  float penalty;
  int V;

  __device__ __forceinline__ float operator[](int v) const {
    const float x = logits[v];
    if (!seen || !seen[v]) return x;
    return x < 0 ? x * penalty : x / penalty;
  }
};

// Where, going down from the last bin, the sum of the bins first reaches `wanted` > 0: shared.bin and, of all above it,
// shared.before; a bin of -1 where all together do not reach it.
__device__ void find_bin(Shared& shared, Mass wanted) {
  constexpr int kOwn = kBins / kWarp;
  __syncthreads();
  if (threadIdx.x < kWarp) {
    const int lane = threadIdx.x, highest = kBins - 1 - lane * kOwn;
    Mass own = 0;
    for (int i = 0; i < kOwn; ++i) own += shared.bins[highest - i];
    Mass reached = own;
    for (int step = 1; step < kWarp; step *= 2) {
      const Mass other = __shfl_up_sync(kAllLanes, reached, step);
      if (lane >= step) reached += other;
    }
    const unsigned enough = __ballot_sync(kAllLanes, reached >= wanted);
    if (lane == 0 && !enough) shared.bin = -1;
    if (enough && lane == __ffs(static_cast<int>(enough)) - 1) {
      Mass sum = reached - own;
      int bin = highest;
      while (sum + shared.bins[bin] < wanted) sum += shared.bins[bin--];
      shared.bin = bin;
      shared.before = sum;
    }
  }
  __syncthreads();
}

// The bits of the largest threshold for which the sum of `size` over all tokens with `bits` >= it reaches `wanted`;
// what lies above it is subtracted from `wanted`. 0 where all together do not reach it.
template <class Each>
__device__ Bits threshold(Shared& shared, int V, Mass& wanted, Each each) {
  Bits found = 0;
  for (int digit = 2; digit >= 0; --digit) {
    const int shift = digit == 2 ? 21 : digit == 1 ? 10 : 0, width = digit == 0 ? 10 : kDigit;
    for (int i = threadIdx.x; i < kBins; i += kThreads) shared.bins[i] = 0;
    __syncthreads();
    for (int v = threadIdx.x; v < V; v += kThreads) {
      Bits bits;
      Mass size;
      each(v, bits, size);
      const int above = shift + width;
      if (size && (above == 32 || bits >> above == found >> above)) {
        atomicAdd(&shared.bins[bits >> shift & ((1u << width) - 1)], size);
      }
    }
    find_bin(shared, wanted);
    if (shared.bin < 0) return 0;
    wanted -= shared.before;
    found |= static_cast<Bits>(shared.bin) << shift;
  }
  return found;
}

// The tokens that may be drawn, and what each weighs.
struct Candidates {
  Values values;
  float top, factor;
  float lowest;  // of their logits
  float least;   // of their weights
  Bits edge;     // of their weights' bits: of the tokens at it, the first `ties` may come
  Mass edge_mass;
  unsigned ties;

  __device__ __forceinline__ float weight(int v) const {
    const float x = values[v];
    const float weight = engine::exp_of_negative((x - top) * factor);
    return x >= lowest ? weight : 0.0f;
  }

  static __device__ __forceinline__ Mass mass_of(float weight) { return static_cast<Mass>(weight * kOne); }

  // 1 above the edge, -1 at it, else 0.
  __device__ __forceinline__ int side(float weight) const {
    if (weight < least) return 0;
    const Bits bits = __float_as_uint(weight);
    return bits > edge ? 1 : bits == edge ? -1 : 0;
  }

  // Those of tokens [begin, end), by one warp, in all lanes.
  __device__ Part part(int begin, int end) const {
    Part own{0, 0};
    for (int v = begin + threadIdx.x % kWarp; v < end; v += kWarp) {
      const float w = weight(v);
      const int where = side(w);
      if (where > 0) own.mass += mass_of(w);
      own.ties += where < 0;
    }
    for (int step = kWarp / 2; step; step /= 2) {
      own.mass += __shfl_xor_sync(kAllLanes, own.mass, step);
      own.ties += __shfl_xor_sync(kAllLanes, own.ties, step);
    }
    return own;
  }

  // With the first `free` of its tokens at the edge.
  __device__ __forceinline__ Mass mass(const Part& part, unsigned free) const {
    return part.mass + edge_mass * min(part.ties, free);
  }
};

// The first token, in the vocabulary's order, with which the sum of masses exceeds u * the sum of all.
__device__ int draw(Shared& shared, const Candidates& candidates, double u) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  int begin = 0, end = candidates.values.V;
  Mass passed = 0, wanted = 0;
  unsigned free = candidates.ties;
  bool first = true;
  do {
    const int size = ((end - begin + kWarps - 1) / kWarps + kWarp - 1) / kWarp * kWarp;
    const int own = min(end, begin + warp * size);
    const Part part = candidates.part(own, min(end, own + size));
    __syncthreads();
    if (lane == 0) shared.parts[warp] = part;
    __syncthreads();
    if (first) {
      Mass total = 0;
      unsigned left = free;
      for (int w = 0; w < kWarps; ++w) {
        total += candidates.mass(shared.parts[w], left);
        left -= min(left, shared.parts[w].ties);
      }
      wanted = min(static_cast<Mass>(u * static_cast<double>(total)), total - 1);
      first = false;
    }
    int w = 0;
    for (; w < kWarps - 1; ++w) {
      const Mass mass = candidates.mass(shared.parts[w], free);
      if (passed + mass > wanted) break;
      passed += mass;
      free -= min(free, shared.parts[w].ties);
    }
    begin = min(end, begin + w * size);
    end = min(end, begin + size);
  } while (end - begin > kWarp);
  __syncthreads();
  if (warp == 0) {
    const int v = begin + lane;
    const float weight = v < end ? candidates.weight(v) : 0.0f;
    const int where = v < end ? candidates.side(weight) : 0;
    const unsigned ties = __ballot_sync(kAllLanes, where < 0);
    const bool comes = where > 0 || (where < 0 && __popc(ties & ((1u << lane) - 1)) < static_cast<int>(min(free, 32u)));
    Mass reached = comes ? Candidates::mass_of(weight) : 0;
    for (int step = 1; step < kWarp; step *= 2) {
      const Mass other = __shfl_up_sync(kAllLanes, reached, step);
      if (lane >= step) reached += other;
    }
    const unsigned enough = __ballot_sync(kAllLanes, passed + reached > wanted);
    if (lane == 0) shared.token = begin + (enough ? __ffs(static_cast<int>(enough)) - 1 : 0);
  }
  __syncthreads();
  return static_cast<int>(shared.token);
}

__device__ int sampled(Shared& shared, const Chooser& chooser, const Values& values, float top, double u) {
  Candidates candidates{values, top, engine::inverse_of_temperature(chooser.temperature), -INFINITY, chooser.min_p, 0,
                        0,      0};
  if (chooser.top_k > 0 && chooser.top_k < values.V) {
    Mass wanted = static_cast<Mass>(chooser.top_k);
    const Bits bits = threshold(shared, values.V, wanted, [&](int v, Bits& bits, Mass& size) {
      bits = ordered(isnan(values[v]) ? -INFINITY : values[v]);
      size = 1;
    });
    candidates.lowest = unordered(bits);
  }
  if (chooser.top_p < 1) {
    const auto each = [&](int v, Bits& bits, Mass& size) {
      const float weight = candidates.weight(v);
      bits = __float_as_uint(weight);
      size = Candidates::mass_of(weight);
    };
    // All of them, to know what a share of it is.
    Mass own = 0;
    for (int v = threadIdx.x; v < values.V; v += kThreads) own += Candidates::mass_of(candidates.weight(v));
    for (int step = kWarp / 2; step; step /= 2) own += __shfl_xor_sync(kAllLanes, own, step);
    __syncthreads();
    if (threadIdx.x % kWarp == 0) shared.parts[threadIdx.x / kWarp].mass = own;
    __syncthreads();
    Mass total = 0;
    for (int w = 0; w < kWarps; ++w) total += shared.parts[w].mass;
    Mass wanted = static_cast<Mass>(ceil(static_cast<double>(chooser.top_p) * static_cast<double>(total)));
    wanted = max(wanted, Mass{1});
    candidates.edge = threshold(shared, values.V, wanted, each);
    candidates.edge_mass = Candidates::mass_of(__uint_as_float(candidates.edge));
    if (candidates.edge_mass)
      candidates.ties = static_cast<unsigned>((wanted + candidates.edge_mass - 1) / candidates.edge_mass);
  }
  return draw(shared, candidates, u);
}

// log(sum of e^logits) in the first thread.
__device__ double log_sum_exp(Shared& shared, const float* logits, int V, float top) {
  double own = 0;
  for (int v = threadIdx.x; v < V; v += kThreads) {
    if (logits[v] <= top) own += expf(logits[v] - top);
  }
  for (int step = kWarp / 2; step; step /= 2) own += __shfl_xor_sync(kAllLanes, own, step);
  if (threadIdx.x % kWarp == 0) shared.sums[threadIdx.x / kWarp] = own;
  __syncthreads();
  double total = 0;
  for (int w = 0; w < kWarps; ++w) total += shared.sums[w];
  return top + log(total);
}

// The first index of the largest of the values, in all threads.
__device__ int largest(Shared& shared, const Values& values) {
  Best best{-INFINITY, values.V};
  for (int v = threadIdx.x; v < values.V; v += kThreads) {
    if (const Best found{values[v], v}; beats(found, best)) best = found;
  }
  best = best_of_block(best, shared.bests);
  if (threadIdx.x == 0) shared.token = best.index;
  __syncthreads();
  return static_cast<int>(shared.token);
}

// A row's next token; its log-probability is right in the first thread.
__device__ Told choose(Shared& shared, const Advance& a, int b) {
  const Chooser& chooser = a.choosers[b];
  const int V = static_cast<int>(a.vocabulary);
  float* const logits = a.logits + b * a.vocabulary;
  int token = static_cast<int>(a.likeliest[b]);
  const double lse = chooser.wants_log_prob ? log_sum_exp(shared, logits, V, logits[token]) : 0;
  const bool bars = chooser.done < chooser.barred && chooser.eos_count > 0;
  const bool penalized = chooser.repetition_penalty != 1.0f;
  if (bars) {
    __syncthreads();
    for (int i = 0; threadIdx.x == 0 && i < chooser.eos_count; ++i) {
      shared.barred[i] = logits[chooser.eos[i]];
      logits[chooser.eos[i]] = -INFINITY;
    }
    __syncthreads();
  }
  const Values values{logits, penalized ? a.seen + b * a.vocabulary : nullptr, chooser.repetition_penalty, V};
  if (bars || penalized) token = largest(shared, values);
  const float top = values[token];
  // An infinite logit, or nothing but barred tokens, leaves no weights to draw by.
  if (chooser.temperature > 0 && isfinite(top)) {
    const double u = engine::uniform(chooser.seed, chooser.stream, static_cast<std::uint64_t>(chooser.done));
    token = sampled(shared, chooser, values, top, u);
  }
  float logit = logits[token];
  // Of an id that stands there twice, the first entry has the logit.
  for (int i = chooser.eos_count - 1; bars && i >= 0; --i) {
    if (chooser.eos[i] == token) logit = shared.barred[i];
  }
  return {token, static_cast<float>(logit - lse)};
}

__global__ void __launch_bounds__(kThreads) advance_kernel(const Advance a) {
  take_turn();
  Shared& shared = *dynamic_shared_memory<Shared>();
  const int b = blockIdx.x;
  Chooser& chooser = a.choosers[b];
  if (chooser.most > 0) {
    const Told told = choose(shared, a, b);
    __syncthreads();  // all have read what is changed now
    if (threadIdx.x == 0) {
      Row& row = a.rows[b];
      row.token = told.token;
      ++row.position;
      ++row.rope_position;
      if (a.seen) a.seen[b * a.vocabulary + told.token] = 1;
      bool ended = ++chooser.done == chooser.most;
      for (int i = 0; i < chooser.eos_count; ++i) ended |= chooser.eos[i] == told.token;
      if (ended) atomicExch(&a.state->ended, 1);  // by several blocks, perhaps
      a.told[static_cast<std::int64_t>(a.state->steps) * a.most_rows + b] = told;
      __threadfence_system();
    }
  }
  if (!comes_last(a.ticket, gridDim.x, &shared.word) || threadIdx.x != 0) return;
  const std::int32_t steps = ++a.state->steps;
  const bool over = a.state->ended || steps == a.state->most_steps || *a.wanted_stop;
  if (a.has_condition) set_graph_condition(a.condition, !over);
  if (over) a.progress->over = 1;
  __threadfence_system();
  a.progress->steps = steps;
}

}  // namespace

cudaError_t advance(cudaStream_t stream, const Advance& arguments, int batch) {
  return launch(stream, static_cast<unsigned>(batch), kThreads, sizeof(Shared), advance_kernel, arguments);
}

}  // namespace dive::cuda
