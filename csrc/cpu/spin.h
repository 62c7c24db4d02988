// For loops that look for something another thread will write.
#pragma once

#include <thread>

namespace dive::cpu {

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#else
  std::this_thread::yield();
#endif
}

}  // namespace dive::cpu
