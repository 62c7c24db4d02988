// Starting a kernel so that it may begin while the one before it still ends (ptx.h, wait_for_previous_kernel).
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

namespace dive::cuda {

template <class... Parameters, class... Arguments>
cudaError_t launch(cudaStream_t stream, dim3 grid, int threads, std::size_t shared_bytes,
                   void (*kernel)(Parameters...), const Arguments&... arguments) {
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

}  // namespace dive::cuda
