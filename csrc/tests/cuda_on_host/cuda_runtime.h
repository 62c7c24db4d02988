// CUDA on the host: compiles our .cu files as plain C++ and runs their kernels on a CPU, thread by thread, so that
// what a kernel computes, and whether its threads wait for one another, can be tested without a GPU, under the address,
// undefined-behaviour and thread sanitizers. A target takes part by dive_cuda_on_host() in CMakeLists.txt, which puts
// this folder in front of the include path; production code knows nothing of it.
//
// Modelled
//   - a block's threads as fibers, one running at a time, the next chosen at random at every __syncthreads, warp
//     operation, atomic and fence; blocks one after the other in random order. Same seed (dive_host_cuda_seed), same
//     order. A missing barrier or a dependence on the order of blocks gives wrong results for some seeds;
//   - under -fsanitize=thread, what orders two accesses: __syncthreads, __syncwarp and the cluster's barrier, an atomic
//     between two fences, the end of a kernel, and for a kernel that begins early wait_for_previous_kernel() behind its
//     predecessor's let_next_kernel_start(), in a graph. No shuffle, no atomic without fences, and not that two blocks
//     ran one after the other. Two accesses without an order are reported whatever the seed where they are of one
//     cluster, and of two for some seeds. Copies into shared memory count twice, when asked for and when waited for;
//   - clusters of blocks along x, whose threads run together, and reading from each other's dynamic shared memory;
//   - warp operations as meetings of all 32 lanes, masks full. Barriers and warp operations that not all threads reach
//     end the program with a message instead of hanging;
//   - device memory as allocations of exactly the size asked for, and dynamic shared memory as one for each block,
//     filled with 0xff, a NaN in every format, before use;
//   - the limits on launches with the runtime's own error codes, stream capture, graphs, conditional WHILE and IF
//     nodes, and which calls a capture forbids.
// Not modelled
//   - time, and anything happening at the same time: kernels, blocks, streams and copies finish before the call
//     returns. A block that spins until another writes never ends, nor does a thread that spins on a plain load;
//   - the memory model beyond that: everything is visible at once, a fence orders what lies between it and the atomic
//     as well, and fences are of all scopes;
//   - two memories: a host pointer given to a kernel works here and nowhere else;
//   - registers, occupancy, alignment of shared memory beyond 128 bytes, __launch_bounds__, constant memory's size,
//     the limit on static shared memory, which also keeps its contents from block to block, a race to the sanitizer;
//   - a capture that forks to a second stream by events, memory nodes, SWITCH nodes, cooperative launches,
//     warp operations on part of a warp, named barriers, float atomics;
//   - contraction of a * b + c, approximate functions and subnormals as the device's compiler options treat them;
//   - <<<>>>, which is not C++: launch by cudaLaunchKernelEx. `extern __shared__`: use dynamic_shared_memory (ptx.h).
#pragma once

#include "host_api.h"
#include "host_device.h"
#include "host_types.h"
