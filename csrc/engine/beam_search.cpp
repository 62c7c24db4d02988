// Beam search as transformers' `generate(num_beams=...)` does it: the same candidates, scores, heuristics and order.
#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "engine/task.h"

namespace dive::engine {
namespace {

// Ranks what is no hypothesis yet behind everything that is one.
constexpr float kUnfinishedScore = -1e9f;

struct Hypothesis {
  std::vector<std::int64_t> tokens;
  std::vector<float> log_probs;
  float score = 0;  // the sum of log-probabilities; of a finished one over tokens^length_penalty
  Finish finish = Finish::kUnfinished;
};

struct Candidate {
  std::size_t beam;
  std::int64_t token;
  float score, log_prob;  // the beam's with this token; the token's own, as the model gave it
};

bool better(const Candidate& a, const Candidate& b) {
  if (a.score != b.score) return a.score > b.score;
  return a.beam != b.beam ? a.beam < b.beam : a.token < b.token;
}

struct Beam {
  Hypothesis text;
  KvCache cache;
  SeenTokens seen;
  std::vector<Candidate> candidates;  // the best of the step, the best first
};

class BeamSearch final : public Task {
 public:
  BeamSearch(const Plan& plan, std::shared_ptr<const Request> request, const KvCache& prompt,
             std::vector<Result*> results)
      : vocabulary_(plan.vocabulary), request_(std::move(request)), results_(std::move(results)),
        finished_(request_->search.beams) {
    // Its beams would all be the same at first, so there is only one.
    beams_.push_back({{}, prompt, SeenTokens(*request_), {}});
    for (Hypothesis& empty : finished_) empty.score = kUnfinishedScore;
  }

  int most_rows() const override { return request_->search.beams; }

  void prepare(std::vector<StepRow>& rows) override {
    for (Beam& beam : beams_) {
      const std::int64_t position = request_->prefilled + tokens_;
      beam.cache.make_room(position);
      const std::int64_t token = tokens_ ? beam.text.tokens.back() : request_->prompt.back();
      rows.push_back({token, position, position + request_->rope_offset, &beam.cache, &request_->adapters});
    }
  }

  void see(std::size_t index, float* logits, std::int64_t likeliest) override {
    Beam& beam = beams_[index];
    const double lse = log_sum_exp(logits, vocabulary_, logits[likeliest]);
    for (std::int64_t v = 0; v < vocabulary_; ++v) logits[v] = static_cast<float>(logits[v] - lse);
    std::vector<std::pair<std::int64_t, float>> changed;
    const float penalty = request_->sampling.repetition_penalty;
    for (const std::int64_t token : beam.seen.tokens()) {
      changed.emplace_back(token, logits[token]);
      logits[token] = logits[token] < 0 ? logits[token] * penalty : logits[token] / penalty;
    }
    if (tokens_ < request_->min_new_tokens) {
      for (const std::int64_t token : request_->eos) logits[token] = -std::numeric_limits<float>::infinity();
    }
    choose_candidates(index, logits);
    for (Candidate& candidate : beam.candidates) {
      for (const auto& [token, log_prob] : changed) {
        if (token == candidate.token) candidate.log_prob = log_prob;
      }
    }
  }

  bool advance() override {
    std::vector<Candidate> candidates;
    for (const Beam& beam : beams_) candidates.insert(candidates.end(), beam.candidates.begin(), beam.candidates.end());
    std::sort(candidates.begin(), candidates.end(), better);
    candidates.resize(std::min<std::size_t>(candidates.size(), candidates_of(*request_)));
    ++tokens_;
    finish_some(candidates);
    const bool any = go_on(candidates);
    const float length = static_cast<float>(
        std::pow(request_->search.early == BeamOptions::Early::kNever && request_->search.length_penalty > 0
                     ? request_->max_new_tokens
                     : tokens_,
                 request_->search.length_penalty));
    // Where not all are finished, anything is better than the worst.
    if (any && full() && !(beams_.front().text.score / length > finished_.back().score)) improvable_ = false;
    if (any && improvable_ && !(full() && request_->search.early == BeamOptions::Early::kYes)) return false;
    give(Finish::kLength);
    return true;
  }

