// Starting a kernel so that it may begin while the one before it still ends (device_math.cuh, take_turn).
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

namespace dive::cuda {

// How a kernel is started, in clusters of `blocks` neighbours along x.
struct ClusterLaunch {
  ClusterLaunch(cudaStream_t stream, dim3 grid, int blocks, int threads, std::size_t shared_bytes) {
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim.x = static_cast<unsigned>(blocks);
    attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
    config.gridDim = grid;
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = blocks > 1 ? 2 : 1;
  }
  ClusterLaunch(const ClusterLaunch&) = delete;

  cudaLaunchAttribute attributes[2]{};
  cudaLaunchConfig_t config{};
};

// Raises a kernel's limit on shared memory, which is 48 KiB, where it wants more. It is never lowered: recorded steps
// of other decoders may need what it was.
template <class Kernel>
cudaError_t allow_shared(Kernel kernel, std::size_t bytes) {
  if (bytes <= 48 * 1024) return cudaSuccess;
  cudaFuncAttributes attributes{};
  if (const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel); error != cudaSuccess) return error;
  if (static_cast<int>(bytes) <= attributes.maxDynamicSharedSizeBytes) return cudaSuccess;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
}

template <class... Parameters, class... Arguments>
cudaError_t launch(const ClusterLaunch& how, void (*kernel)(Parameters...), const Arguments&... arguments) {
  cudaFuncAttributes attributes{};
  if (const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel); error != cudaSuccess) return error;
  cudaLaunchConfig_t config = how.config;
  // Code for earlier architectures than 9.0, which later devices run as well, does not wait for the kernel before it
  // (take_turn), and would begin early all the same.
  if (attributes.ptxVersion < 90) {
    ++config.attrs;
    --config.numAttrs;
  }
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

template <class... Parameters, class... Arguments>
cudaError_t launch(cudaStream_t stream, dim3 grid, int threads, std::size_t shared_bytes, void (*kernel)(Parameters...),
                   const Arguments&... arguments) {
  return launch(ClusterLaunch(stream, grid, 1, threads, shared_bytes), kernel, arguments...);
}

}  // namespace dive::cuda
