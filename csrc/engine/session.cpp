#include "engine/session.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "engine/check.h"

namespace dive::engine {
namespace {

// Often enough for a keyboard interrupt to feel immediate, rarely enough to cost nothing.
constexpr std::chrono::milliseconds kPollInterval{50};

void copy_heads(const Plan& plan, const void* from, std::int64_t head_stride, std::int64_t stride, std::int64_t count,
                void* to, std::int64_t to_head_stride) {
  const std::int64_t element = cpu::size_of(plan.cache_dtype), row = plan.head_size * element;
  for (int head = 0; head < plan.kv_heads; ++head) {
    const char* source = static_cast<const char*>(from) + head * head_stride * element;
    char* target = static_cast<char*>(to) + head * to_head_stride * element;
    for (std::int64_t i = 0; i < count; ++i) std::memcpy(target + i * row, source + i * stride * element, row);
  }
}

}  // namespace

struct Session::Row {
  std::int64_t number;
  Request request;
  KvCache cache;
  std::int64_t position, token;
  std::vector<std::int64_t> seen;  // distinct, kept only where a penalty needs them
  std::unordered_set<std::int64_t> seen_set;
  Choice choice{};

  Row(const Plan& plan, std::int64_t number, Request given)
      : number(number), request(std::move(given)),
        cache(plan, request.prefilled + request.max_new_tokens), position(request.prefilled),
        token(request.prompt.back()) {
    for (const std::int64_t t : request.prompt) note(t);
  }

  void note(std::int64_t t) {
    if (request.sampling.repetition_penalty != 1.0f && seen_set.insert(t).second) seen.push_back(t);
  }
};

Session::Session(const Plan& plan, std::unique_ptr<Stepper> stepper, int max_rows)
    : plan_(plan), stepper_(std::move(stepper)), max_rows_(max_rows) {}

Session::~Session() = default;

std::int64_t Session::submit(Request request, const std::vector<PrefilledLayer>& layers) {
  check(plan_, request, layers);
  const std::int64_t number = static_cast<std::int64_t>(results_.size());
  auto row = std::make_unique<Row>(plan_, number, std::move(request));
  for (std::size_t l = 0; row->request.prefilled > 0 && l < layers.size(); ++l) {
    const std::int64_t count = row->request.prefilled;
    copy_heads(plan_, layers[l].keys, layers[l].keys_head_stride, layers[l].keys_stride, count, row->cache.keys(l),
               row->cache.head_stride());
    copy_heads(plan_, layers[l].values, layers[l].values_head_stride, layers[l].values_stride, count,
               row->cache.values(l), row->cache.head_stride());
  }
  results_.emplace_back();
  waiting_.push_back(std::move(row));
  return number;
}

void Session::run(const Callbacks& callbacks, int until_free) {
  auto next_poll = std::chrono::steady_clock::now() + kPollInterval;
  for (;;) {
    admit();
    if (active_.empty()) return;
    if (until_free > 0 && max_rows_ - static_cast<int>(active_.size()) >= until_free) return;
    if (cancelled_.exchange(false, std::memory_order_relaxed)) {
      cancel_all();
      return;
    }
    step();
    // All rows take their token in before anyone is told, so that a callback that throws leaves nothing half done. The
    // order is kept: what is streamed of each step comes in the order of the requests.
    told_.clear();
    std::erase_if(active_, [&](const std::unique_ptr<Row>& row) { return advance(*row); });
    if (callbacks.token) {
      for (const auto& [request, token] : told_) callbacks.token(request, token);
    }
    if (callbacks.poll && std::chrono::steady_clock::now() >= next_poll) {
      callbacks.poll();
      next_poll = std::chrono::steady_clock::now() + kPollInterval;
    }
  }
}

void Session::admit() {
  while (static_cast<int>(active_.size()) < max_rows_ && !waiting_.empty()) {
    active_.push_back(std::move(waiting_.front()));
    waiting_.pop_front();
  }
}

void Session::step() {
  step_rows_.clear();
  for (const auto& row : active_) {
    step_rows_.push_back({row->token, row->position, row->position + row->request.rope_offset, &row->cache,
                          &row->request.adapters});
  }
  stepper_->step(step_rows_, [this](std::size_t b, float* logits, std::int64_t likeliest) {
    sample(*active_[b], logits, likeliest);
  });
  ++steps_;
  rows_run_ += static_cast<std::int64_t>(active_.size());
}

void Session::sample(Row& row, float* logits, std::int64_t likeliest) {
  const Request& request = row.request;
  const std::size_t done = results_[row.number].tokens.size();
  const bool forced = done < request.forced.size();
  if (forced && request.forced_logits) {
    std::copy_n(logits, plan_.vocabulary, request.forced_logits + static_cast<std::int64_t>(done) * plan_.vocabulary);
  }
  static const std::vector<std::int64_t> none;
  const bool too_short = static_cast<std::int64_t>(done) < request.min_new_tokens;
  if (forced) {
    row.choice = {request.forced[done], 0.0f};
  } else {
    row.choice = choose(request.sampling, logits, plan_.vocabulary, likeliest, row.seen,
                        too_short ? request.eos : none, done, request.log_probs);
  }
}

// Takes the row's choice in; true where the row has ended.
bool Session::advance(Row& row) {
  const Request& request = row.request;
  Result& result = results_[row.number];
  const std::int64_t token = row.choice.token;
  result.tokens.push_back(token);
  if (request.log_probs) result.log_probs.push_back(row.choice.log_prob);
  row.note(token);
  row.token = token;
  ++row.position;
  const std::size_t done = result.tokens.size();
  if (done > request.forced.size() && std::find(request.eos.begin(), request.eos.end(), token) != request.eos.end()) {
    result.finish = Finish::kEos;
  } else if (static_cast<std::int64_t>(done) >= request.max_new_tokens) {
    result.finish = Finish::kLength;
  }
  told_.emplace_back(row.number, token);
  return result.finish != Finish::kUnfinished;
}

void Session::cancel_all() {
  for (const auto& row : active_) results_[row->number].finish = Finish::kCancelled;
  for (const auto& row : waiting_) results_[row->number].finish = Finish::kCancelled;
  active_.clear();
  waiting_.clear();
}

Result Session::take(std::int64_t request) {
  if (request < 0 || request >= static_cast<std::int64_t>(results_.size())) {
    throw std::out_of_range("take: no such request");
  }
  Result& result = results_[request];
  // An unfinished one goes on from the tokens that it has.
  if (result.finish == Finish::kUnfinished) return result;
  return std::move(result);
}

}  // namespace dive::engine
