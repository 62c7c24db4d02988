// What the parts of the runtime share.
#pragma once

#include <functional>
#include <mutex>

#include "cuda_runtime.h"

namespace dive_host_cuda {

// One call of the API at a time; a kernel runs inside one. Recursive for host functions that call the API.
class Call {
 public:
  Call();

 private:
  std::lock_guard<std::recursive_mutex> lock_;
};

// Remembers an error for cudaGetLastError, and returns it.
cudaError_t report(cudaError_t error);

// Whether a capture forbids calls that might wait for it, such as cudaMalloc; such a call spoils the capture.
bool forbidden_by_capture();

// Does the work now or, in a stream that captures, at each launch of the graph.
cudaError_t enqueue(cudaStream_t stream, cudaGraphNodeType type, std::function<void()> work);

}  // namespace dive_host_cuda
