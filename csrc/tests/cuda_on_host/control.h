// What a test can set and ask of CUDA on the host.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda_runtime.h"

// Under the thread sanitizer a kernel takes a hundred times as long, and is looked at whatever the seed: a few will do.
#if defined(__SANITIZE_THREAD__)
constexpr bool kThreadSanitizer = true;
#else
constexpr bool kThreadSanitizer = false;
#endif

// Starts the sequence that orders blocks and threads anew.
void dive_host_cuda_seed(std::uint64_t seed);

// Kernels run since the program began, those of graphs included, and calls of the API.
std::uint64_t dive_host_cuda_launches();
std::uint64_t dive_host_cuda_calls();

// Makes one call fail: of those that begin after this one and free nothing, number `index`. So a test can walk through
// every failure that a piece of code can meet, until an index is reached that dive_host_cuda_failed() denies.
void dive_host_cuda_fail(std::uint64_t index, cudaError_t error);
bool dive_host_cuda_failed();

// The device, to be changed at will: a smaller totalGlobalMem makes cudaMalloc fail sooner.
cudaDeviceProp& dive_host_cuda_device();

// 13000 at first; 0 is no driver at all.
int& dive_host_cuda_driver_version();

// Of device and pinned memory. What is live when the program ends is also listed on stderr.
std::size_t dive_host_cuda_live_bytes();
