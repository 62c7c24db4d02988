// Several stacks in one thread of the host: what a thread of a block runs on.
#pragma once

#include <cstddef>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace dive_host_cuda {

// A place where execution can stop and go on. The one that called first has no stack of its own here.
struct Fiber {
  char* stack = nullptr;  // its lowest usable byte
  std::size_t stack_size = 0;
  void* fake_stack = nullptr;  // the address sanitizer's
  void* tsan = nullptr;        // the thread sanitizer's
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
};

// The next switch to `fiber` calls `entry`, which must never return. The stack is made at the first call and kept for
// the life of the process.
void prepare(Fiber& fiber, void (*entry)());

// The first thing that an entry does.
void entered();

// Stops `from` and goes on with `to`. A fiber that `ends` is never switched to again before it is prepared anew.
void switch_fibers(Fiber& from, Fiber& to, bool ends = false);

}  // namespace dive_host_cuda
