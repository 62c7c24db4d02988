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

constexpr unsigned kCopies = 256;  // the most that a thread has under way
constexpr std::size_t kShared = 256 << 10;

bool thread_sanitizer() { return __tsan_release != nullptr; }

// What others did before they released an object happened before what follows its acquisition: for the thread
// sanitizer, which knows of no order between fibers but this.
struct Event {
  char object;
  void release() {
    if (__tsan_release) __tsan_release(&object);
  }
  void acquire() {
    if (__tsan_acquire) __tsan_acquire(&object);
  }
};

// A meeting place has two, used by turns, as who is quick may be at the next meeting while others have yet to leave
// this one.
struct Order {
  Event events[2];
  void release(unsigned turn) { events[turn % 2].release(); }
  void acquire(unsigned turn) { events[turn % 2].acquire(); }
};

// A kernel, and when the next one may begin: behind its end, or early, when all blocks have let it start. Threads are
// ordered by what the kernel asks for alone, and blocks that happen to run one after the other are not.
struct Kernel {
  Event let_next_start, ended;
};

struct Warp {
  unsigned first_thread, lanes, arrived, exited, turn;
  Place place{""};
  // Volatile, or the compiler might copy them by a call of memcpy, in which the thread sanitizer would see a race.
  volatile std::uint64_t words[2][kWarp][kGatherWords];
};

// Where all threads of a block, or of a cluster, wait for each other.
struct Barrier {
  unsigned arrived, turn, votes[2];
  Place place{""};
  Order* order;
};

struct Block {
  uint3 index;
  void* shared;
  std::size_t shared_bytes;
  unsigned first_thread, exited;
  bool has_let_next_start;
  Barrier barrier;
};

// A copy into shared memory that is under way, of the group with that number.
struct Copy {
  void* to;
  const void* from;
  std::uint64_t group;
};

struct Thread {
  Fiber* fiber;
  uint3 index;
  Block* block;
  Warp* warp;
  Place place{""};  // where it waits, if it does
  bool waits, exited, has_fenced;
  void* observed;  // what its last atomic was about, until a fence orders what comes behind it
  unsigned copy_count;
  std::uint64_t copy_group;
};

Thread threads[kThreads];
Copy copies[kThreads][kCopies];
Warp warps[kThreads / kWarp];
Block blocks[kBlocks];
Fiber host;
Thread* current;
const std::function<void()>* kernel;

unsigned block_threads, thread_count, block_count, exited;  // of the cluster that runs, but for the first
unsigned ready[kThreads], ready_count;

Barrier cluster_barrier_;

// What a cluster runs on. Under the thread sanitizer the next one has another, or it would take the order of a fiber's
// work for the kernel's: so races of two clusters are seen where they run one behind the other, as any two may.
struct Slot {
  Fiber fibers[kThreads];
  void* shared[kBlocks];
  Order warps[kThreads / kWarp], blocks[kBlocks], cluster;
  Event left;
};
Slot slots[2];
Slot* slot = slots;

Event host_order;
Kernel kernels[4];
unsigned kernel_number;
bool begins_early;
Kernel& own_kernel() { return kernels[kernel_number % 4]; }
Kernel& previous_kernel() { return kernels[(kernel_number - 1) % 4]; }

std::uint64_t random_state = 1;

unsigned current_index() { return static_cast<unsigned>(current - threads); }

// Not by strcmp, which the sanitizers look at, slowly.
bool same(const char* a, const char* b) {
  if (a == b) return true;
  for (; *a && *a == *b; ++a, ++b) continue;
  return *a == *b;
}

bool same(Place a, Place b) {
  return same(a.what, b.what) && a.where.line() == b.where.line() && same(a.where.file_name(), b.where.file_name());
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
  if (current != from) switch_fibers(*from->fiber, *current->fiber, ends);
}

