// Errors, the device, and launches.
#include <algorithm>
#include <map>
#include <set>

#include "control.h"
#include "state.h"

namespace dive_host_cuda {
namespace {

std::recursive_mutex mutex;
std::uint64_t calls, launches;
int depth;  // of calls within calls
std::uint64_t until_failure;
cudaError_t failure = cudaSuccess;  // what call number until_failure from now shall return
thread_local cudaError_t last_error = cudaSuccess;
int driver = 13000;
constexpr int kRuntime = 13000;

// A Hopper in what kernels may ask for, with few multiprocessors, and not a power of two of them.
cudaDeviceProp device{.name = "CUDA on the host",
                      .totalGlobalMem = std::size_t{4} << 30,
                      .sharedMemPerBlock = 48 << 10,
                      .regsPerBlock = 65536,
                      .warpSize = 32,
                      .maxThreadsPerBlock = 1024,
                      .maxThreadsDim = {1024, 1024, 64},
                      .maxGridSize = {2147483647, 65535, 65535},
                      .major = 9,
                      .minor = 0,
                      .multiProcessorCount = 3,
                      .integrated = 0,
                      .canMapHostMemory = 1,
                      .concurrentKernels = 1,
                      .memoryBusWidth = 5120,
                      .l2CacheSize = 50 << 20,
                      .persistingL2CacheMaxSize = 0,
                      .maxThreadsPerMultiProcessor = 2048,
                      .sharedMemPerMultiprocessor = 228 << 10,
                      .regsPerMultiprocessor = 65536,
                      .cooperativeLaunch = 0,
                      .sharedMemPerBlockOptin = 227 << 10,
                      .maxBlocksPerMultiProcessor = 32,
                      .memoryPoolsSupported = 1};

// Kernels whose limit on dynamic shared memory was changed.
std::map<const void*, int>& shared_limits() {
  static std::map<const void*, int> limits;
  return limits;
}

// Kernels that may run in clusters of more than 8 blocks.
std::set<const void*>& large_clusters() {
  static std::set<const void*> kernels;
  return kernels;
}

std::size_t shared_limit(const void* kernel) {
  const auto found = shared_limits().find(kernel);
  return found == shared_limits().end() ? device.sharedMemPerBlock : static_cast<std::size_t>(found->second);
}

cudaError_t check(const cudaLaunchConfig_t& config, const void* kernel) {
  const unsigned grid[3] = {config.gridDim.x, config.gridDim.y, config.gridDim.z};
  const unsigned block[3] = {config.blockDim.x, config.blockDim.y, config.blockDim.z};
  const auto within = [](unsigned size, int limit) { return size > 0 && size <= static_cast<unsigned>(limit); };
  for (int i = 0; i < 3; ++i) {
    if (!within(grid[i], device.maxGridSize[i])) return cudaErrorInvalidConfiguration;
    if (!within(block[i], device.maxThreadsDim[i])) return cudaErrorInvalidConfiguration;
  }
  const std::uint64_t threads = std::uint64_t{block[0]} * block[1] * block[2];
  if (threads > static_cast<std::uint64_t>(device.maxThreadsPerBlock)) return cudaErrorInvalidConfiguration;
  if (config.dynamicSmemBytes > shared_limit(kernel)) return cudaErrorInvalidValue;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config.attrs[i];
    if (attribute.id == cudaLaunchAttributeCooperative && attribute.val.cooperative) return cudaErrorNotSupported;
    if (attribute.id != cudaLaunchAttributeClusterDimension) continue;
    const auto& cluster = attribute.val.clusterDim;
    if (cluster.y != 1 || cluster.z != 1) return cudaErrorNotSupported;
    if (cluster.x == 0 || grid[0] % cluster.x || threads * cluster.x > 4096) return cudaErrorInvalidClusterSize;
    if (cluster.x > 1 && device.major < 9) return cudaErrorNotSupported;
    if (cluster.x > (large_clusters().contains(kernel) ? 16u : 8u)) return cudaErrorInvalidClusterSize;
  }
  return cudaSuccess;
}

bool begins_early(const cudaLaunchConfig_t& config) {
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config.attrs[i];
    if (attribute.id == cudaLaunchAttributeProgrammaticStreamSerialization)
      return attribute.val.programmaticStreamSerializationAllowed != 0;
  }
  return false;
}

unsigned cluster_of(const cudaLaunchConfig_t& config) {
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    if (config.attrs[i].id == cudaLaunchAttributeClusterDimension) return config.attrs[i].val.clusterDim.x;
  }
  return 1;
}

}  // namespace

Call::Call() : lock_(mutex) { calls += depth++ == 0; }
Call::~Call() { --depth; }

cudaError_t Call::wanted_failure() const {
  if (depth > 1 || failure == cudaSuccess || until_failure-- > 0) return cudaSuccess;
  return std::exchange(failure, cudaSuccess);
}

