#include "cpu/linear_cross_entropy.h"

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/features.h"
#include "cpu/linear_cross_entropy_kernel.h"
#include "cpu/thread_pool.h"

namespace dive::cpu {
namespace {

std::int64_t round_up(std::int64_t n, std::int64_t unit) { return (n + unit - 1) / unit * unit; }

std::int64_t teacher_row(const LinearCrossEntropy& problem, std::int64_t n) {
  return problem.teacher_rows == nullptr ? n : problem.teacher_rows[n];
}

void require(bool holds, const char* message) {
  if (!holds) throw std::invalid_argument(std::string("linear_cross_entropy: ") + message);
}

void check(const LinearCrossEntropy& p) {
  require(p.rows_counted >= 0 && p.hidden_size > 0 && p.vocabulary > 0, "expected N >= 0, D > 0 and V > 0");
  require(p.vocabulary <= std::numeric_limits<std::int32_t>::max(), "expected V < 2^31");
  require(p.threads > 0, "expected threads > 0");
  require(p.hidden.data != nullptr && p.weight.data != nullptr, "expected hidden states and a weight");
  const bool statistics = p.tail_mean_weight != nullptr;
  const bool online = p.teacher_hidden.data != nullptr;
  require(!statistics || (p.tail_mass != nullptr && p.tail_negative_entropy != nullptr), "incomplete statistics");
  require(p.top_count == 0 || (p.top_indices != nullptr && p.top_log_probs != nullptr), "incomplete statistics");
  require(!(statistics && online), "expected one teacher");
  require(!(statistics && p.softcap != 0), "expected no softcap with a teacher's statistics");
  require(!online || p.teacher_hidden.dtype == p.hidden.dtype, "expected teacher and hidden of one dtype");
  require(p.kl == nullptr || statistics || online, "expected a teacher with kl");
  for (std::int64_t n = 0; n < p.rows_counted; ++n) {
    require(p.targets[n] >= 0 && p.targets[n] < p.vocabulary, "expected targets in [0, V)");
    if (!statistics) continue;
    const std::int32_t* top = p.top_indices + teacher_row(p, n) * p.top_count;
    for (std::int64_t i = 0; i < p.top_count; ++i) {
      require(top[i] >= 0 && top[i] < p.vocabulary, "expected top_indices in [0, V)");
    }
  }
}

// Uninitialised memory on huge pages where the system gives them: kernels walk through tens of megabytes.
class Memory {
 public:
  explicit Memory(std::int64_t bytes) {
    constexpr std::int64_t kHugePage = 2 << 20;
    const std::int64_t alignment = bytes >= kHugePage ? kHugePage : 64;
    const std::int64_t size = round_up(std::max<std::int64_t>(bytes, 1), alignment);
    data_.reset(std::aligned_alloc(static_cast<std::size_t>(alignment), static_cast<std::size_t>(size)));
    if (data_ == nullptr) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
    if (alignment == kHugePage) madvise(data_.get(), static_cast<std::size_t>(size), MADV_HUGEPAGE);
#endif
  }
  float* floats() const { return static_cast<float*>(data_.get()); }
  void* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> data_;
};

// RowSums and the memory behind it.
class OwnedSums {
 public:
  explicit OwnedSums(std::int64_t rows) : floats_(3 * rows), doubles_(6 * rows), integers_(rows) {
    float* f = floats_.data();
    double* d = doubles_.data();
    sums = {
        f,           d, d + rows, d + 2 * rows, integers_.data(), f + rows, d + 3 * rows, f + 2 * rows, d + 4 * rows,
        d + 5 * rows};
  }
  RowSums sums;

 private:
  std::vector<float> floats_;
  std::vector<double> doubles_;
  std::vector<std::int32_t> integers_;
};

// A row's sums over the whole vocabulary, from those of the slices in their order.
struct Merged {
  float max = -std::numeric_limits<float>::infinity();
  float teacher_max = max;
  double sum = 0, centred = 0, weighted_logits = 0, top_logits = 0, teacher_sum = 0, cross = 0;
  std::int32_t best = -1;
  float target_logit = 0;
};

class Run {
 public:
  explicit Run(const LinearCrossEntropy& problem);
  void chunk(std::int64_t first, std::int64_t count);
  std::int64_t chunk_rows() const { return chunk_rows_; }