// Goes on with a thread that can, if not with the host when all have returned.
void leave(bool ends = false) {
  if (ready_count == 0) {
    if (exited == thread_count) switch_fibers(*current->fiber, host, true);
    fail(ends ? Place("its end") : current->place, "every thread waits, and not all at the same place");
  }
  const unsigned choice = static_cast<unsigned>(random_below(ready_count));
  const unsigned index = ready[choice];
  ready[choice] = ready[--ready_count];
  resume(index, ends);
}

void run_thread() {
  entered();
  host_order.acquire();
  slot->left.acquire();
  begins_early ? previous_kernel().let_next_start.acquire() : previous_kernel().ended.acquire();
  (*kernel)();
  if (!current->block->has_let_next_start) own_kernel().let_next_start.release();
  own_kernel().ended.release();
  slot->left.release();
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
  cluster_barrier_.order = &slot->cluster;
  exited = ready_count = cluster_barrier_.arrived = 0;
  for (unsigned i = 0; i < thread_count; ++i) {
    Thread& thread = threads[i];
    const unsigned own = i % block_threads, row = own / blockDim.x;
    thread.block = &blocks[i / block_threads];
    if (own == 0) {
      thread.block->first_thread = i;
      thread.block->exited = thread.block->barrier.arrived = 0;
      thread.block->has_let_next_start = false;
      thread.block->barrier.order = &slot->blocks[i / block_threads];
    }
    thread.index = {own % blockDim.x, row % blockDim.y, row / blockDim.y};
    // Warps begin anew with every block.
    const unsigned warps_of_block = (block_threads + kWarp - 1) / kWarp;
    thread.warp = &warps[i / block_threads * warps_of_block + own / kWarp];
    thread.exited = thread.has_fenced = false;
    thread.observed = nullptr;
    thread.copy_count = 0;
    thread.copy_group = 0;
    thread.fiber = &slot->fibers[i];
    if (own % kWarp == 0) {
      thread.warp->first_thread = i;
      thread.warp->lanes = block_threads - own < kWarp ? block_threads - own : kWarp;
      thread.warp->arrived = thread.warp->exited = 0;
    }
    prepare(*thread.fiber, run_thread);
  }
  wake(0, thread_count);
  const unsigned index = ready[random_below(ready_count)];
  for (unsigned i = 0; i < ready_count; ++i) {
    if (ready[i] == index) ready[i] = ready[--ready_count];
  }
  current = &threads[index];
  threadIdx = current->index;
  blockIdx = current->block->index;
  switch_fibers(host, *current->fiber);
}

// Filled with a NaN of every format. To the thread sanitizer a fill and a release of memory are accesses of the host's,
// so that it gets memory that stays, which nobody sees filled.
void* shared_memory(unsigned rank, std::size_t bytes) {
  if (bytes == 0) return nullptr;
  void*& memory = slot->shared[rank];
  if (bytes > kShared) fail("its start", "more shared memory than any device has");
  if (!memory && posix_memalign(&memory, 128, thread_sanitizer() ? kShared : bytes) != 0)
    fail("its start", "no memory for the block");
  if (!thread_sanitizer()) return std::memset(memory, 0xff, bytes);
  volatile char* const chars = static_cast<char*>(memory);
  for (std::size_t i = 0; i < bytes; ++i) chars[i] = static_cast<char>(0xff);
  return memory;
}

void release_shared_memory(unsigned rank) {
  if (thread_sanitizer()) return;
  std::free(slot->shared[rank]);
  slot->shared[rank] = nullptr;
}