cudaError_t report(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, std::function<void()> thread) {
  DIVE_HOST_CUDA_CALL;
  if (const cudaError_t error = check(config, kernel); error != cudaSuccess) return report(error);
  return report(enqueue(config.stream, cudaGraphNodeTypeKernel,
                        [grid = config.gridDim, block = config.blockDim, bytes = config.dynamicSmemBytes,
                         cluster = cluster_of(config), early = begins_early(config), thread = std::move(thread)] {
                          ++launches;
                          run_grid(grid, block, cluster, bytes, early, thread);
                        }));
}

cudaError_t set_attribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  DIVE_HOST_CUDA_CALL;
  if (attribute == cudaFuncAttributePreferredSharedMemoryCarveout) return cudaSuccess;
  if (attribute == cudaFuncAttributeNonPortableClusterSizeAllowed) {
    value ? static_cast<void>(large_clusters().insert(kernel)) : static_cast<void>(large_clusters().erase(kernel));
    return cudaSuccess;
  }
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return report(cudaErrorInvalidValue);
  const int most = static_cast<int>(device.sharedMemPerBlockOptin);
  if (value < 0 || value > most) return report(cudaErrorInvalidValue);
  shared_limits()[kernel] = value;
  return cudaSuccess;
}

cudaError_t get_attributes(cudaFuncAttributes* attributes, const void* kernel) {
  DIVE_HOST_CUDA_CALL;
  *attributes = {};
  attributes->maxThreadsPerBlock = 1024;
  attributes->ptxVersion = attributes->binaryVersion = 10 * device.major + device.minor;
  attributes->maxDynamicSharedSizeBytes = static_cast<int>(shared_limit(kernel));
  return cudaSuccess;
}

// By threads and shared memory, of which each block takes 1 KiB more than it asks for. Registers are not known here.
cudaError_t occupancy(int* blocks, const void* kernel, int block_size, std::size_t shared_bytes) {
  DIVE_HOST_CUDA_CALL;
  if (block_size < 1 || block_size > 1024) return report(cudaErrorInvalidValue);
  *blocks = 0;
  if (shared_bytes > shared_limit(kernel)) return cudaSuccess;
  const int by_shared = static_cast<int>(device.sharedMemPerMultiprocessor / (shared_bytes + 1024));
  const int warps = (block_size + 31) / 32;
  *blocks = std::min({by_shared, device.maxThreadsPerMultiProcessor / (32 * warps), device.maxBlocksPerMultiProcessor});
  return cudaSuccess;
}

// One wherever a launch would be accepted.
cudaError_t occupancy_of_clusters(int* clusters, const void* kernel, const cudaLaunchConfig_t& config) {
  DIVE_HOST_CUDA_CALL;
  const cudaError_t error = check(config, kernel);
  *clusters = error == cudaSuccess;
  return report(error);
}

}  // namespace dive_host_cuda

using namespace dive_host_cuda;

void dive_host_cuda_seed(std::uint64_t value) {
  const Call call;
  seed(value);
}
void dive_host_cuda_fail(std::uint64_t index, cudaError_t error) {
  until_failure = index;
  failure = error;
}
bool dive_host_cuda_failed() { return failure == cudaSuccess; }
std::uint64_t dive_host_cuda_launches() { return launches; }
std::uint64_t dive_host_cuda_calls() { return calls; }
cudaDeviceProp& dive_host_cuda_device() { return device; }
int& dive_host_cuda_driver_version() { return driver; }

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return last_error; }

