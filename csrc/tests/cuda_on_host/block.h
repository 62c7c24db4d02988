// Runs the threads of a grid, and where they meet.
#pragma once

#include <cstdint>
#include <functional>
#include <source_location>

#include "host_types.h"

namespace dive_host_cuda {

// Runs `thread` once for each thread of the grid, `cluster` blocks with neighbouring numbers at a time. For one thread
// of the host at a time. A kernel that begins `early` is, for the thread sanitizer, not ordered behind the end of the
// one before it until it waits for that.
void run_grid(dim3 grid, dim3 block, unsigned cluster, std::size_t shared_bytes, bool early,
              const std::function<void()>& thread);

// What the host does now happens behind the end of all kernels.
void settle();

// A number below `count` of the seeded sequence that orders everything.
std::uint64_t random_below(std::uint64_t count);
void seed(std::uint64_t value);

// What device functions are made of.

// A call in the kernel, by which meetings are told apart and messages name it.
struct Place {
  const char* what;
  std::source_location where;
  Place(const char* what, std::source_location where = {}) : what(what), where(where) {}
};

[[noreturn]] void fail(Place place, const char* message);

// Lets other threads of the block go first, perhaps.
void yield();

void wait_for_previous_kernel();
void let_next_kernel_start();

// A fence orders what comes before it with an atomic behind it, and an atomic before it with what comes behind it. An
// atomic alone orders nothing.
void fence();
void after_atomic(void* address);

// Some copies are there at once and the others when they are waited for, so that it shows if something is read before,
// and if something still needed is copied over; under the thread sanitizer every one both times.
using Move = void(void* to, const void* from);
void copy_ahead(void* to, const void* from, Move* move);
void end_group_of_copies();
void wait_for_copies(unsigned left, Move* move);  // but for the last `left` groups that have ended

// Waits for all threads of the block; the number of them for which `predicate` holds.
unsigned barrier(Place place, bool predicate);

// Waits for all threads of the cluster.
void cluster_barrier(Place place);
unsigned cluster_rank();
unsigned cluster_size();

// What lies in another block of the cluster where `own` lies in this one's dynamic shared memory.
const void* of_block(Place place, const void* own, unsigned rank);

// Waits for all lanes of the warp, each of which brings `count` words. Orders memory only where that is promised of
// the device's counterpart, as it is of __syncwarp and not of a shuffle.
constexpr int kGatherWords = 3;
enum class Orders { kNothing, kMemory };
void gather(Place place, unsigned mask, const std::uint64_t* words, int count, Orders orders = Orders::kNothing);

// A word of a lane in this thread's last gather.
std::uint64_t gathered(unsigned lane, int word = 0);

unsigned lane();
void* dynamic_shared_memory();

}  // namespace dive_host_cuda
