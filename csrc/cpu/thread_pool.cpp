#include "cpu/thread_pool.h"

#include <dlfcn.h>
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include "cpu/spin.h"

namespace dive::cpu {
namespace {

// A step of decoding is hundreds of calls a few microseconds apart, and waking a sleeping thread takes tens of
// microseconds; so a worker looks out for the next call this many times before it sleeps (about 50 microseconds).
constexpr int kLooks = 2000;

class Pool {
 public:
  void run(int threads, const std::function<void(int)>& task) {
    const std::lock_guard<std::mutex> turn(turn_);
    grow(threads - 1);
    task_ = &task;
    remaining_.store(threads - 1, std::memory_order_relaxed);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      participants_ = threads - 1;
      call_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    task(0);
    for (int looks = 0; remaining_.load(std::memory_order_acquire) != 0; ++looks) {
      if (looks < kLooks) {
        pause();
      } else {
        std::this_thread::yield();
      }
    }
  }

 private:
  void grow(int workers) {
    while (static_cast<int>(workers_.size()) < workers) {
      const int index = static_cast<int>(workers_.size());
      workers_.emplace_back([this, index, seen = call_.load()] { work(index, seen); });
    }
  }

  void work(int index, unsigned seen) {
    for (;;) {
      for (int looks = 0; looks < kLooks && call_.load(std::memory_order_acquire) == seen; ++looks) pause();
      int participants;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return call_.load(std::memory_order_relaxed) != seen; });
        seen = call_.load(std::memory_order_relaxed);
        participants = participants_;
      }
      if (index < participants) {
        (*task_)(index + 1);
        remaining_.fetch_sub(1, std::memory_order_release);
      }
    }
  }

  std::mutex turn_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<unsigned> call_{0};
  std::atomic<int> remaining_{0};
  int participants_ = 0;
  const std::function<void(int)>* task_ = nullptr;
  std::vector<std::thread> workers_;
};

// Never destroyed: its threads may outlive main(). A forked child has the object but not the threads, so it makes a
// pool of its own.
Pool& pool() {
  static std::mutex mutex;
  static Pool* instance = nullptr;
  static pid_t owner = 0;
  const std::lock_guard<std::mutex> lock(mutex);
  if (instance == nullptr || owner != getpid()) {
    instance = new Pool;
    owner = getpid();
  }
  return *instance;
}

// The entry point of OpenMP runtimes for a parallel region compiled by GCC (GNU's, LLVM's and Intel's have it).
using OpenMpParallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);

const pid_t loaded_in = getpid();

using OpenMpNumber = int (*)();

// Looked up in the process until it is there: torch may be imported after this library. Not for a forked child: GNU's
// runtime would wait there for threads that stayed with the parent.
template <class Function>
Function openmp(const char* name, std::atomic<Function>& found) {
  if (getpid() != loaded_in) return nullptr;
  Function entry = found.load(std::memory_order_acquire);
  if (entry == nullptr) {
    entry = reinterpret_cast<Function>(dlsym(RTLD_DEFAULT, name));
    found.store(entry, std::memory_order_release);
  }
  return entry;
}

OpenMpParallel openmp_parallel() {
  static std::atomic<OpenMpParallel> found{nullptr};
  return openmp("GOMP_parallel", found);
}

OpenMpNumber openmp_team_size() {
  static std::atomic<OpenMpNumber> found{nullptr};
  return openmp("omp_get_num_threads", found);
}

OpenMpNumber openmp_thread_index() {
  static std::atomic<OpenMpNumber> found{nullptr};
  return openmp("omp_get_thread_num", found);
}

struct Shared {
  const std::function<void(int)>* task;
  int threads;
  std::atomic<int> next{0};
};

// A runtime may give fewer threads than it was asked for, so tasks are taken, not dealt.
void take_tasks(void* data) {
  Shared& shared = *static_cast<Shared*>(data);
  for (int i = shared.next.fetch_add(1); i < shared.threads; i = shared.next.fetch_add(1)) (*shared.task)(i);
}

struct Team {
  const std::function<void(int)>* task;
  int threads;
  OpenMpNumber size, index;
  std::atomic<bool> whole{false};
};

// Every member its own task, or none at all where members are missing: who waits for the others would wait for ever.
void take_own_task(void* data) {
  Team& team = *static_cast<Team*>(data);
  if (team.size() != team.threads) return;
  team.whole.store(true, std::memory_order_relaxed);
  (*team.task)(team.index());
}

}  // namespace

void parallel(int threads, const std::function<void(int)>& task) {
  if (threads <= 1) {
    task(0);
  } else if (const OpenMpParallel run = openmp_parallel()) {
    Shared shared{&task, threads};
    run(take_tasks, &shared, static_cast<unsigned>(threads), 0);
  } else {
    pool().run(threads, task);
  }
}

void parallel_together(int threads, const std::function<void(int)>& task) {
  if (threads <= 1) {
    task(0);
    return;
  }
  if (const OpenMpParallel run = openmp_parallel()) {
    Team team{&task, threads, openmp_team_size(), openmp_thread_index()};
    if (team.size && team.index) {
      run(take_own_task, &team, static_cast<unsigned>(threads), 0);
      if (team.whole.load(std::memory_order_relaxed)) return;
    }
  }
  pool().run(threads, task);
}

}  // namespace dive::cpu
