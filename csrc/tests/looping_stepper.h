// A device with a loop of its own, played by another stepper and the host's sampler: what a loop must do, in a few
// lines.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <unordered_set>
#include <utility>
#include <vector>

#include "engine/plan.h"
#include "engine/sampler.h"
#include "engine/stepper.h"

namespace random_decoder {

class LoopingStepper final : public dive::engine::Stepper {
 public:
  using Choice = dive::engine::Choice;
  using LoopRow = dive::engine::LoopRow;
  using StepRow = dive::engine::StepRow;

  LoopingStepper(const dive::engine::Plan& plan, std::unique_ptr<Stepper> inner, int most_steps)
      : vocabulary_(plan.vocabulary), inner_(std::move(inner)), most_steps_(most_steps) {}

  dive::engine::CacheMemory& memory() override { return inner_->memory(); }
  int most_loop_steps() const override { return most_steps_; }

  void step(const std::vector<StepRow>& rows,
            const std::function<void(std::size_t, float*, std::int64_t)>& with_logits) override {
    inner_->step(rows, with_logits);
  }

  void loop(const std::vector<LoopRow>& given, int steps, const std::function<void(const Choice*)>& taken,
            const std::function<bool()>& wants_stop) override {
    std::vector<StepRow> rows;
    std::vector<std::vector<std::int64_t>> seen;
    for (const LoopRow& row : given) {
      rows.push_back(row.row);
      seen.push_back(*row.seen);
    }
    for (std::int64_t step = 0; step < steps; ++step) {
      std::vector<Choice> choices(rows.size());
      inner_->step(rows, [&](std::size_t b, float* logits, std::int64_t likeliest) {
        static const std::vector<std::int64_t> none;
        const std::int64_t done = given[b].done + step;
        choices[b] = choose(*given[b].sampling, logits, vocabulary_, likeliest, seen[b],
                            done < given[b].barred ? *given[b].eos : none, done, given[b].wants_log_prob);
      });
      bool ended = false;
      for (std::size_t b = 0; b < rows.size(); ++b) {
        const std::int64_t token = choices[b].token;
        const auto& eos = *given[b].eos;
        rows[b].token = token;
        ++rows[b].position, ++rows[b].rope_position;
        if (std::find(seen[b].begin(), seen[b].end(), token) == seen[b].end()) seen[b].push_back(token);
        ended |= std::find(eos.begin(), eos.end(), token) != eos.end() || given[b].done + step + 1 == given[b].most;
      }
      taken(choices.data());
      if (ended || wants_stop()) return;
    }
  }

 private:
  const std::int64_t vocabulary_;
  const std::unique_ptr<Stepper> inner_;
  const int most_steps_;
};

}  // namespace random_decoder
