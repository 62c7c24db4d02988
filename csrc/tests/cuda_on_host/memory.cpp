// Device and pinned memory: allocations of the exact size, so that the address sanitizer sees an access one byte too
// far, at the alignment that the runtime promises, so that it sees no more than that.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>

#include "control.h"
#include "state.h"

namespace dive_host_cuda {
namespace {

constexpr std::size_t kAlignment = 256;

struct Allocation {
  std::size_t size;
  bool pinned;
};

// By the complement of the address: what can be reached by no pointer is a leak for the leak sanitizer.
class Allocations {
 public:
  ~Allocations() {
    for (const auto& [key, allocation] : live_) {
      std::fprintf(stderr, "cuda_on_host: %zu bytes of %s memory were never freed\n", allocation.size,
                   allocation.pinned ? "pinned" : "device");
    }
  }

  void add(void* pointer, Allocation allocation) { live_.emplace(key(pointer), allocation); }

  bool remove(void* pointer, bool pinned) {
    const auto found = live_.find(key(pointer));
    if (found == live_.end() || found->second.pinned != pinned) return false;
    live_.erase(found);
    return true;
  }

  // Whether an address lies in pinned memory.
  bool pinned(const void* pointer) const {
    for (const auto& [complement, allocation] : live_) {
      const std::uintptr_t offset = reinterpret_cast<std::uintptr_t>(pointer) - ~complement;
      if (allocation.pinned && offset < allocation.size) return true;
    }
    return false;
  }

  std::size_t bytes(bool pinned) const {
    std::size_t sum = 0;
    for (const auto& [key, allocation] : live_) sum += allocation.pinned == pinned ? allocation.size : 0;
    return sum;
  }

 private:
  static std::uintptr_t key(const void* pointer) { return ~reinterpret_cast<std::uintptr_t>(pointer); }

  std::map<std::uintptr_t, Allocation> live_;
};

Allocations& allocations() {
  static Allocations allocations;
  return allocations;
}

cudaError_t allocate(void** pointer, std::size_t size, bool pinned) {
  DIVE_HOST_CUDA_CALL;
  if (forbidden_by_capture()) return report(cudaErrorStreamCaptureUnsupported);
  *pointer = nullptr;
  if (size == 0) return cudaSuccess;
  const std::size_t total = dive_host_cuda_device().totalGlobalMem;
  if (!pinned && (size > total || allocations().bytes(false) > total - size)) return report(cudaErrorMemoryAllocation);
  if (posix_memalign(pointer, kAlignment, size) != 0) return report(cudaErrorMemoryAllocation);
  std::memset(*pointer, 0xff, size);
  allocations().add(*pointer, {size, pinned});
  return cudaSuccess;
}

cudaError_t release(void* pointer, bool pinned) {
  const Call call;
  if (forbidden_by_capture()) return report(cudaErrorStreamCaptureUnsupported);
  if (!pointer) return cudaSuccess;
  if (!allocations().remove(pointer, pinned)) return report(cudaErrorInvalidValue);
  std::free(pointer);
  return cudaSuccess;
}

bool valid(cudaMemcpyKind kind) { return kind >= cudaMemcpyHostToHost && kind <= cudaMemcpyDefault; }

}  // namespace
}  // namespace dive_host_cuda

using namespace dive_host_cuda;

std::size_t dive_host_cuda_live_bytes() {
  const Call call;
  return allocations().bytes(false) + allocations().bytes(true);
}

cudaError_t cudaMalloc(void** pointer, std::size_t size) { return allocate(pointer, size, false); }
cudaError_t cudaFree(void* pointer) { return release(pointer, false); }

// In a capture the runtime would make nodes of these two; here they are refused in one.
cudaError_t cudaMallocAsync(void** pointer, std::size_t size, cudaStream_t) { return allocate(pointer, size, false); }
cudaError_t cudaFreeAsync(void* pointer, cudaStream_t) { return release(pointer, false); }

cudaError_t cudaHostAlloc(void** pointer, std::size_t size, unsigned flags) {
  if (flags & ~(cudaHostAllocPortable | cudaHostAllocMapped | cudaHostAllocWriteCombined)) {
    return report(cudaErrorInvalidValue);
  }
  return allocate(pointer, size, true);
}

cudaError_t cudaMallocHost(void** pointer, std::size_t size, unsigned flags) {
  return cudaHostAlloc(pointer, size, flags);
}

cudaError_t cudaFreeHost(void* pointer) { return release(pointer, true); }

cudaError_t cudaHostGetDevicePointer(void** device, void* host, unsigned flags) {
  DIVE_HOST_CUDA_CALL;
  if (flags != 0 || !allocations().pinned(host)) return report(cudaErrorInvalidValue);
  *device = host;
  return cudaSuccess;
}

cudaError_t cudaMemGetInfo(std::size_t* free, std::size_t* total) {
  DIVE_HOST_CUDA_CALL;
  const std::size_t used = allocations().bytes(false);
  *total = dive_host_cuda_device().totalGlobalMem;
  *free = used < *total ? *total - used : 0;
  return cudaSuccess;
}

cudaError_t cudaMemcpy(void* to, const void* from, std::size_t size, cudaMemcpyKind kind) {
  DIVE_HOST_CUDA_CALL;
  if (forbidden_by_capture()) return report(cudaErrorStreamCaptureUnsupported);
  return cudaMemcpyAsync(to, from, size, kind, nullptr);
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t size, cudaMemcpyKind kind, cudaStream_t stream) {
  return cudaMemcpy2DAsync(to, size, from, size, size, 1, kind, stream);
}

cudaError_t cudaMemcpy2DAsync(void* to, std::size_t to_pitch, const void* from, std::size_t from_pitch,
                              std::size_t width, std::size_t height, cudaMemcpyKind kind, cudaStream_t stream) {
  DIVE_HOST_CUDA_CALL;
  if (width == 0 || height == 0) return cudaSuccess;
  if (!to || !from || !valid(kind) || to_pitch < width || from_pitch < width) return report(cudaErrorInvalidValue);
  return report(enqueue(stream, cudaGraphNodeTypeMemcpy, [=] {
    for (std::size_t row = 0; row < height; ++row) {
      std::memcpy(static_cast<char*>(to) + row * to_pitch, static_cast<const char*>(from) + row * from_pitch, width);
    }
  }));
}

cudaError_t cudaMemset(void* to, int value, std::size_t size) {
  DIVE_HOST_CUDA_CALL;
  if (forbidden_by_capture()) return report(cudaErrorStreamCaptureUnsupported);
  return cudaMemsetAsync(to, value, size, nullptr);
}

cudaError_t cudaMemsetAsync(void* to, int value, std::size_t size, cudaStream_t stream) {
  DIVE_HOST_CUDA_CALL;
  if (size == 0) return cudaSuccess;
  if (!to) return report(cudaErrorInvalidValue);
  return report(enqueue(stream, cudaGraphNodeTypeMemset, [=] { std::memset(to, value, size); }));
}
