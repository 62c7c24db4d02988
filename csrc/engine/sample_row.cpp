#include <algorithm>
#include <utility>

#include "engine/task.h"

namespace dive::engine {
namespace {

class SampledRow final : public Task {
 public:
  SampledRow(const Plan& plan, std::shared_ptr<const Request> request, std::size_t stream, const KvCache& prompt,
             std::int64_t number, Result* result, Told* told)
      : vocabulary_(plan.vocabulary), request_(std::move(request)), sampling_(request_->sampling), cache_(prompt),
        position_(request_->prefilled), token_(request_->prompt.back()), seen_(*request_), stop_(request_->stop.get()),
        number_(number), result_(result), told_(told) {
    sampling_.stream = request_->streams[stream];
  }

  int most_rows() const override { return 1; }

  void prepare(std::vector<StepRow>& rows) override {
    cache_.make_room(position_);
    rows.push_back(row());
  }

  void see(std::size_t, float* logits, std::int64_t likeliest) override {
    static const std::vector<std::int64_t> none;
    const std::size_t done = result_->tokens.size();
    if (done < request_->forced.size()) {
      if (request_->forced_logits) {
        std::copy_n(logits, vocabulary_, request_->forced_logits + static_cast<std::int64_t>(done) * vocabulary_);
      }
      choice_ = {request_->forced[done], 0.0f};
    } else {
      const bool too_short = static_cast<std::int64_t>(done) < request_->min_new_tokens;
      choice_ = choose(sampling_, logits, vocabulary_, likeliest, seen_.tokens(), too_short ? request_->eos : none,
                       done, request_->log_probs);
    }
  }

  bool advance() override {
    token_ = choice_.token;
    ++position_;
    seen_.add(token_);
    result_->tokens.push_back(token_);
    if (request_->log_probs) result_->log_probs.push_back(choice_.log_prob);
    const auto& eos = request_->eos;
    const bool stopped = stop_.add(token_), forced = result_->tokens.size() <= request_->forced.size();
    if (!forced && std::find(eos.begin(), eos.end(), token_) != eos.end()) {
      result_->finish = Finish::kEos;
    } else if (!forced && stopped) {
      result_->finish = Finish::kStop;
    } else if (static_cast<std::int64_t>(result_->tokens.size()) >= request_->max_new_tokens) {
      result_->finish = Finish::kLength;
    }
    told_->emplace_back(number_, token_);
    return result_->finish != Finish::kUnfinished;
  }

  bool loops() const override {
    const bool forced = result_->tokens.size() < request_->forced.size();
    return !request_->stop && !forced && request_->eos.size() <= kMostLoopEos;
  }

  std::int64_t most_steps() const override {
    return request_->max_new_tokens - static_cast<std::int64_t>(result_->tokens.size());
  }

  LoopRow loop_row(std::int64_t steps) override {
    cache_.make_room(position_, steps);
    return {row(),
            &sampling_,
            &seen_.tokens(),
            &request_->eos,
            static_cast<std::int64_t>(result_->tokens.size()),
            request_->min_new_tokens,
            request_->max_new_tokens,
            request_->log_probs};
  }

  bool take(const Choice& choice) override {
    choice_ = choice;
    return advance();
  }

  void cancel() override { result_->finish = Finish::kCancelled; }

 private:
  StepRow row() const { return {token_, position_, position_ + request_->rope_offset, &cache_, &request_->adapters}; }

  const std::int64_t vocabulary_;
  const std::shared_ptr<const Request> request_;
  Sampling sampling_;
  KvCache cache_;
  std::int64_t position_, token_;
  SeenTokens seen_;
  StopMatcher stop_;
  Choice choice_{};
  const std::int64_t number_;
  Result* const result_;
  Told* const told_;
};

}  // namespace

std::unique_ptr<Task> sample_row(const Plan& plan, std::shared_ptr<const Request> request, std::size_t stream,
                                 const KvCache& prompt, std::int64_t number, Result* result, Told* told) {
  return std::make_unique<SampledRow>(plan, std::move(request), stream, prompt, number, result, told);
}

}  // namespace dive::engine
