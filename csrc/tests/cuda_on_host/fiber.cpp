// This file and block.cpp are compiled without the thread sanitizer's instrumentation, and tell it about the fibers
// themselves: to it each is a thread, and a switch orders nothing, so that it sees the kernel's own races and no
// accesses of the scheduler.
#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

// Present where the program was linked with the sanitizer, else null.
extern "C" {
__attribute__((weak)) void __sanitizer_start_switch_fiber(void**, const void*, std::size_t);
__attribute__((weak)) void __sanitizer_finish_switch_fiber(void*, const void**, std::size_t*);
__attribute__((weak)) void __asan_unpoison_memory_region(const volatile void*, std::size_t);
__attribute__((weak)) void* __tsan_get_current_fiber();
__attribute__((weak)) void* __tsan_create_fiber(unsigned);
__attribute__((weak)) void __tsan_switch_to_fiber(void*, unsigned);
}

namespace dive_host_cuda {
namespace {

constexpr std::size_t kStack = 256 << 10;  // of which the pages that are touched cost memory
constexpr unsigned kTsanNoSync = 1;        // __tsan_switch_to_fiber_no_sync

Fiber* left;  // the fiber of the last switch

// A page below the stack that nobody may touch makes an overflow a fault.
char* new_stack() {
  const std::size_t page = sysconf(_SC_PAGESIZE);
  void* const memory = mmap(nullptr, kStack + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, page, PROT_NONE) != 0) {
    std::perror("cuda_on_host: no memory for the stack of a thread");
    std::abort();
  }
  return static_cast<char*>(memory) + page;
}

}  // namespace

#if defined(__x86_64__)
// swapcontext would do, but makes two system calls to save the signal mask. What a function must keep for its caller
// under the System V ABI is six registers and the stack pointer; nobody here changes the floating-point mode.
extern "C" void dive_host_cuda_switch(void** save, void* load);
asm(R"(
.pushsection .text
.globl dive_host_cuda_switch
.hidden dive_host_cuda_switch
.type dive_host_cuda_switch, @function
dive_host_cuda_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size dive_host_cuda_switch, .-dive_host_cuda_switch
.popsection
)");
#endif

void prepare(Fiber& fiber, void (*entry)()) {
  if (!fiber.stack) {
    fiber.stack = new_stack();
    fiber.stack_size = kStack;
    if (__tsan_create_fiber) fiber.tsan = __tsan_create_fiber(0);
  }
  // The frame of the entry before was left without a return.
  constexpr std::size_t kEntryFrame = 4 << 10;
  if (__asan_unpoison_memory_region) {
    __asan_unpoison_memory_region(fiber.stack + fiber.stack_size - kEntryFrame, kEntryFrame);
  }
#if defined(__x86_64__)
  // Six registers, the address to return to, and the null return address of an entry that has no caller; the stack
  // pointer is 8 past a multiple of 16 when a function begins.
  void** top = reinterpret_cast<void**>(fiber.stack + fiber.stack_size);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber.stack_pointer = top;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = fiber.stack_size;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
#endif
}

// What the sanitizer says of the stack that was left is how it becomes known where the host's own lies.
void entered() {
  if (!__sanitizer_finish_switch_fiber) return;
  const void* bottom = nullptr;
  std::size_t size = 0;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
  if (!left->stack) left->stack_size = size, left->stack = static_cast<char*>(const_cast<void*>(bottom));
}

void switch_fibers(Fiber& from, Fiber& to, bool ends) {
  left = &from;
  if (__sanitizer_start_switch_fiber) {
    __sanitizer_start_switch_fiber(ends ? nullptr : &from.fake_stack, to.stack, to.stack_size);
  }
  if (__tsan_switch_to_fiber) {
    if (!from.tsan) from.tsan = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(to.tsan, kTsanNoSync);
  }
#if defined(__x86_64__)
  dive_host_cuda_switch(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.context, &to.context);
#endif
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
}

}  // namespace dive_host_cuda