namespace {

struct Text {
  cudaError_t error;
  const char *name, *text;
};

constexpr Text kTexts[] = {
    {cudaSuccess, "cudaSuccess", "no error"},
    {cudaErrorInvalidValue, "cudaErrorInvalidValue", "invalid argument"},
    {cudaErrorMemoryAllocation, "cudaErrorMemoryAllocation", "out of memory"},
    {cudaErrorInvalidConfiguration, "cudaErrorInvalidConfiguration", "invalid configuration argument"},
    {cudaErrorInsufficientDriver, "cudaErrorInsufficientDriver",
     "CUDA driver version is insufficient for CUDA runtime version"},
    {cudaErrorInvalidDeviceFunction, "cudaErrorInvalidDeviceFunction", "invalid device function"},
    {cudaErrorNoDevice, "cudaErrorNoDevice", "no CUDA-capable device is detected"},
    {cudaErrorInvalidDevice, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {cudaErrorNoKernelImageForDevice, "cudaErrorNoKernelImageForDevice",
     "no kernel image is available for execution on the device"},
    {cudaErrorInvalidResourceHandle, "cudaErrorInvalidResourceHandle", "invalid resource handle"},
    {cudaErrorIllegalState, "cudaErrorIllegalState", "the operation cannot be performed in the present state"},
    {cudaErrorNotReady, "cudaErrorNotReady", "device not ready"},
    {cudaErrorIllegalAddress, "cudaErrorIllegalAddress", "an illegal memory access was encountered"},
    {cudaErrorLaunchOutOfResources, "cudaErrorLaunchOutOfResources", "too many resources requested for launch"},
    {cudaErrorLaunchFailure, "cudaErrorLaunchFailure", "unspecified launch failure"},
    {cudaErrorNotPermitted, "cudaErrorNotPermitted", "operation not permitted"},
    {cudaErrorNotSupported, "cudaErrorNotSupported", "operation not supported"},
    {cudaErrorStreamCaptureUnsupported, "cudaErrorStreamCaptureUnsupported",
     "operation not permitted when stream is capturing"},
    {cudaErrorStreamCaptureInvalidated, "cudaErrorStreamCaptureInvalidated",
     "operation failed due to a previous error during capture"},
    {cudaErrorStreamCaptureImplicit, "cudaErrorStreamCaptureImplicit",
     "operation would make the legacy stream depend on a capturing blocking stream"},
    {cudaErrorCapturedEvent, "cudaErrorCapturedEvent",
     "operation not permitted on an event last recorded in a capturing stream"},
    {cudaErrorInvalidClusterSize, "cudaErrorInvalidClusterSize", "misconfigured cluster size"},
    {cudaErrorUnknown, "cudaErrorUnknown", "unknown error"},
};

const Text* text_of(cudaError_t error) {
  const auto named = [=](const Text& text) { return text.error == error; };
  const auto found = std::find_if(std::begin(kTexts), std::end(kTexts), named);
  return found == std::end(kTexts) ? nullptr : found;
}

// As the runtime, which asks the driver before anything else.
cudaError_t present() { return driver < kRuntime / 1000 * 1000 ? cudaErrorInsufficientDriver : cudaSuccess; }

}  // namespace

const char* cudaGetErrorName(cudaError_t error) {
  const Text* const text = text_of(error);
  return text ? text->name : "unrecognized error code";
}

const char* cudaGetErrorString(cudaError_t error) {
  const Text* const text = text_of(error);
  return text ? text->text : "unrecognized error code";
}

cudaError_t cudaGetDeviceCount(int* count) {
  DIVE_HOST_CUDA_CALL;
  const cudaError_t error = present();
  *count = error == cudaSuccess;
  return report(error);
}

cudaError_t cudaGetDevice(int* index) {
  DIVE_HOST_CUDA_CALL;
  *index = 0;
  return report(present());
}

cudaError_t cudaSetDevice(int index) {
  DIVE_HOST_CUDA_CALL;
  return report(index == 0 ? present() : cudaErrorInvalidDevice);
}

cudaError_t cudaDeviceSynchronize() {
  DIVE_HOST_CUDA_CALL;
  return report(forbidden_by_capture() ? cudaErrorStreamCaptureUnsupported : cudaSuccess);
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int index) {
  DIVE_HOST_CUDA_CALL;
  if (index != 0) return report(cudaErrorInvalidDevice);
  *properties = device;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int index) {
  DIVE_HOST_CUDA_CALL;
  if (index != 0) return report(cudaErrorInvalidDevice);
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
      *value = device.maxThreadsPerBlock;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = static_cast<int>(device.sharedMemPerBlock);
      return cudaSuccess;
    case cudaDevAttrWarpSize:
      *value = device.warpSize;
      return cudaSuccess;
    case cudaDevAttrMaxRegistersPerBlock:
      *value = device.regsPerBlock;
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      *value = device.multiProcessorCount;
      return cudaSuccess;
    case cudaDevAttrCanMapHostMemory:
      *value = device.canMapHostMemory;
      return cudaSuccess;
    case cudaDevAttrL2CacheSize:
      *value = device.l2CacheSize;
      return cudaSuccess;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *value = device.maxThreadsPerMultiProcessor;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = device.major;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = device.minor;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = static_cast<int>(device.sharedMemPerMultiprocessor);
      return cudaSuccess;
    case cudaDevAttrCooperativeLaunch:
      *value = device.cooperativeLaunch;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = static_cast<int>(device.sharedMemPerBlockOptin);
      return cudaSuccess;
    case cudaDevAttrMaxBlocksPerMultiprocessor:
      *value = device.maxBlocksPerMultiProcessor;
      return cudaSuccess;
    case cudaDevAttrMemoryPoolsSupported:
      *value = device.memoryPoolsSupported;
      return cudaSuccess;
  }
  return report(cudaErrorInvalidValue);
}

cudaError_t cudaDriverGetVersion(int* version) {
  DIVE_HOST_CUDA_CALL;
  *version = driver;
  return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int* version) {
  DIVE_HOST_CUDA_CALL;
  *version = kRuntime;
  return cudaSuccess;
}
