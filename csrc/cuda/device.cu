#include "cuda/device.h"

#include <cuda_runtime.h>

#include <sstream>

namespace dive::cuda {
namespace {

// Any bijection of the index does; this one (Knuth's multiplicative hash) leaves no two neighbours alike, so a
// shifted or partly written buffer cannot pass.
__host__ __device__ std::uint32_t expected_value(std::uint32_t index) { return index * 2654435761U + 1U; }

__global__ void probe_fill_kernel(std::uint32_t* out, std::uint32_t count) {
  const std::uint32_t index = blockIdx.x * blockDim.x + threadIdx.x;
  if (index < count) out[index] = expected_value(index);
}

Status check(cudaError_t error) {
  if (error == cudaSuccess) return {};
  // The runtime remembers a failure until it is asked; left there, the next launch would be blamed for it.
  static_cast<void>(cudaGetLastError());
  // Without any driver the runtime calls it too old, which sends the reader after the wrong fault.
  int driver = 0;
  if (error == cudaErrorInsufficientDriver && cudaDriverGetVersion(&driver) == cudaSuccess && driver == 0) {
    return {false, "no CUDA driver is installed"};
  }
  return {false, std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error)};
}

// Makes a device current and gives the caller's back at the end of the scope. A destructor has nobody to report to,
// so its status is dropped.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    status_ = cudaGetDevice(&previous_);
    if (status_ != cudaSuccess) return;
    status_ = cudaSetDevice(device);
    switched_ = status_ == cudaSuccess;
  }
  ~DeviceGuard() {
    if (switched_) static_cast<void>(cudaSetDevice(previous_));
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

  cudaError_t status() const { return status_; }

 private:
  int previous_ = 0;
  bool switched_ = false;
  cudaError_t status_ = cudaSuccess;
};

class Stream {
 public:
  // Non-blocking, so that the probe neither waits for the default stream nor holds it up.
  Stream() : status_(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking)) {}
  ~Stream() {
    if (status_ == cudaSuccess) static_cast<void>(cudaStreamDestroy(stream_));
  }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  cudaError_t status() const { return status_; }
  cudaStream_t get() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
  cudaError_t status_;
};

class Buffer {
 public:
  explicit Buffer(std::size_t bytes) : status_(cudaMalloc(&data_, bytes)) {}
  ~Buffer() {
    if (status_ == cudaSuccess) static_cast<void>(cudaFree(data_));
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  cudaError_t status() const { return status_; }
  void* get() const { return data_; }

 private:
  void* data_ = nullptr;
  cudaError_t status_;
};

// Asks the driver whether one of the embedded images loads on the current device.
Status covers_current_device() {
  cudaFuncAttributes attributes{};
  return check(cudaFuncGetAttributes(&attributes, probe_fill_kernel));
}

Device describe(int index, const cudaDeviceProp& properties) {
  Device device{.index = index,
                .name = properties.name,
                .major = properties.major,
                .minor = properties.minor,
                .total_memory = properties.totalGlobalMem,
                .sm_count = properties.multiProcessorCount,
                .covered = {}};
  const DeviceGuard guard(index);
  device.covered = guard.status() == cudaSuccess ? covers_current_device() : check(guard.status());
  return device;
}

cudaError_t fill_and_read(std::vector<std::uint32_t>& host) {
  const std::size_t bytes = host.size() * sizeof(std::uint32_t);
  const Stream stream;
  if (stream.status() != cudaSuccess) return stream.status();
  const Buffer buffer(bytes);
  if (buffer.status() != cudaSuccess) return buffer.status();

  const auto count = static_cast<std::uint32_t>(host.size());
  constexpr std::uint32_t kBlock = 256;
  probe_fill_kernel<<<(count + kBlock - 1) / kBlock, kBlock, 0, stream.get()>>>(
      static_cast<std::uint32_t*>(buffer.get()), count);
  if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  if (const cudaError_t error = cudaMemcpyAsync(host.data(), buffer.get(), bytes, cudaMemcpyDeviceToHost, stream.get());
      error != cudaSuccess) {
    return error;
  }
  return cudaStreamSynchronize(stream.get());
}

}  // namespace

bool built() { return true; }

std::vector<std::string> built_archs() {
  std::istringstream words(DIVE_CUDA_ARCHS);
  std::vector<std::string> archs;
  for (std::string arch; words >> arch;) archs.push_back(arch);
  return archs;
}

Versions versions() {
  Versions versions;
  versions.status = check(cudaRuntimeGetVersion(&versions.runtime));
  if (versions.status.ok) versions.status = check(cudaDriverGetVersion(&versions.driver));
  if (versions.status.ok && versions.driver == 0) versions.status = check(cudaErrorInsufficientDriver);
  return versions;
}

DeviceList devices() {
  DeviceList list;
  int count = 0;
  list.status = check(cudaGetDeviceCount(&count));
  for (int index = 0; list.status.ok && index < count; ++index) {
    cudaDeviceProp properties{};
    list.status = check(cudaGetDeviceProperties(&properties, index));
    if (list.status.ok) list.devices.push_back(describe(index, properties));
  }
  return list;
}

ProbeResult probe(int device) {
  // Not a multiple of the block, so that the kernel's bounds check is exercised.
  constexpr std::uint32_t kCount = (1U << 20) + 3U;
  const DeviceGuard guard(device);
  if (guard.status() != cudaSuccess) return {.status = check(guard.status())};

  std::vector<std::uint32_t> host(kCount, 0U);
  ProbeResult result{.status = check(fill_and_read(host))};
  if (!result.status.ok) return result;
  for (std::uint32_t index = 0; index < kCount; ++index) result.elements += host[index] == expected_value(index);
  if (result.elements != kCount) {
    result.status = {false, "the probe kernel wrote " + std::to_string(kCount - result.elements) + " of " +
                                std::to_string(kCount) + " values wrongly"};
  }
  return result;
}

}  // namespace dive::cuda