unsigned meet(Barrier& barrier, Place place, bool predicate, unsigned first, unsigned count, bool others_exited) {
  const unsigned turn = barrier.turn;
  if (barrier.arrived == 0) barrier.place = place, barrier.votes[turn % 2] = 0;
  current->waits = true;
  current->place = place;
  if (others_exited) fail(place, "a barrier that some threads will not reach, having returned");
  if (!same(place, barrier.place)) fail(place, "other threads wait at another barrier");
  barrier.votes[turn % 2] += predicate;
  barrier.order->release(turn);
  if (++barrier.arrived == count) {
    barrier.arrived = 0;
    ++barrier.turn;
    wake(first, count);
  }
  leave();
  barrier.order->acquire(turn);
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

void run_grid(dim3 grid, dim3 block, unsigned cluster, std::size_t shared_bytes, bool early,
              const std::function<void()>& thread) {
  const std::uint64_t clusters = std::uint64_t{grid.x} * grid.y * grid.z / cluster;
  gridDim = grid;
  blockDim = block;
  block_threads = block.x * block.y * block.z;
  block_count = cluster;
  kernel = &thread;
  ++kernel_number;
  begins_early = early;
  std::uint64_t* const order = new std::uint64_t[clusters];
  for (std::uint64_t i = 0; i < clusters; ++i) {
    const std::uint64_t j = random_below(i + 1);
    order[i] = order[j];
    order[j] = i;
  }
  for (std::uint64_t i = 0; i < clusters; ++i) {
    if (thread_sanitizer()) slot = slot == slots ? slots + 1 : slots;
    for (unsigned j = 0; j < cluster; ++j) {
      const std::uint64_t number = order[i] * cluster + j, row = number / grid.x;
      Block& own = blocks[j];
      own.index = {static_cast<unsigned>(number % grid.x), static_cast<unsigned>(row % grid.y),
                   static_cast<unsigned>(row / grid.y)};
      own.shared_bytes = shared_bytes;
      own.shared = shared_memory(j, shared_bytes);
    }
    host_order.release();
    run_cluster();
    for (unsigned j = 0; j < cluster; ++j) release_shared_memory(j);
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

void settle() {
  for (Kernel& one : kernels) one.ended.acquire();
}

void wait_for_previous_kernel() {
  if (begins_early) previous_kernel().ended.acquire();
}

// The first thread's word is the block's.
void let_next_kernel_start() {
  if (!current->block->has_let_next_start) own_kernel().let_next_start.release();
  current->block->has_let_next_start = true;
}

void fence() {
  if (!kernel) return;
  current->has_fenced = true;
  if (current->observed && __tsan_acquire) __tsan_acquire(current->observed);
  current->observed = nullptr;
  yield();
}

void after_atomic(void* address) {
  if (!kernel) return;
  // Behind the atomic, as who sees it knows of it as well.
  if (current->has_fenced && __tsan_release) __tsan_release(address);
  current->observed = address;
  yield();
}

void copy_ahead(void* to, const void* from, Move* move) {
  const bool now = thread_sanitizer() || random_below(2);
  if (now) move(to, from);
  if (now && !thread_sanitizer()) return;
  if (current->copy_count == kCopies) fail("copy_ahead", "too many copies under way");
  copies[current_index()][current->copy_count++] = {to, from, current->copy_group};
}

void end_group_of_copies() { ++current->copy_group; }

void wait_for_copies(unsigned left, Move* move) {
  Copy* const own = copies[current_index()];
  unsigned kept = 0;
  for (unsigned i = 0; i < current->copy_count; ++i) {
    const Copy copy = own[i];
    if (copy.group + left < current->copy_group) {
      move(copy.to, copy.from);
    } else {
      own[kept++] = copy;
    }
  }
  current->copy_count = kept;
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
  Order& order = slot->warps[current->warp - warps];
  if (orders == Orders::kMemory) order.release(turn);
  if (++warp.arrived == kWarp) {
    warp.arrived = 0;
    ++warp.turn;
    wake(warp.first_thread, kWarp);
  }
  leave();
  if (orders == Orders::kMemory) order.acquire(turn);
}

// The turn has moved on once for the gather, and cannot again before this lane comes to the next.
std::uint64_t gathered(unsigned lane, int word) {
  const Warp& warp = *current->warp;
  return warp.words[(warp.turn - 1) % 2][lane][word];
}

unsigned lane() { return (current_index() - current->block->first_thread) % kWarp; }

void* dynamic_shared_memory() { return current->block->shared; }

}  // namespace dive_host_cuda
