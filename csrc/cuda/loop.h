// The host's side of a loop that the device runs by itself: what it is given at the start, and what it tells meanwhile.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <thread>
#include <vector>

#include "cuda/kernels.h"
#include "cuda/memory.h"
#include "engine/stepper.h"

namespace dive::cuda {

class Loop {
 public:
  // Blocks of the cache must be there before the loop starts: four more per row than are there, at the most.
  static constexpr int kMostSteps = 256;

  Loop(int most_rows, std::int64_t vocabulary)
      : most_rows_(most_rows), vocabulary_(vocabulary), choosers_(most_rows, "the loop's rows"),
        staged_choosers_(most_rows), state_(1, "the loop's state"), staged_state_(1),
        told_(std::size_t{kMostSteps} * most_rows), progress_(1), wanted_stop_(1) {}

  // Whether a loop of these rows needs memory that was not there before, in which case arguments() are other ones now.
  bool make_room(const std::vector<engine::LoopRow>& rows) {
    const auto penalized = [](const engine::LoopRow& row) { return row.sampling->repetition_penalty != 1.0f; };
    if (seen_.size() > 0 || std::none_of(rows.begin(), rows.end(), penalized)) return false;
    seen_ = DeviceArray<std::uint8_t>(most_rows_ * static_cast<std::size_t>(vocabulary_),
                                      "the tokens of a repetition penalty");
    return true;
  }

  // Puts the rows, and idle ones up to `batch`, where the device finds them.
  void start(cudaStream_t stream, const std::vector<engine::LoopRow>& rows, int batch, int steps) {
    for (int b = 0; b < batch; ++b) {
      const bool real = b < static_cast<int>(rows.size());
      staged_choosers_[b] = real ? chooser_of(rows[b]) : Chooser{};
      if (real && rows[b].sampling->repetition_penalty != 1.0f) mark_seen(stream, *rows[b].seen, b);
    }
    staged_state_[0] = {0, steps, 0};
    copy(stream, choosers_.data(), staged_choosers_.data(), batch * sizeof(Chooser));
    copy(stream, state_.data(), staged_state_.data(), sizeof(LoopState));
    progress_[0] = {0, 0};
    wanted_stop_[0] = 0;
  }

  Advance arguments(Row* rows, float* logits, const std::int64_t* likeliest, unsigned* ticket) const {
    return {.rows = rows,
            .choosers = choosers_.data(),
            .logits = logits,
            .vocabulary = vocabulary_,
            .likeliest = likeliest,
            .seen = seen_.data(),
            .told = told_.on_device(),
            .most_rows = most_rows_,
            .state = state_.data(),
            .ticket = ticket,
            .progress = progress_.on_device(),
            .wanted_stop = wanted_stop_.on_device(),
            .condition = 0,
            .has_condition = false};
  }

  // Starts the graph, again and again where it holds a single step, and passes on what the device tells. An OwnStream
  // and a Graph, or a test's, which is the device as slow as it can be.
  template <class Stream, class StepGraph>
  void run(const Stream& stream, const StepGraph& graph, bool repeats, int rows,
           const std::function<void(const engine::Choice*)>& taken, const std::function<bool()>& wants_stop) {
    std::vector<engine::Choice> choices(rows);
    graph.launch(stream);
    for (int told = 0, started = 1;;) {
      // In this order: of a device that was done before it was looked at, everything is seen.
      const bool idle = stream.idle();
      const std::int32_t steps = volatile_progress().steps;
      std::atomic_thread_fence(std::memory_order_acquire);
      const bool over = volatile_progress().over;
      for (; told < steps; ++told) {
        const Told* const of_rows = told_.data() + std::size_t(told) * most_rows_;
        for (int b = 0; b < rows; ++b) choices[b] = {of_rows[b].token, of_rows[b].log_prob};
        taken(choices.data());
      }
      // The last step is told behind `over`: where the device is not idle yet, it may not have been seen.
      if (over && idle) break;
      if (wants_stop()) stop();
      if (!idle) {
        std::this_thread::yield();
      } else if (repeats || told < started) {
        throw std::runtime_error("CUDA: the decoding loop ended before its time");
      } else {
        graph.launch(stream);
        ++started;
      }
    }
    stream.wait();
  }

 private:
  static Chooser chooser_of(const engine::LoopRow& row) {
    const engine::Sampling& s = *row.sampling;
    Chooser chooser{.temperature = s.temperature,
                    .top_p = s.top_p,
                    .min_p = s.min_p,
                    .repetition_penalty = s.repetition_penalty,
                    .top_k = s.top_k,
                    .seed = s.seed,
                    .stream = s.stream,
                    .done = row.done,
                    .barred = row.barred,
                    .most = row.most,
                    .eos = {},
                    .eos_count = static_cast<std::int32_t>(row.eos->size()),
                    .wants_log_prob = row.wants_log_prob};
    std::copy(row.eos->begin(), row.eos->end(), chooser.eos);
    return chooser;
  }

  void mark_seen(cudaStream_t stream, const std::vector<std::int64_t>& tokens, int b) {
    std::vector<std::uint8_t> marks(vocabulary_);
    for (const std::int64_t token : tokens) marks[token] = 1;
    copy(stream, seen_.data() + b * vocabulary_, marks.data(), marks.size());
    // The marks go.
    check(cudaStreamSynchronize(stream), "copying a loop's rows");
  }

  static void copy(cudaStream_t stream, void* to, const void* from, std::size_t bytes) {
    check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream), "copying a loop's rows");
  }

  const volatile Progress& volatile_progress() const { return *progress_.data(); }
  void stop() { *const_cast<volatile std::int32_t*>(wanted_stop_.data()) = 1; }

  const int most_rows_;
  const std::int64_t vocabulary_;
  DeviceArray<Chooser> choosers_;
  PinnedArray<Chooser> staged_choosers_;
  DeviceArray<LoopState> state_;
  PinnedArray<LoopState> staged_state_;
  DeviceArray<std::uint8_t> seen_;
  PinnedArray<Told> told_;  // [kMostSteps][most_rows]
  PinnedArray<Progress> progress_;
  PinnedArray<std::int32_t> wanted_stop_;
};

}  // namespace dive::cuda
