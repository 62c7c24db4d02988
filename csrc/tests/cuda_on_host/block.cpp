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
constexpr unsigned kThreads = 4096;  // the most that the blocks of a cluster have together
constexpr unsigned kBlocks = 16;     // the most of a cluster

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
  unsigned first_thread, lanes, arrived, exited, turn;
  Place place{""};
  Order order;
  // Volatile, or the compiler might copy them by a call of memcpy, in which the thread sanitizer would see a race.
  volatile std::uint64_t words[2][kWarp][kGatherWords];
};

// Where all threads of a block, or of a cluster, wait for each other.
struct Barrier {
  unsigned arrived, turn, votes[2];
  Place place{""};
  Order order;
};

struct Block {
  uint3 index;
  void* shared;
  std::size_t shared_bytes;
  unsigned first_thread, exited;
  Barrier barrier;
};

struct Thread {
  Fiber fiber;
  uint3 index;
  Block* block;
  Warp* warp;
  Place place{""};  // where it waits, if it does
  bool waits, exited;
};

Thread threads[kThreads];
Warp warps[kThreads / kWarp];
Block blocks[kBlocks];
Fiber host;
Thread* current;
const std::function<void()>* kernel;

unsigned block_threads, thread_count, block_count, exited;  // of the cluster that runs, but for the first
unsigned ready[kThreads], ready_count;

Barrier cluster_barrier_;
Order block_order;

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
    std::fprintf(stderr, "cuda_on_host:   %u of %u threads, first (%u, %u, %u)", count, thread_count, thread.index.x,
                 thread.index.y, thread.index.z);
    if (block_count > 1)
      std::fprintf(stderr, " of block (%u, %u, %u)", thread.block->index.x, thread.block->index.y,
                   thread.block->index.z);
    std::fprintf(stderr, ": ");
    if (thread.waits) std::fprintf(stderr, "at "), print(thread.place);
    std::fprintf(stderr, "%s\n", thread.waits ? "" : thread.exited ? "returned" : "on their way");
  }
}

void resume(unsigned index, bool ends) {
  Thread* const from = current;
  current = &threads[index];
  threadIdx = current->index;
  blockIdx = current->block->index;
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
  ++current->block->exited;
  ++current->warp->exited;
  if (current->block->barrier.arrived)
    fail("its end", "a thread returned while others wait for it at a barrier of the block");
  if (cluster_barrier_.arrived)
    fail("its end", "a thread returned while others wait for it at a barrier of the cluster");
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

// The blocks of a cluster, together.
void run_cluster() {
  thread_count = block_count * block_threads;
  exited = ready_count = cluster_barrier_.arrived = 0;
  for (unsigned i = 0; i < thread_count; ++i) {
    Thread& thread = threads[i];
    const unsigned own = i % block_threads, row = own / blockDim.x;
    thread.block = &blocks[i / block_threads];
    if (own == 0) {
      thread.block->first_thread = i;
      thread.block->exited = thread.block->barrier.arrived = 0;
    }
    thread.index = {own % blockDim.x, row % blockDim.y, row / blockDim.y};
    // Warps begin anew with every block.
    const unsigned warps_of_block = (block_threads + kWarp - 1) / kWarp;
    thread.warp = &warps[i / block_threads * warps_of_block + own / kWarp];
    thread.exited = false;
    if (own % kWarp == 0) {
      thread.warp->first_thread = i;
      thread.warp->lanes = block_threads - own < kWarp ? block_threads - own : kWarp;
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
  blockIdx = current->block->index;
  block_order.release(0);
  switch_fibers(host, current->fiber);
  block_order.acquire(0);
}

unsigned meet(Barrier& barrier, Place place, bool predicate, unsigned first, unsigned count, bool others_exited) {
  const unsigned turn = barrier.turn;
  if (barrier.arrived == 0) barrier.place = place, barrier.votes[turn % 2] = 0;
  current->waits = true;
  current->place = place;
  if (others_exited) fail(place, "a barrier that some threads will not reach, having returned");
  if (!same(place, barrier.place)) fail(place, "other threads wait at another barrier");
  barrier.votes[turn % 2] += predicate;
  barrier.order.release(turn);
  if (++barrier.arrived == count) {
    barrier.arrived = 0;
    ++barrier.turn;
    wake(first, count);
  }
  leave();
  barrier.order.acquire(turn);
  return barrier.votes[turn % 2];
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

void run_grid(dim3 grid, dim3 block, unsigned cluster, std::size_t shared_bytes, const std::function<void()>& thread) {
  const std::uint64_t clusters = std::uint64_t{grid.x} * grid.y * grid.z / cluster;
  gridDim = grid;
  blockDim = block;
  block_threads = block.x * block.y * block.z;
  block_count = cluster;
  kernel = &thread;
  std::uint64_t* const order = new std::uint64_t[clusters];
  for (std::uint64_t i = 0; i < clusters; ++i) {
    const std::uint64_t j = random_below(i + 1);
    order[i] = order[j];
    order[j] = i;
  }
  for (std::uint64_t i = 0; i < clusters; ++i) {
    for (unsigned j = 0; j < cluster; ++j) {
      const std::uint64_t number = order[i] * cluster + j, row = number / grid.x;
      Block& own = blocks[j];
      own.index = {static_cast<unsigned>(number % grid.x), static_cast<unsigned>(row % grid.y),
                   static_cast<unsigned>(row / grid.y)};
      own.shared = nullptr;
      own.shared_bytes = shared_bytes;
      if (shared_bytes && posix_memalign(&own.shared, 128, shared_bytes) != 0)
        fail("its start", "no memory for the block");
      if (own.shared) std::memset(own.shared, 0xff, shared_bytes);
    }
    run_cluster();
    for (unsigned j = 0; j < cluster; ++j) std::free(blocks[j].shared);
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
  Block& block = *current->block;
  return meet(block.barrier, place, predicate, block.first_thread, block_threads, block.exited != 0);
}

void cluster_barrier(Place place) { meet(cluster_barrier_, place, false, 0, thread_count, exited != 0); }

unsigned cluster_rank() { return static_cast<unsigned>(current->block - blocks); }
unsigned cluster_size() { return block_count; }

const void* of_block(Place place, const void* own, unsigned rank) {
  const Block& block = *current->block;
  const std::size_t offset = static_cast<const char*>(own) - static_cast<const char*>(block.shared);
  if (rank >= block_count) fail(place, "the cluster has no such block");
  if (blocks[rank].exited == block_threads) fail(place, "the block has ended");
  if (offset >= block.shared_bytes) fail(place, "an address outside of the block's dynamic shared memory");
  return static_cast<const char*>(blocks[rank].shared) + offset;
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
    wake(warp.first_thread, kWarp);
  }
  leave();
  if (orders == Orders::kMemory) warp.order.acquire(turn);
}

// The turn has moved on once for the gather, and cannot again before this lane comes to the next.
std::uint64_t gathered(unsigned lane, int word) {
  const Warp& warp = *current->warp;
  return warp.words[(warp.turn - 1) % 2][lane][word];
}

unsigned lane() { return (current_index() - current->block->first_thread) % kWarp; }

void* dynamic_shared_memory() { return current->block->shared; }

}  // namespace dive_host_cuda
