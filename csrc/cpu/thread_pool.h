// Threads that wait between kernels. They are this library's own, beside those of other runtimes in the process, and
// asleep while no kernel runs, so that they take nothing from them.
#pragma once

#include <functional>

namespace dive::cpu {

// Calls task(0) ... task(threads - 1), each once, at the same time, task(0) on the calling thread, and returns when all
// have ended. Calls from several threads take turns. A task must not throw and must not call parallel() itself.
void parallel(int threads, const std::function<void(int)>& task);

}  // namespace dive::cpu
