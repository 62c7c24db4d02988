// What happens to rows between the products: embedding and angles, residual add and norm, the end of the logits; and the
// copying of prompts' keys and values into cache blocks.
#include <type_traits>

#include "cuda/device_math.cuh"
#include "cuda/launch.h"

namespace dive::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kArgmaxThreads = 1024;  // one block has a row of up to 262144 logits

template <DType kDType>
__global__ void __launch_bounds__(kThreads) begin_kernel(const Begin a) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  using F = Format<kDType>;
  const std::int64_t b = blockIdx.x;
  const Row row = a.rows[b];
  const auto* const from = static_cast<const typename F::Element*>(a.embedding) + row.token * a.embedding_stride;
  for (int d = threadIdx.x; d < a.hidden_size; d += kThreads) {
    a.residual[b * a.hidden_size + d] = F::widen(from[d]) * a.embedding_scale;
  }
  for (int i = threadIdx.x; i < a.ropes * a.half_head; i += kThreads) {
    const int rope = i / a.half_head;
    // Rounded to float32 as in the models' own code, which matters far from the start.
    const float angle = static_cast<float>(row.rope_position) * a.frequencies[i];
    const std::int64_t to = (static_cast<std::int64_t>(rope) * a.most_rows + b) * a.half_head + i % a.half_head;
    a.cosine[to] = cosf(angle) * a.scaling[rope];
    a.sine[to] = sinf(angle) * a.scaling[rope];
  }
}

template <DType kDType>
__global__ void __launch_bounds__(kThreads) add_norm_kernel(const AddNorm a) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  using F = Format<kDType>;
  float* const partials = dynamic_shared_memory<float>();
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * a.hidden_size;
  float* const x = a.residual + row;
  if (a.update) {
    const float* const update = a.update + row;
    float scale = 1;
    if (a.post.weight) {
      float squares = 0;
      for (int d = threadIdx.x; d < a.hidden_size; d += kThreads) squares += update[d] * update[d];
      scale = 1.0f / sqrtf(block_sum(squares, partials) / a.hidden_size + a.post.eps);
    }
    for (int d = threadIdx.x; d < a.hidden_size; d += kThreads) {
      x[d] += a.post.weight ? update[d] * scale * a.post.weight[d] : update[d];
    }
  }
  if (!a.norm.weight) return;
  float squares = 0;
  for (int d = threadIdx.x; d < a.hidden_size; d += kThreads) squares += x[d] * x[d];
  const float inverse = 1.0f / sqrtf(block_sum(squares, partials) / a.hidden_size + a.norm.eps);
  auto* const normed = static_cast<typename F::Element*>(a.normed) + row;
  for (int d = threadIdx.x; d < a.hidden_size; d += kThreads) normed[d] = F::narrow(x[d] * inverse * a.norm.weight[d]);
}

struct Best {
  float logit;
  int index;

  __device__ bool beats(const Best& other) const {
    const bool nan = isnan(logit), other_nan = isnan(other.logit);
    if (nan != other_nan) return nan;
    if (!nan && logit != other.logit) return logit > other.logit;
    return index < other.index;
  }
};

__global__ void __launch_bounds__(kArgmaxThreads) finish_kernel(float* logits, std::int64_t vocabulary, float softcap,
                                                                std::int64_t* likeliest) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  Best* const bests = dynamic_shared_memory<Best>();
  float* const own = logits + blockIdx.x * vocabulary;
  Best best{-INFINITY, static_cast<int>(vocabulary)};
  for (int v = threadIdx.x; v < vocabulary; v += kArgmaxThreads) {
    const float logit = softcap > 0 ? softcap * tanhf(own[v] / softcap) : own[v];
    if (softcap > 0) own[v] = logit;
    if (const Best found{logit, v}; found.beats(best)) best = found;
  }
  for (int step = kWarp / 2; step; step /= 2) {
    const Best other{__shfl_xor_sync(kAllLanes, best.logit, step), __shfl_xor_sync(kAllLanes, best.index, step)};
    if (other.beats(best)) best = other;
  }
  if (threadIdx.x % kWarp == 0) bests[threadIdx.x / kWarp] = best;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < kArgmaxThreads / kWarp; ++w) {
    if (bests[w].beats(best)) best = bests[w];
  }
  likeliest[blockIdx.x] = best.index;
}

__global__ void __launch_bounds__(kThreads) copy_heads_kernel(const std::byte* from, std::int64_t from_head,
                                                              std::int64_t from_position, std::byte* to,
                                                              std::int64_t to_head, int positions,
                                                              std::int64_t row_bytes) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const std::byte* const source = from + blockIdx.x * from_head;
  std::byte* const target = to + blockIdx.x * to_head;
  const int chunks = static_cast<int>(row_bytes / 16);
  for (int i = threadIdx.x; i < positions * chunks; i += kThreads) {
    const std::int64_t column = i % chunks * 16;
    *reinterpret_cast<uint4*>(target + i / chunks * row_bytes + column) =
        load_cached(source + i / chunks * from_position + column);
  }
}

template <class F>
cudaError_t with_dtype(DType dtype, F f) {
  if (dtype == DType::kFloat32) return f(std::integral_constant<DType, DType::kFloat32>{});
  if (dtype == DType::kBFloat16) return f(std::integral_constant<DType, DType::kBFloat16>{});
  return f(std::integral_constant<DType, DType::kFloat16>{});
}

}  // namespace

cudaError_t begin(cudaStream_t stream, DType dtype, const Begin& arguments, int batch) {
  return with_dtype(dtype, [&](auto kDType) {
    return launch(stream, static_cast<unsigned>(batch), kThreads, 0, begin_kernel<kDType>, arguments);
  });
}

cudaError_t add_norm(cudaStream_t stream, DType dtype, const AddNorm& arguments, int batch) {
  return with_dtype(dtype, [&](auto kDType) {
    return launch(stream, static_cast<unsigned>(batch), kThreads, kThreads / kWarp * sizeof(float),
                  add_norm_kernel<kDType>, arguments);
  });
}

cudaError_t finish(cudaStream_t stream, float* logits, std::int64_t vocabulary, float softcap, std::int64_t* likeliest,
                   int batch) {
  return launch(stream, static_cast<unsigned>(batch), kArgmaxThreads, kArgmaxThreads / kWarp * sizeof(Best),
                finish_kernel, logits, vocabulary, softcap, likeliest);
}

cudaError_t copy_heads(cudaStream_t stream, const void* from, std::int64_t from_head, std::int64_t from_position,
                       void* to, std::int64_t to_head, int heads, int positions, std::int64_t row_bytes) {
  return launch(stream, static_cast<unsigned>(heads), kThreads, 0, copy_heads_kernel,
                static_cast<const std::byte*>(from), from_head, from_position, static_cast<std::byte*>(to), to_head,
                positions, row_bytes);
}

}  // namespace dive::cuda