 private:
  void collect_marks();
  Merged merge(int row) const;
  void finish_row(int row);
  double cached_kl(std::int64_t n, double lse, double top_logits) const;
  void take_marks();

  const LinearCrossEntropy& p_;
  Blocking blocking_;
  bool online_, statistics_, wants_gradient_;
  std::int64_t chunk_rows_;
  double class_weight_sum_;
  Chunk chunk_;
  std::unique_ptr<Memory> states_;
  std::vector<float> max_, p_share_, smoothing_share_, teacher_max_, q_share_, target_share_;
  std::vector<Mark> marks_;
  std::vector<Slice> slices_;
  std::vector<OwnedSums> sums_;
  std::vector<Memory> memory_;
};

Run::Run(const LinearCrossEntropy& problem)
    : p_(problem), blocking_(DIVE_DISPATCH(p_.isa, blocking, p_)), online_(p_.teacher_hidden.data != nullptr),
      statistics_(p_.tail_mean_weight != nullptr), wants_gradient_(p_.gradient != nullptr),
      class_weight_sum_(static_cast<double>(p_.vocabulary)) {
  if (p_.class_weights != nullptr) {
    class_weight_sum_ = 0;
    for (std::int64_t v = 0; v < p_.vocabulary; ++v) class_weight_sum_ += static_cast<double>(p_.class_weights[v]);
  }
  const std::int64_t panel = blocking_.panel;
  const std::int64_t states = online_ ? 2 : 1;
  const std::int64_t row_bytes = 4 * p_.vocabulary * states;
  std::int64_t limit = blocking_.most_rows;
  if (wants_gradient_) limit = std::min(limit, p_.max_workspace_bytes / row_bytes);
  limit = std::max(panel, limit / panel * panel);
  // Even chunks: a short last one would read the weight for few rows.
  const std::int64_t chunks = (p_.rows_counted + limit - 1) / limit;
  chunk_rows_ = round_up((p_.rows_counted + chunks - 1) / chunks, panel);

  chunk_ = {};
  chunk_.problem = &p_;
  chunk_.pairs = blocking_.pairs;
  chunk_.depth = blocking_.depth;
  states_ = std::make_unique<Memory>(4 * states * chunk_rows_ * chunk_.depth);
  chunk_.states = states_->get();
  for (std::vector<float>* column : {&max_, &p_share_, &smoothing_share_, &teacher_max_, &q_share_, &target_share_}) {
    column->resize(static_cast<std::size_t>(chunk_rows_));
  }
  chunk_.max = max_.data();
  chunk_.p_share = p_share_.data();
  chunk_.smoothing_share = smoothing_share_.data();
  chunk_.teacher_max = teacher_max_.data();
  chunk_.q_share = q_share_.data();

  const std::int64_t height = round_up((p_.vocabulary + p_.threads - 1) / p_.threads, blocking_.tile);
  for (std::int64_t begin = 0; begin < p_.vocabulary; begin += height) {
    Slice slice{};
    slice.begin = begin;
    slice.end = std::min(begin + height, p_.vocabulary);
    const std::int64_t kept = wants_gradient_ ? round_up(slice.end - begin, blocking_.tile) : blocking_.block;
    slice.logits = memory_.emplace_back(4 * kept * states * chunk_rows_).floats();
    slice.scratch = memory_.emplace_back(4 * (blocking_.slice_floats + blocking_.block * chunk_rows_)).floats();
    if (wants_gradient_) slice.gradient = memory_.emplace_back(4 * blocking_.width * chunk_rows_).floats();
    slice.sums = sums_.emplace_back(chunk_rows_).sums;
    slices_.push_back(slice);
  }
}

void Run::chunk(std::int64_t first, std::int64_t count) {
  chunk_.first = first;
  chunk_.count = static_cast<int>(count);
  chunk_.rows = static_cast<int>(round_up(count, blocking_.panel));
  collect_marks();
  const int threads = static_cast<int>(slices_.size());
  const int panels = chunk_.rows / blocking_.panel * (online_ ? 2 : 1);
  parallel(threads, [&](int i) {
    DIVE_DISPATCH(p_.isa, pack_states, chunk_, panels * i / threads, panels * (i + 1) / threads);
  });
  parallel(threads, [&](int i) {
    DIVE_DISPATCH(p_.isa, sum_slice, chunk_, slices_[static_cast<std::size_t>(i)], wants_gradient_);
  });
  for (int row = 0; row < chunk_.count; ++row) finish_row(row);
  if (!wants_gradient_) return;
  for (int row = chunk_.count; row < chunk_.rows; ++row) {
    const auto m = static_cast<std::size_t>(row);
    max_[m] = p_share_[m] = smoothing_share_[m] = teacher_max_[m] = q_share_[m] = 0;
  }
  take_marks();
  parallel(threads,
           [&](int i) { DIVE_DISPATCH(p_.isa, differentiate_slice, chunk_, slices_[static_cast<std::size_t>(i)]); });
  parallel(threads, [&](int i) {
    const int begin = chunk_.count * i / threads;
    const int end = chunk_.count * (i + 1) / threads;
    DIVE_DISPATCH(p_.isa, write_gradient, chunk_, slices_.data(), threads, begin, end);
  });
}

// The chunk's marks, sorted by token, and each slice's part of them.
void Run::collect_marks() {
  marks_.clear();
  for (int row = 0; row < chunk_.count; ++row) {
    const std::int64_t n = chunk_.first + row;
    marks_.push_back({static_cast<std::int32_t>(p_.targets[n]), row, 0, 0, true});
    if (!statistics_) continue;
    const std::int64_t begin = teacher_row(p_, n) * p_.top_count;
    for (std::int64_t i = begin; i < begin + p_.top_count; ++i) {
      const float q = std::exp(p_.top_log_probs[i]);
      if (q != 0) marks_.push_back({p_.top_indices[i], row, q, 0, false});
    }
  }
  const auto before = [](const Mark& a, const Mark& b) { return a.token < b.token; };
  std::stable_sort(marks_.begin(), marks_.end(), before);
  const Mark* next = marks_.data();
  const Mark* end = next + marks_.size();
  for (Slice& slice : slices_) {
    slice.marks = next;
    next = std::find_if(next, end, [&](const Mark& mark) { return mark.token >= slice.end; });
    slice.mark_count = next - slice.marks;
  }
}

Merged Run::merge(int row) const {
  Merged all;
  for (const Slice& slice : slices_) {
    const RowSums& s = slice.sums;
    if (s.max[row] > all.max) {
      all.max = s.max[row];
      all.best = s.best[row];
    }
    all.teacher_max = std::max(all.teacher_max, s.teacher_max[row]);
  }
  for (const Slice& slice : slices_) {
    const RowSums& s = slice.sums;
    const double shift = static_cast<double>(s.max[row]) - static_cast<double>(all.max);
    const double scale = std::exp(shift);
    all.sum += scale * s.sum[row];
    all.centred += scale * (s.centred[row] + s.sum[row] * shift);
    all.weighted_logits += s.weighted_logits[row];
    all.top_logits += s.top_logits[row];
    all.target_logit += s.target_logit[row];
    const double teacher_shift = static_cast<double>(s.teacher_max[row]) - static_cast<double>(all.teacher_max);
    const double teacher_scale = std::exp(teacher_shift);
    all.cross += teacher_scale * (s.cross[row] + s.teacher_sum[row] * (teacher_shift - shift));
    all.teacher_sum += teacher_scale * s.teacher_sum[row];
  }
  return all;
}

void Run::finish_row(int row) {
  const auto m = static_cast<std::size_t>(row);
  const std::int64_t n = chunk_.first + row;
  const Merged all = merge(row);
  const double vocabulary = static_cast<double>(p_.vocabulary);
  const double log_sum = std::log(all.sum);
  const double lse = static_cast<double>(all.max) + log_sum;
  const double nll = static_cast<double>(all.max) - static_cast<double>(all.target_logit) + log_sum;
  double target_weight = 1 - p_.label_smoothing;
  if (p_.class_weights != nullptr) target_weight *= static_cast<double>(p_.class_weights[p_.targets[n]]);
  double ce = target_weight * nll;
  if (p_.label_smoothing != 0) {
    ce += p_.label_smoothing / vocabulary * (class_weight_sum_ * lse - all.weighted_logits);
  }
  if (p_.z_loss != 0) ce += p_.z_loss * lse * lse;
  const auto put = [&](float* column, double value) {
    if (column != nullptr) column[n] = static_cast<float>(value);
  };
  put(p_.ce, ce);
  put(p_.lse, lse);
  put(p_.log_prob, -nll);
  put(p_.entropy, log_sum - all.centred / all.sum);
  if (p_.correct != nullptr) p_.correct[n] = all.best == p_.targets[n];
  if (online_) put(p_.kl, all.cross / all.teacher_sum - (std::log(all.teacher_sum) - log_sum));
  if (statistics_) put(p_.kl, cached_kl(n, lse, all.top_logits));
  if (!wants_gradient_) return;

  const double ce_share = p_.ce_share == nullptr ? 0 : static_cast<double>(p_.ce_share[n]);
  const double kl_share = p_.kl_share == nullptr ? 0 : static_cast<double>(p_.kl_share[n]);
  const double smoothing = ce_share * p_.label_smoothing / vocabulary;
  const double p_share = ce_share * (target_weight + 2 * p_.z_loss * lse) + smoothing * class_weight_sum_ + kl_share;
  max_[m] = all.max;
  p_share_[m] = static_cast<float>(p_share / all.sum);
  smoothing_share_[m] = static_cast<float>(smoothing);
  teacher_max_[m] = all.teacher_max;
  q_share_[m] = static_cast<float>(kl_share / all.teacher_sum);
  double slope = 1;
  if (p_.softcap != 0) {
    const double ratio = static_cast<double>(all.target_logit) / p_.softcap;
    slope -= ratio * ratio;
  }
  target_share_[m] = static_cast<float>(ce_share * target_weight * slope);
}

double Run::cached_kl(std::int64_t n, double lse, double top_logits) const {
  const std::int64_t u = teacher_row(p_, n);
  double kl = static_cast<double>(p_.tail_negative_entropy[u]) - top_logits;
  kl += static_cast<double>(p_.tail_mass[u]) * lse;
  for (std::int64_t i = u * p_.top_count; i < (u + 1) * p_.top_count; ++i) {
    const auto q = static_cast<double>(std::exp(p_.top_log_probs[i]));
    if (q != 0) kl += q * (static_cast<double>(p_.top_log_probs[i]) + lse);
  }
  return kl - DIVE_DISPATCH(p_.isa, tail_product, chunk_, n);
}

void Run::take_marks() {
  for (Mark& mark : marks_) {
    const float kl_share = p_.kl_share == nullptr ? 0.0f : p_.kl_share[chunk_.first + mark.row];
    mark.share = mark.is_target ? target_share_[static_cast<std::size_t>(mark.row)] : kl_share * mark.q;
  }
}

}  // namespace

Isa quickest_isa(DType hidden, DType weight) {
  const bool in_pairs = hidden == DType::kBFloat16 && weight == DType::kBFloat16;
  const Isa best = best_isa();
  return best == Isa::kAvx512Bf16 && in_pairs && !features().bf16_pairs_are_quick ? Isa::kAvx512 : best;
}

void linear_cross_entropy(const LinearCrossEntropy& problem) {
  check(problem);
  if (problem.rows_counted == 0) return;
  Run run(problem);
  for (std::int64_t first = 0; first < problem.rows_counted; first += run.chunk_rows()) {
    run.chunk(first, std::min(run.chunk_rows(), problem.rows_counted - first));
  }
}

}  // namespace dive::cpu
