// For loops that look for something another thread will write.
#pragma once

#if !defined(__x86_64__) && !defined(__i386__) && !defined(__aarch64__)
#include <thread>
#endif

namespace dive::cpu {

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("isb");  // which waits for what has been issued; most processors take `yield` for nothing
#else
  std::this_thread::yield();
#endif
}

}  // namespace dive::cpu
