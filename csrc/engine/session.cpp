#include "engine/session.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <exception>
#include <stdexcept>
#include <utility>

#include "engine/check.h"

namespace dive::engine {
namespace {

// Often enough for a keyboard interrupt to feel immediate, rarely enough to cost nothing.
constexpr std::chrono::milliseconds kPollInterval{50};

}  // namespace

// Asks the caller now and then whether to go on.
class Session::Poll {
 public:
  explicit Poll(const Callbacks& callbacks) : ask_(callbacks.poll) {}

  void operator()() {
    if (!ask_ || std::chrono::steady_clock::now() < next_) return;
    ask_();
    next_ = std::chrono::steady_clock::now() + kPollInterval;
  }

 private:
  const std::function<void()>& ask_;
  std::chrono::steady_clock::time_point next_ = std::chrono::steady_clock::now() + kPollInterval;
};

Session::Session(const Plan& plan, std::unique_ptr<Stepper> stepper, int max_rows)
    : plan_(plan), stepper_(std::move(stepper)), max_rows_(max_rows), pool_(plan, stepper_->memory()) {}

void Session::check_results(const Request& request) const {
  const int beams = request.search.beams;
  if (beams < 1 || beams > max_rows_) throw std::invalid_argument("submit: more beams than rows");
  if (request.streams.empty() || (beams > 1 && request.streams.size() > static_cast<std::size_t>(beams))) {
    throw std::invalid_argument("submit: one to `beams` results of a search");
  }
  if (!request.forced.empty() && (beams > 1 || request.streams.size() > 1)) {
    throw std::invalid_argument("submit: forced tokens are for a single result");
  }
  if (!std::isfinite(request.search.length_penalty))
    throw std::invalid_argument("submit: length_penalty is not finite");
  if (beams > 1 && request.stop) throw std::invalid_argument("submit: a search knows no stop strings");
  if (beams > 1 && candidates_of(request) + request.eos.size() > static_cast<std::size_t>(plan_.vocabulary)) {
    throw std::invalid_argument("submit: the vocabulary is too small for so many beams");
  }
}

std::int64_t Session::submit(Request given, const std::vector<PrefilledLayer>& layers) {
  check(plan_, given, layers);
  check_results(given);
  const auto request = std::make_shared<const Request>(std::move(given));
  KvCache prompt(pool_);
  prompt.fill(layers, request->prefilled);
  const std::int64_t first = static_cast<std::int64_t>(results_.size());
  std::vector<Result*> results;
  for (std::size_t i = 0; i < request->streams.size(); ++i) results.push_back(&results_.emplace_back());
  if (request->search.beams > 1) {
    waiting_.push_back(search_beams(plan_, request, prompt, std::move(results)));
    return first;
  }
  for (std::size_t i = 0; i < results.size(); ++i) {
    const std::int64_t number = first + static_cast<std::int64_t>(i);
    waiting_.push_back(sample_row(plan_, request, i, prompt, number, results[i], &told_));
  }
  return first;
}

void Session::run(const Callbacks& callbacks, int until_free) {
  Poll poll(callbacks);
  for (;;) {
    admit();
    if (active_.empty()) return;
    if (until_free > 0 && max_rows_ - rows_taken_ >= until_free) return;
    if (cancelled_.exchange(false, std::memory_order_relaxed)) {
      cancel_all();
      return;
    }
    if (loops()) {
      loop(callbacks, poll);
      continue;
    }
    step();
    // All rows take their token in before anyone is told, so that a callback that throws leaves nothing half done. The
    // order is kept: what is streamed of each step comes in the order of the requests.
    told_.clear();
    std::erase_if(active_, [this](const std::unique_ptr<Task>& task) {
      if (!task->advance()) return false;
      rows_taken_ -= task->most_rows();
      return true;
    });
    if (callbacks.token) {
      for (const auto& [number, token] : told_) callbacks.token(number, token);
    }
    poll();
  }
}

bool Session::loops() const {
  const auto loops = [](const std::unique_ptr<Task>& task) { return task->loops(); };
  return stepper_->most_loop_steps() > 0 && std::all_of(active_.begin(), active_.end(), loops);
}

// The device goes on by itself until a row has ended. A callback that throws ends the loop, and what the device has
// done until then is taken in, but nobody is told of it.
void Session::loop(const Callbacks& callbacks, Poll& poll) {
  std::int64_t steps = stepper_->most_loop_steps();
  for (const auto& task : active_) steps = std::min(steps, task->most_steps());
  std::vector<LoopRow> rows;
  for (const auto& task : active_) rows.push_back(task->loop_row(steps));
  std::vector<bool> ended(rows.size());
  std::exception_ptr thrown;
  const auto guarded = [&](auto&& call) {
    if (thrown) return;
    try {
      call();
    } catch (...) {
      thrown = std::current_exception();
    }
  };
  const auto taken = [&](const Choice* choices) {
    told_.clear();
    for (std::size_t i = 0; i < rows.size(); ++i) ended[i] = active_[i]->take(choices[i]);
    ++steps_;
    rows_run_ += static_cast<std::int64_t>(rows.size());
    if (!callbacks.token) return;
    guarded([&] {
      for (const auto& [number, token] : told_) callbacks.token(number, token);
    });
  };
  const auto wants_stop = [&] {
    guarded(poll);
    return thrown || cancelled_.load(std::memory_order_relaxed);
  };
  stepper_->loop(rows, static_cast<int>(steps), taken, wants_stop);
  std::size_t i = 0;
  std::erase_if(active_, [&](const std::unique_ptr<Task>& task) {
    if (!ended[i++]) return false;
    rows_taken_ -= task->most_rows();
    return true;
  });
  if (thrown) std::rethrow_exception(thrown);
}

void Session::admit() {
  while (!waiting_.empty() && rows_taken_ + waiting_.front()->most_rows() <= max_rows_) {
    rows_taken_ += waiting_.front()->most_rows();
    active_.push_back(std::move(waiting_.front()));
    waiting_.pop_front();
  }
}

void Session::step() {
  step_rows_.clear();
  owners_.clear();
  for (const auto& task : active_) {
    const std::size_t before = step_rows_.size();
    task->prepare(step_rows_);
    for (std::size_t i = before; i < step_rows_.size(); ++i) owners_.emplace_back(task.get(), i - before);
  }
  stepper_->step(step_rows_, [this](std::size_t b, float* logits, std::int64_t likeliest) {
    owners_[b].first->see(owners_[b].second, logits, likeliest);
  });
  ++steps_;
  rows_run_ += static_cast<std::int64_t>(step_rows_.size());
}

void Session::cancel_all() {
  for (const auto& task : active_) task->cancel();
  for (const auto& task : waiting_) task->cancel();
  active_.clear();
  waiting_.clear();
  rows_taken_ = 0;
}

Result Session::take(std::int64_t result) {
  if (result < 0 || result >= static_cast<std::int64_t>(results_.size())) {
    throw std::out_of_range("take: no such result");
  }
  Result& found = results_[result];
  // An unfinished one goes on from the tokens that it has.
  if (found.finish == Finish::kUnfinished) return found;
  return std::move(found);
}

}  // namespace dive::engine
