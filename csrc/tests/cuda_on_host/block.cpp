#include "block.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "fiber.h"

extern "C" {
__attribute__((weak)) void __tsan_acquire(void*);
__attribute__((weak)) void __tsan_release(void*);
}

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace dive_host_cuda {
namespace {

constexpr unsigned kWarp = 32;
constexpr unsigned kThreads = 1024;  // the most that a block has

// What others did before they released an object happened before what follows its acquisition: for the thread
// sanitizer, which knows of no order between fibers but this. A meeting place has two, used by turns, as who is quick
// may be at the next meeting while others have yet to leave this one.
struct Order {
  char objects[2];
  void release(unsigned turn) {
    if (__tsan_release) __tsan_release(&objects[turn % 2]);
  }
  void acquire(unsigned turn) {
    if (__tsan_acquire) __tsan_acquire(&objects[turn % 2]);
  }
};

struct Warp {
  unsigned lanes, arrived, exited, turn;
  Place place{""};
  Order order;
  // Volatile, or the compiler might copy them by a call of memcpy, in which the thread sanitizer would see a race.
  volatile std::uint64_t words[2][kWarp][kGatherWords];
};

struct Thread {
  Fiber fiber;
  uint3 index;
  Warp* warp;
  Place place{""};  // where it waits, if it does
  bool waits, exited;
};

Thread threads[kThreads];
Warp warps[kThreads / kWarp];
Fiber host;
Thread* current;
const std::function<void()>* kernel;
void* shared;

unsigned thread_count, exited;
unsigned ready[kThreads], ready_count;

unsigned barrier_arrived, barrier_turn, barrier_votes[2];
Place barrier_place{""};
Order barrier_order, block_order;

std::uint64_t random_state = 1;

unsigned current_index() { return static_cast<unsigned>(current - threads); }

bool same(Place a, Place b) {
  return std::strcmp(a.what, b.what) == 0 && a.where.line() == b.where.line() &&
         std::strcmp(a.where.file_name(), b.where.file_name()) == 0;
}

bool alike(const Thread& a, const Thread& b) {
  return a.exited == b.exited && a.waits == b.waits && (!a.waits || same(a.place, b.place));
}

void print(Place place) {
  std::fprintf(stderr, "%s", place.what);
  if (place.where.line()) std::fprintf(stderr, " (%s:%u)", place.where.file_name(), place.where.line());
}

// Where the threads of the block are, in groups.
void print_threads() {
  for (unsigned i = 0; i < thread_count; ++i) {
    const Thread& thread = threads[i];
    unsigned count = 0, first = thread_count;
    for (unsigned j = thread_count; j-- > 0;) {
      if (alike(threads[j], thread)) ++count, first = j;
    }
    if (first != i) continue;
    std::fprintf(stderr, "cuda_on_host:   %u of %u threads, first (%u, %u, %u): ", count, thread_count, thread.index.x,
                 thread.index.y, thread.index.z);
    if (thread.waits) std::fprintf(stderr, "at "), print(thread.place);
    std::fprintf(stderr, "%s\n", thread.waits ? "" : thread.exited ? "returned" : "on their way");
  }
}

void resume(unsigned index, bool ends) {
  Thread* const from = current;
  current = &threads[index];
  threadIdx = current->index;
  if (current != from) switch_fibers(from->fiber, current->fiber, ends);
}

// Goes on with a thread that can, if not with the host when all have returned.
void leave(bool ends = false) {
  if (ready_count == 0) {
    if (exited == thread_count) switch_fibers(current->fiber, host, true);
    fail(ends ? Place("its end") : current->place, "every thread waits, and not all at the same place");
  }
  const unsigned choice = static_cast<unsigned>(random_below(ready_count));
  const unsigned index = ready[choice];
  ready[choice] = ready[--ready_count];
  resume(index, ends);
}

void run_thread() {
  entered();
  block_order.acquire(0);
  (*kernel)();
  block_order.release(0);
  current->exited = true;
  ++exited;
  ++current->warp->exited;
  if (barrier_arrived) fail("its end", "a thread returned while others wait for it at a barrier of the block");
  if (current->warp->arrived) fail("its end", "a thread returned while lanes of its warp wait for it");
  leave(true);
}

// Makes the other threads that wait here ready, and this one.
void wake(unsigned first, unsigned count) {
  for (unsigned i = first; i < first + count; ++i) {
    threads[i].waits = false;
    ready[ready_count++] = i;
  }
}

void run_block() {
  exited = ready_count = barrier_arrived = 0;
  for (unsigned i = 0; i < thread_count; ++i) {
    Thread& thread = threads[i];
    const unsigned row = i / blockDim.x;
    thread.index = {i % blockDim.x, row % blockDim.y, row / blockDim.y};
    thread.warp = &warps[i / kWarp];
    thread.exited = false;
    if (i % kWarp == 0) {
      thread.warp->lanes = thread_count - i < kWarp ? thread_count - i : kWarp;
      thread.warp->arrived = thread.warp->exited = 0;
    }
    prepare(thread.fiber, run_thread);
  }
  wake(0, thread_count);
  const unsigned index = ready[random_below(ready_count)];
  for (unsigned i = 0; i < ready_count; ++i) {
    if (ready[i] == index) ready[i] = ready[--ready_count];
  }
  current = &threads[index];
  threadIdx = current->index;
  block_order.release(0);
  switch_fibers(host, current->fiber);
  block_order.acquire(0);
}

}  // namespace

void seed(std::uint64_t value) { random_state = value; }

// SplitMix64 (Steele, Lea, Flood 2014).
std::uint64_t random_below(std::uint64_t count) {
  std::uint64_t z = random_state += 0x9e3779b97f4a7c15;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
  z = (z ^ z >> 27) * 0x94d049bb133111eb;
  return (z ^ z >> 31) % count;
}

void run_grid(dim3 grid, dim3 block, std::size_t shared_bytes, const std::function<void()>& thread) {
  const std::uint64_t blocks = std::uint64_t{grid.x} * grid.y * grid.z;
  gridDim = grid;
  blockDim = block;
  thread_count = block.x * block.y * block.z;
  kernel = &thread;
  std::uint64_t* const order = new std::uint64_t[blocks];
  for (std::uint64_t i = 0; i < blocks; ++i) {
    const std::uint64_t j = random_below(i + 1);
    order[i] = order[j];
    order[j] = i;
  }
  for (std::uint64_t i = 0; i < blocks; ++i) {
    const std::uint64_t row = order[i] / grid.x;
    blockIdx = {static_cast<unsigned>(order[i] % grid.x), static_cast<unsigned>(row % grid.y),
                static_cast<unsigned>(row / grid.y)};
    shared = nullptr;
    if (shared_bytes && posix_memalign(&shared, 128, shared_bytes) != 0) fail("its start", "no memory for the block");
    if (shared) std::memset(shared, 0xff, shared_bytes);
    run_block();
    std::free(shared);
  }
  delete[] order;
  kernel = nullptr;
}

void fail(Place place, const char* message) {
  std::fprintf(stderr, "cuda_on_host: block (%u, %u, %u), thread (%u, %u, %u), at ", blockIdx.x, blockIdx.y, blockIdx.z,
               threadIdx.x, threadIdx.y, threadIdx.z);
  print(place);
  std::fprintf(stderr, ": %s\n", message);
  if (kernel) print_threads();
  std::abort();
}

void yield() {
  if (!kernel) return;
  ready[ready_count++] = current_index();
  leave();
}

unsigned barrier(Place place, bool predicate) {
  const unsigned turn = barrier_turn;
  if (barrier_arrived == 0) barrier_place = place, barrier_votes[turn % 2] = 0;
  current->waits = true;
  current->place = place;
  if (exited) fail(place, "a barrier of the block that some threads will not reach, having returned");
  if (!same(place, barrier_place)) fail(place, "threads of the block wait at another barrier");
  barrier_votes[turn % 2] += predicate;
  barrier_order.release(turn);
  if (++barrier_arrived == thread_count) {
    barrier_arrived = 0;
    ++barrier_turn;
    wake(0, thread_count);
  }
  leave();
  barrier_order.acquire(turn);
  return barrier_votes[turn % 2];
}

void gather(Place place, unsigned mask, const std::uint64_t* words, int count, Orders orders) {
  Warp& warp = *current->warp;
  const unsigned turn = warp.turn;
  if (warp.arrived == 0) warp.place = place;
  current->waits = true;
  current->place = place;
  if (mask != 0xffffffff || warp.lanes != kWarp) fail(place, "only whole warps of 32 lanes are supported");
  if (warp.exited) fail(place, "lanes of the warp will not come, having returned");
  if (!same(place, warp.place)) fail(place, "lanes of the warp wait for it at another operation");
  for (int i = 0; i < count; ++i) warp.words[turn % 2][lane()][i] = words[i];
  if (orders == Orders::kMemory) warp.order.release(turn);
  if (++warp.arrived == kWarp) {
    warp.arrived = 0;
    ++warp.turn;
    wake(static_cast<unsigned>(&warp - warps) * kWarp, kWarp);
  }
  leave();
  if (orders == Orders::kMemory) warp.order.acquire(turn);
}

// The turn has moved on once for the gather, and cannot again before this lane comes to the next.
std::uint64_t gathered(unsigned lane, int word) {
  const Warp& warp = *current->warp;
  return warp.words[(warp.turn - 1) % 2][lane][word];
}

unsigned lane() { return current_index() % kWarp; }

void* dynamic_shared_memory() { return shared; }

}  // namespace dive_host_cuda
