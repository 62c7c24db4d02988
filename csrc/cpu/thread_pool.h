// Threads for kernels. In a process that has an OpenMP runtime (torch brings one) its threads do the work: they are
// awake for a while after each of torch's own kernels, and threads beside them would have to wait for their cores.
// Elsewhere they are this library's own, asleep while no kernel runs.
#pragma once

#include <functional>

namespace dive::cpu {

// Calls task(0) ... task(threads - 1), each once, on up to `threads` threads, and returns when all have ended. Tasks
// must not wait for each other, must not throw and must not call parallel() themselves.
void parallel(int threads, const std::function<void(int)>& task);

// The same for tasks that wait for each other: every one has a thread of its own. Where the OpenMP runtime gives fewer
// threads than that, this library's do the work.
void parallel_together(int threads, const std::function<void(int)>& task);

}  // namespace dive::cpu
