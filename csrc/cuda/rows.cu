// What happens to rows between the products: embedding and angles, residual add and norm, the end of the logits; and
// the copying of prompts' keys and values into cache blocks.
#include <algorithm>
#include <type_traits>

#include "cuda/device_math.cuh"
#include "cuda/launch.h"

namespace dive::cuda {
namespace {

constexpr int kThreads = 256;

template <DType kDType>
__global__ void __launch_bounds__(kThreads) begin_kernel(const Begin a) {
  take_turn();
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
  take_turn();
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

__global__ void __launch_bounds__(kThreads) finish_kernel(const Finish a) {
  take_turn();
  Best* const bests = dynamic_shared_memory<Best>();
  unsigned* const word = reinterpret_cast<unsigned*>(bests + kThreads / kWarp);
  const int pieces = gridDim.x, b = blockIdx.y, V = static_cast<int>(a.vocabulary);
  const int size = (V + pieces - 1) / pieces, first = blockIdx.x * size, end = min(V, first + size);
  float* const own = a.logits + b * a.vocabulary;
  Best best{-INFINITY, V};
  for (int v = first + threadIdx.x; v < end; v += kThreads) {
    const float logit = a.softcap > 0 ? a.softcap * tanhf(own[v] / a.softcap) : own[v];
    if (a.softcap > 0) own[v] = logit;
    if (const Best found{logit, v}; beats(found, best)) best = found;
  }
  best = best_of_block(best, bests);
  Best* const all = a.pieces + b * kMostVocabularyPieces;
  if (threadIdx.x == 0) all[blockIdx.x] = best;
  if (!comes_last(a.tickets + b, pieces, word) || threadIdx.x != 0) return;
  best = all[0];
  for (int p = 1; p < pieces; ++p) {
    if (beats(all[p], best)) best = all[p];
  }
  a.likeliest[b] = best.index;
}

__global__ void __launch_bounds__(kThreads) copy_heads_kernel(const engine::HeadsCopy* copies, std::int64_t row_bytes) {
  take_turn();
  const engine::HeadsCopy copy = copies[blockIdx.x];
  const std::byte* const from = copy.from + blockIdx.y * copy.from_head;
  std::byte* const to = copy.to + blockIdx.y * copy.to_head;
  const int chunks = static_cast<int>(row_bytes / 16), count = static_cast<int>(copy.positions) * chunks;
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const std::int64_t column = i % chunks * 16;
    *reinterpret_cast<uint4*>(to + i / chunks * row_bytes + column) =
        load_cached(from + i / chunks * copy.from_position + column);
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

cudaError_t finish(cudaStream_t stream, const Finish& arguments, int batch) {
  // 16 logits of each thread keep enough reads under way; fewer would leave more to bring together than to look at.
  const std::int64_t wanted = (arguments.vocabulary + 16 * kThreads - 1) / (16 * kThreads);
  const dim3 grid(static_cast<unsigned>(std::min<std::int64_t>(wanted, kMostVocabularyPieces)), batch);
  const std::size_t bytes = kThreads / kWarp * sizeof(Best) + sizeof(unsigned);
  return launch(stream, grid, kThreads, bytes, finish_kernel, arguments);
}

cudaError_t copy_heads(cudaStream_t stream, const engine::HeadsCopy* copies, int count, int heads,
                       std::int64_t row_bytes) {
  const dim3 grid(static_cast<unsigned>(count), static_cast<unsigned>(heads));
  return launch(stream, grid, kThreads, 0, copy_heads_kernel, copies, row_bytes);
}

}  // namespace dive::cuda
