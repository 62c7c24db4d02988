// What the parts of the runtime share.
#pragma once

#include <functional>
#include <mutex>

#include "cuda_runtime.h"

namespace dive_host_cuda {

// One call of the API at a time; a kernel runs inside one. Recursive, as some calls are made of others, which do not
// count.
class Call {
 public:
  Call();
  ~Call();
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  // What a test wants this call to return, or cudaSuccess. For the outermost of calls that may fail.
  cudaError_t wanted_failure() const;

 private:
  std::lock_guard<std::recursive_mutex> lock_;
};

// How a function of the API begins that a test can make fail: all but those that free something.
#define DIVE_HOST_CUDA_CALL \
  const Call call;          \
  if (const cudaError_t wanted = call.wanted_failure(); wanted != cudaSuccess) return report(wanted)

// Remembers an error for cudaGetLastError, and returns it.
cudaError_t report(cudaError_t error);

// Whether a capture forbids calls that might wait for it, such as cudaMalloc; such a call spoils the capture.
bool forbidden_by_capture();

// Does the work now or, in a stream that captures, at each launch of the graph.
cudaError_t enqueue(cudaStream_t stream, cudaGraphNodeType type, std::function<void()> work);

}  // namespace dive_host_cuda