  void cancel() override {
    // Before its first step a search has fewer beams than results.
    for (Result* result : results_) result->finish = Finish::kCancelled;
    // What is finished first, then the best of what is not.
    std::erase_if(finished_, [](const Hypothesis& h) { return h.finish == Finish::kUnfinished; });
    for (const Beam& beam : beams_) finished_.push_back(beam.text);
    give(Finish::kCancelled);
  }

 private:
  bool is_eos(std::int64_t token) const {
    return std::find(request_->eos.begin(), request_->eos.end(), token) != request_->eos.end();
  }

  bool full() const {
    return std::all_of(finished_.begin(), finished_.end(),
                       [](const Hypothesis& h) { return h.finish != Finish::kUnfinished; });
  }

  void choose_candidates(std::size_t index, const float* log_probs) {
    Beam& beam = beams_[index];
    std::vector<Candidate>& best = beam.candidates;
    best.clear();
    const std::size_t wanted = candidates_of(*request_);
    for (std::int64_t v = 0; v < vocabulary_; ++v) {
      float score = beam.text.score + log_probs[v];
      if (std::isnan(score)) score = -std::numeric_limits<float>::infinity();
      if (best.size() == wanted && !(score > best.back().score)) continue;
      if (best.size() == wanted) best.pop_back();
      const Candidate found{index, v, score, log_probs[v]};
      best.insert(std::upper_bound(best.begin(), best.end(), found, better), found);
    }
  }

  // What a candidate becomes.
  Hypothesis extended(const Candidate& candidate) const {
    Hypothesis text = beams_[candidate.beam].text;
    text.tokens.push_back(candidate.token);
    if (request_->log_probs) text.log_probs.push_back(candidate.log_prob);
    text.score = candidate.score;
    return text;
  }

  // The candidates that end, of the best `beams`, join the finished ones where they are better.
  void finish_some(const std::vector<Candidate>& candidates) {
    if (!improvable_ || (full() && request_->search.early == BeamOptions::Early::kYes)) return;
    const float length = static_cast<float>(std::pow(tokens_, request_->search.length_penalty));
    const std::size_t count = std::min<std::size_t>(candidates.size(), request_->search.beams);
    for (std::size_t i = 0; i < count; ++i) {
      const bool eos = is_eos(candidates[i].token);
      if (!eos && tokens_ < request_->max_new_tokens) continue;
      Hypothesis text = extended(candidates[i]);
      text.score /= length;
      text.finish = eos ? Finish::kEos : Finish::kLength;
      finished_.insert(std::upper_bound(finished_.begin(), finished_.end(), text,
                                        [](const Hypothesis& a, const Hypothesis& b) { return a.score > b.score; }),
                       std::move(text));
      finished_.pop_back();
    }
  }

  // The best candidates that do not end are the next beams; false where all end.
  bool go_on(const std::vector<Candidate>& candidates) {
    if (tokens_ >= request_->max_new_tokens) return false;
    std::vector<Beam> next;
    for (const Candidate& candidate : candidates) {
      if (static_cast<int>(next.size()) == request_->search.beams) break;
      if (is_eos(candidate.token)) continue;
      const Beam& parent = beams_[candidate.beam];
      next.push_back({extended(candidate), parent.cache, parent.seen, {}});
      next.back().seen.add(candidate.token);
    }
    if (next.empty()) return false;
    beams_ = std::move(next);
    return true;
  }

  void give(Finish unfinished) {
    for (std::size_t i = 0; i < results_.size() && i < finished_.size(); ++i) {
      Hypothesis& text = finished_[i];
      *results_[i] = {std::move(text.tokens), std::move(text.log_probs),
                      text.finish == Finish::kUnfinished ? unfinished : text.finish};
    }
  }

  const std::int64_t vocabulary_;
  const std::shared_ptr<const Request> request_;
  const std::vector<Result*> results_;
  std::vector<Beam> beams_;           // the best first
  std::vector<Hypothesis> finished_;  // as many as beams, the best first
  std::int64_t tokens_ = 0;           // new ones of every beam
  bool improvable_ = true;            // by what still runs
};

}  // namespace

std::unique_ptr<Task> search_beams(const Plan& plan, std::shared_ptr<const Request> request, const KvCache& prompt,
                                   std::vector<Result*> results) {
  return std::make_unique<BeamSearch>(plan, std::move(request), prompt, std::move(results));
}

}  // namespace dive::engine
