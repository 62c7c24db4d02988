// The runtime of CUDA on the host: graphs, captures, limits, memory and failures.
#include <utility>

#include "tests/cuda_on_host_check.h"
#include "tests/cuda_on_host_sample.h"

namespace cuda_on_host_test {
namespace {

void a_captured_graph_replays() {
  const Stream stream;
  std::vector<int> x(100, 1);
  const Device<int> device(x), partial(3), sum(1);
  const Device<unsigned> ticket(std::vector<unsigned>{0});
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  const std::uint64_t before = dive_host_cuda_launches();
  check(sample::sum_all(device.get(), partial.get(), ticket.get(), sum.get(), 100, 3, stream));
  check(sample::sum_all(device.get(), partial.get(), ticket.get(), sum.get(), 50, 3, stream));
  cudaGraph_t graph;
  check(cudaStreamEndCapture(stream, &graph));
  expect(dive_host_cuda_launches() == before, "a capture runs nothing");
  std::size_t nodes = 0;
  check(cudaGraphGetNodes(graph, nullptr, &nodes));
  expect(nodes == 2, "two nodes");
  cudaGraphExec_t exec;
  check(cudaGraphInstantiate(&exec, graph));
  check(cudaGraphDestroy(graph));
  for (int i = 0; i < 3; ++i) check(cudaGraphLaunch(exec, stream));
  check(cudaStreamSynchronize(stream));
  check(cudaGraphExecDestroy(exec));
  expect(dive_host_cuda_launches() == before + 6, "two launches a replay");
  expect(sum.values()[0] == 50, "the sum of the second launch");
}

void a_while_node_loops_until_its_kernel_ends_it() {
  constexpr int kWanted = 9;
  const Stream stream;
  const Device<int> tokens(kWanted), length(1);
  cudaGraph_t graph, captured;
  check(cudaGraphCreate(&graph, 0));
  cudaGraphConditionalHandle handle;
  check(cudaGraphConditionalHandleCreate(&handle, graph, 1, cudaGraphCondAssignDefault));
  check(cudaStreamBeginCaptureToGraph(stream, graph, nullptr, nullptr, 0, cudaStreamCaptureModeThreadLocal));
  check(cudaMemsetAsync(length.get(), 0, sizeof(int), stream));
  check(cudaStreamEndCapture(stream, &captured));
  expect(captured == graph, "a capture into a graph returns it");
  cudaGraphNodeParams params{};
  params.type = cudaGraphNodeTypeConditional;
  params.conditional.handle = handle;
  params.conditional.type = cudaGraphCondTypeWhile;
  params.conditional.size = 1;
  cudaGraphNode_t node;
  check(cudaGraphAddNode(&node, graph, nullptr, nullptr, 0, &params));
  cudaGraph_t body = params.conditional.phGraph_out[0];
  check(cudaStreamBeginCaptureToGraph(stream, body, nullptr, nullptr, 0, cudaStreamCaptureModeRelaxed));
  check(sample::append(tokens.get(), length.get(), kWanted, handle, stream));
  check(cudaStreamEndCapture(stream, &body));
  cudaGraphExec_t exec;
  check(cudaGraphInstantiate(&exec, graph, 0));
  const std::uint64_t launches = dive_host_cuda_launches(), calls = dive_host_cuda_calls();
  for (int i = 0; i < 2; ++i) check(cudaGraphLaunch(exec, stream));
  expect(dive_host_cuda_calls() == calls + 2, "one call a launch");
  expect(dive_host_cuda_launches() == launches + 2 * kWanted, "a launch a token");
  expect(length.values()[0] == kWanted, "the length");
  const std::vector<int> found = tokens.values();
  for (int i = 0; i < kWanted; ++i) expect(found[i] == i, "a token");
  check(cudaGraphExecDestroy(exec));
  check(cudaGraphDestroy(graph));
}

void a_capture_forbids_what_would_wait_for_it() {
  cudaStream_t stream;
  check(cudaStreamCreate(&stream));
  int value = 0, copy = 0;
  void* pointer = nullptr;
  const auto spoils = [&](auto call, cudaError_t expected) {
    check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    check(call(), expected);
    cudaStreamCaptureStatus status;
    check(cudaStreamIsCapturing(stream, &status));
    expect(status == cudaStreamCaptureStatusInvalidated, "the capture is spoilt");
    check(sample::nothing(1, 32, 0, stream), cudaErrorStreamCaptureInvalidated);
    cudaGraph_t graph;
    check(cudaStreamEndCapture(stream, &graph), cudaErrorStreamCaptureInvalidated);
    expect(graph == nullptr, "no graph");
  };
  spoils([&] { return cudaMalloc(&pointer, 4); }, cudaErrorStreamCaptureUnsupported);
  spoils([&] { return cudaStreamSynchronize(stream); }, cudaErrorStreamCaptureUnsupported);
  spoils([&] { return cudaMemcpy(&copy, &value, 4, cudaMemcpyDefault); }, cudaErrorStreamCaptureUnsupported);
  spoils([&] { return cudaDeviceSynchronize(); }, cudaErrorStreamCaptureUnsupported);
  spoils([&] { return sample::nothing(1, 32, 0, nullptr); }, cudaErrorStreamCaptureImplicit);
  cudaGraph_t graph;
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed));
  check(cudaMalloc(&pointer, 4));
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed), cudaErrorIllegalState);
  check(cudaStreamEndCapture(stream, &graph));
  check(cudaStreamEndCapture(stream, &graph), cudaErrorIllegalState);
  check(cudaGraphDestroy(graph));
  check(cudaFree(pointer));
  check(cudaStreamBeginCapture(nullptr, cudaStreamCaptureModeGlobal), cudaErrorStreamCaptureUnsupported);
  check(cudaStreamDestroy(stream));
}

void launches_beyond_the_limits_are_refused() {
  check(sample::nothing(1, 1024, 0, nullptr));
  check(sample::nothing(1, dim3(1024, 2), 0, nullptr), cudaErrorInvalidConfiguration);
  check(sample::nothing(1, 1025, 0, nullptr), cudaErrorInvalidConfiguration);
  check(sample::nothing(0, 32, 0, nullptr), cudaErrorInvalidConfiguration);
  check(sample::nothing(dim3(1, 65536), 32, 0, nullptr), cudaErrorInvalidConfiguration);
  check(sample::nothing(1, 32, 48 << 10, nullptr));
  check(sample::nothing(1, 32, (48 << 10) + 1, nullptr), cudaErrorInvalidValue);
  check(sample::raise_shared_limit_of_nothing((227 << 10) + 1), cudaErrorInvalidValue);
  check(sample::raise_shared_limit_of_nothing(227 << 10));
  check(sample::nothing(1, 32, 227 << 10, nullptr));
}

void memory_is_counted() {
  const std::size_t before = dive_host_cuda_live_bytes();
  const std::size_t total = std::exchange(dive_host_cuda_device().totalGlobalMem, 1000);
  void *first, *second;
  check(cudaMalloc(&first, 600));
  check(cudaMalloc(&second, 401), cudaErrorMemoryAllocation);
  std::size_t left, whole;
  check(cudaMemGetInfo(&left, &whole));
  expect(left == 400 && whole == 1000, "400 bytes of 1000 are left");
  int *host, *mapped;
  check(cudaHostAlloc(&host, 4000, cudaHostAllocMapped));
  check(cudaHostGetDevicePointer(&mapped, host, 0));
  check(cudaHostGetDevicePointer(&mapped, first, 0), cudaErrorInvalidValue);
  expect(dive_host_cuda_live_bytes() == before + 4600, "live bytes");
  check(cudaFree(host), cudaErrorInvalidValue);
  check(cudaFreeHost(host));
  check(cudaFree(first));
  check(cudaFree(nullptr));
  check(cudaFree(&left), cudaErrorInvalidValue);
  dive_host_cuda_device().totalGlobalMem = total;
}

void the_driver_can_be_missing() {
  int count;
  dive_host_cuda_driver_version() = 0;
  check(cudaGetDeviceCount(&count), cudaErrorInsufficientDriver);
  dive_host_cuda_driver_version() = 13000;
  check(cudaGetDeviceCount(&count));
  expect(count == 1, "one device");
}

// The walk that dive_host_cuda_fail is for.
void every_call_can_be_made_to_fail() {
  const std::size_t before = dive_host_cuda_live_bytes();
  int failures = 0;
  for (;; ++failures) {
    const Stream stream;
    int* data = nullptr;
    dive_host_cuda_fail(failures, cudaErrorUnknown);
    cudaError_t error = cudaMalloc(&data, sizeof(int));
    if (error == cudaSuccess) error = cudaMemsetAsync(data, 0, sizeof(int), stream);
    if (error == cudaSuccess) error = sample::nothing(1, 32, 0, stream);
    if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
    check(cudaFree(data));
    expect(dive_host_cuda_live_bytes() == before, "what was allocated is freed");
    if (error == cudaSuccess) break;
    expect(error == cudaErrorUnknown && dive_host_cuda_failed(), "the failure that was asked for");
    expect(cudaGetLastError() == cudaErrorUnknown, "the last error is remembered");
  }
  expect(failures == 4 && !dive_host_cuda_failed(), "four calls can fail");
  dive_host_cuda_fail(0, cudaSuccess);
}

}  // namespace

std::vector<Test> runtime_tests() {
  return {
      {"a captured graph replays", a_captured_graph_replays},
      {"a while node loops until its kernel ends it", a_while_node_loops_until_its_kernel_ends_it},
      {"a capture forbids what would wait for it", a_capture_forbids_what_would_wait_for_it},
      {"launches beyond the limits are refused", launches_beyond_the_limits_are_refused},
      {"memory is counted", memory_is_counted},
      {"the driver can be missing", the_driver_can_be_missing},
      {"every call can be made to fail", every_call_can_be_made_to_fail},
  };
}

}  // namespace cuda_on_host_test
