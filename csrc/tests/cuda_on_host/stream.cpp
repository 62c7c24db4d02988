// Streams, events and graphs. Work is done at once or, in a stream that captures, becomes a node; a graph's nodes run
// in the order of their making, which respects every dependency that one stream can express. A capture that forks to a
// second stream by events is not modelled.
#include <algorithm>
#include <chrono>
#include <deque>
#include <memory>
#include <thread>
#include <vector>

#include "block.h"
#include "state.h"

struct CUgraphNode_st {
  cudaGraphNodeType type;
  std::function<void()> work;  // but for a conditional node
  cudaGraphConditionalHandle handle = 0;
  cudaGraphConditionalNodeType condition = cudaGraphCondTypeIf;
  std::vector<std::shared_ptr<CUgraph_st>> bodies = {};
  std::vector<cudaGraph_t> body_pointers = {};  // what phGraph_out points to
};

struct CUgraph_st {
  std::vector<std::shared_ptr<CUgraphNode_st>> nodes;
  bool is_body = false;
};

struct CUgraphExec_st {
  CUgraph_st graph;
};

struct CUstream_st {
  bool blocking = true;
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
  std::thread::id thread = {};  // that began the capture
  cudaGraph_t graph = nullptr;  // that it captures into
  bool owns_graph = false;      // until the end of the capture
};

struct CUevent_st {
  bool timed, recorded, captured;
  std::chrono::steady_clock::time_point time;
};

namespace dive_host_cuda {
namespace {

struct Condition {
  cudaGraph_t graph;
  unsigned default_value;
  bool assign_default;
  unsigned value;
};

// Handles are indices; a deque, as kernels set values while others may be added.
std::deque<Condition> conditions;
std::vector<cudaStream_t> capturing;

bool is_default(cudaStream_t stream) {
  return stream == nullptr || stream == cudaStreamLegacy || stream == cudaStreamPerThread;
}

bool captures(cudaStream_t stream) { return !is_default(stream) && stream->status != cudaStreamCaptureStatusNone; }

template <class Predicate>
bool invalidate(Predicate predicate) {
  bool any = false;
  for (const cudaStream_t stream : capturing) {
    if (!predicate(stream)) continue;
    stream->status = cudaStreamCaptureStatusInvalidated;
    any = true;
  }
  return any;
}

void run(const CUgraph_st& graph);

void run_conditional(const CUgraphNode_st& node) {
  settle();
  const unsigned& value = conditions[node.handle].value;
  if (node.condition == cudaGraphCondTypeIf) {
    if (value) return run(*node.bodies[0]);
    if (node.bodies.size() == 2) run(*node.bodies[1]);
    return;
  }
  constexpr int kRounds = 1'000'000;
  for (int round = 0; value; ++round) {
    if (round == kRounds) fail("a WHILE node of a graph", "a million rounds, and no kernel ended it");
    run(*node.bodies[0]);
  }
}

// Kernels in a row may begin before the one before them ends, where they ask for that. All else waits.
void run(const CUgraph_st& graph) {
  settle();
  for (const auto& node : graph.nodes) {
    if (node->type != cudaGraphNodeTypeKernel) settle();
    node->type == cudaGraphNodeTypeConditional ? run_conditional(*node) : node->work();
  }
  settle();
}

// An executable graph does not change with the one that it was made of.
CUgraph_st copy(const CUgraph_st& graph) {
  CUgraph_st result;
  for (const auto& node : graph.nodes) {
    result.nodes.push_back(std::make_shared<CUgraphNode_st>(*node));
    for (auto& body : result.nodes.back()->bodies) body = std::make_shared<CUgraph_st>(copy(*body));
  }
  return result;
}

// Values that no default sets are undefined when a graph starts.
void start_conditions(const CUgraph_st& graph) {
  for (const auto& node : graph.nodes) {
    if (node->type != cudaGraphNodeTypeConditional) continue;
    Condition& condition = conditions[node->handle];
    condition.value = condition.assign_default ? condition.default_value : static_cast<unsigned>(random_below(2));
    for (const auto& body : node->bodies) start_conditions(*body);
  }
}

cudaError_t begin_capture(cudaStream_t stream, cudaStreamCaptureMode mode, cudaGraph_t graph, bool owns) {
  stream->status = cudaStreamCaptureStatusActive;
  stream->mode = mode;
  stream->thread = std::this_thread::get_id();
  stream->graph = graph;
  stream->owns_graph = owns;
  capturing.push_back(stream);
  return cudaSuccess;
}

cudaError_t check_capture(cudaStream_t stream) {
  if (is_default(stream)) return cudaErrorStreamCaptureUnsupported;
  return captures(stream) ? cudaErrorIllegalState : cudaSuccess;
}

void end_capture(cudaStream_t stream) {
  stream->status = cudaStreamCaptureStatusNone;
  std::erase(capturing, stream);
}

}  // namespace

bool forbidden_by_capture() {
  return invalidate([](cudaStream_t stream) {
    return stream->mode == cudaStreamCaptureModeGlobal ||
           (stream->mode == cudaStreamCaptureModeThreadLocal && stream->thread == std::this_thread::get_id());
  });
}

cudaError_t enqueue(cudaStream_t stream, cudaGraphNodeType type, std::function<void()> work) {
  if (is_default(stream) && invalidate([](cudaStream_t other) { return other->blocking; })) {
    return cudaErrorStreamCaptureImplicit;
  }
  if (!captures(stream)) {
    work();
    settle();
    return cudaSuccess;
  }
  if (stream->status == cudaStreamCaptureStatusInvalidated) return cudaErrorStreamCaptureInvalidated;
  CUgraphNode_st node{.type = type, .work = std::move(work)};
  stream->graph->nodes.push_back(std::make_shared<CUgraphNode_st>(std::move(node)));
  return cudaSuccess;
}

}  // namespace dive_host_cuda

using namespace dive_host_cuda;

cudaError_t cudaStreamCreate(cudaStream_t* stream) { return cudaStreamCreateWithFlags(stream, cudaStreamDefault); }

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  DIVE_HOST_CUDA_CALL;
  if (flags & ~cudaStreamNonBlocking) return report(cudaErrorInvalidValue);
  *stream = new CUstream_st{.blocking = !(flags & cudaStreamNonBlocking)};
  return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  const Call call;
  if (is_default(stream)) return report(cudaErrorInvalidResourceHandle);
  if (captures(stream)) {
    if (stream->owns_graph) delete stream->graph;
    end_capture(stream);
  }
  delete stream;
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  DIVE_HOST_CUDA_CALL;
  const bool forbidden = is_default(stream) && forbidden_by_capture();
  if (!forbidden && !captures(stream)) return cudaSuccess;
  invalidate([=](cudaStream_t other) { return other == stream; });
  return report(cudaErrorStreamCaptureUnsupported);
}

cudaError_t cudaStreamQuery(cudaStream_t stream) { return cudaStreamSynchronize(stream); }

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
  DIVE_HOST_CUDA_CALL;
  if (flags != 0) return report(cudaErrorInvalidValue);
  return report(event->captured && !captures(stream) ? cudaErrorNotSupported : cudaSuccess);
}

cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
  DIVE_HOST_CUDA_CALL;
  return report(enqueue(stream, cudaGraphNodeTypeHost, [=] { function(data); }));
}

cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, cudaEventDefault); }

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
  DIVE_HOST_CUDA_CALL;
  if (flags & ~(cudaEventBlockingSync | cudaEventDisableTiming)) return report(cudaErrorInvalidValue);
  *event = new CUevent_st{.timed = !(flags & cudaEventDisableTiming), .recorded = false, .captured = false, .time = {}};
  return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  const Call call;
  delete event;
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  DIVE_HOST_CUDA_CALL;
  event->captured = captures(stream);
  event->recorded = true;
  event->time = std::chrono::steady_clock::now();
  return cudaSuccess;
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  DIVE_HOST_CUDA_CALL;
  return report(event->captured ? cudaErrorCapturedEvent : cudaSuccess);
}

cudaError_t cudaEventQuery(cudaEvent_t event) { return cudaEventSynchronize(event); }

cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
  DIVE_HOST_CUDA_CALL;
  for (const cudaEvent_t event : {start, end}) {
    if (!event->timed || !event->recorded) return report(cudaErrorInvalidResourceHandle);
    if (event->captured) return report(cudaErrorCapturedEvent);
  }
  *milliseconds = std::chrono::duration<float, std::milli>(end->time - start->time).count();
  return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
  DIVE_HOST_CUDA_CALL;
  if (const cudaError_t error = check_capture(stream); error != cudaSuccess) return report(error);
  return begin_capture(stream, mode, new CUgraph_st, true);
}

cudaError_t cudaStreamBeginCaptureToGraph(cudaStream_t stream, cudaGraph_t graph, const cudaGraphNode_t*,
                                          const cudaGraphEdgeData*, std::size_t, cudaStreamCaptureMode mode) {
  DIVE_HOST_CUDA_CALL;
  if (!graph) return report(cudaErrorInvalidValue);
  if (const cudaError_t error = check_capture(stream); error != cudaSuccess) return report(error);
  return begin_capture(stream, mode, graph, false);
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  DIVE_HOST_CUDA_CALL;
  if (!captures(stream)) return report(cudaErrorIllegalState);
  const bool valid = stream->status == cudaStreamCaptureStatusActive;
  end_capture(stream);
  if (!valid && stream->owns_graph) delete stream->graph;
  *graph = valid ? stream->graph : nullptr;
  return report(valid ? cudaSuccess : cudaErrorStreamCaptureInvalidated);
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  DIVE_HOST_CUDA_CALL;
  *status = captures(stream) ? stream->status : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

cudaError_t cudaGraphCreate(cudaGraph_t* graph, unsigned flags) {
  DIVE_HOST_CUDA_CALL;
  if (flags != 0) return report(cudaErrorInvalidValue);
  *graph = new CUgraph_st;
  return cudaSuccess;
}

// A body belongs to its node.
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  const Call call;
  if (!graph || graph->is_body) return report(cudaErrorInvalidValue);
  delete graph;
  return cudaSuccess;
}

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, std::size_t* count) {
  DIVE_HOST_CUDA_CALL;
  if (!nodes) {
    *count = graph->nodes.size();
    return cudaSuccess;
  }
  for (std::size_t i = 0; i < *count; ++i) nodes[i] = i < graph->nodes.size() ? graph->nodes[i].get() : nullptr;
  *count = std::min(*count, graph->nodes.size());
  return cudaSuccess;
}

cudaError_t cudaGraphConditionalHandleCreate(cudaGraphConditionalHandle* handle, cudaGraph_t graph,
                                             unsigned default_value, unsigned flags) {
  DIVE_HOST_CUDA_CALL;
  if (!graph || flags & ~cudaGraphCondAssignDefault) return report(cudaErrorInvalidValue);
  *handle = conditions.size();
  conditions.push_back({graph, default_value, flags == cudaGraphCondAssignDefault, 0});
  return cudaSuccess;
}

// Of the kinds of nodes, the one that no capture makes. The handle of a body's node is of the graph around it.
cudaError_t cudaGraphAddNode(cudaGraphNode_t* node, cudaGraph_t graph, const cudaGraphNode_t*, const cudaGraphEdgeData*,
                             std::size_t, cudaGraphNodeParams* params) {
  DIVE_HOST_CUDA_CALL;
  if (!graph || !params) return report(cudaErrorInvalidValue);
  if (params->type != cudaGraphNodeTypeConditional) return report(cudaErrorNotSupported);
  cudaConditionalNodeParams& wanted = params->conditional;
  if (wanted.handle >= conditions.size()) return report(cudaErrorInvalidValue);
  if (!graph->is_body && conditions[wanted.handle].graph != graph) return report(cudaErrorInvalidValue);
  if (wanted.type == cudaGraphCondTypeSwitch) return report(cudaErrorNotSupported);
  const unsigned most = wanted.type == cudaGraphCondTypeIf ? 2 : 1;
  if (wanted.size < 1 || wanted.size > most) return report(cudaErrorInvalidValue);
  auto made = std::make_shared<CUgraphNode_st>();
  made->type = params->type;
  made->handle = wanted.handle;
  made->condition = wanted.type;
  for (unsigned i = 0; i < wanted.size; ++i) {
    made->bodies.push_back(std::make_shared<CUgraph_st>());
    made->bodies.back()->is_body = true;
    made->body_pointers.push_back(made->bodies.back().get());
  }
  wanted.phGraph_out = made->body_pointers.data();
  graph->nodes.push_back(made);
  *node = made.get();
  return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long) {
  DIVE_HOST_CUDA_CALL;
  if (!graph || graph->is_body) return report(cudaErrorInvalidValue);
  *exec = new CUgraphExec_st{copy(*graph)};
  return cudaSuccess;
}

cudaError_t cudaGraphUpload(cudaGraphExec_t exec, cudaStream_t) {
  DIVE_HOST_CUDA_CALL;
  return report(exec ? cudaSuccess : cudaErrorInvalidValue);
}

// In a stream that captures, the runtime would make a child graph.
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
  DIVE_HOST_CUDA_CALL;
  if (!exec) return report(cudaErrorInvalidValue);
  if (captures(stream)) return report(cudaErrorStreamCaptureUnsupported);
  start_conditions(exec->graph);
  run(exec->graph);
  return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
  const Call call;
  if (!exec) return report(cudaErrorInvalidValue);
  delete exec;
  return cudaSuccess;
}

// Takes no lock: the launch that runs the kernel holds it.
void cudaGraphSetConditional(cudaGraphConditionalHandle handle, unsigned value) {
  if (handle >= conditions.size()) fail("cudaGraphSetConditional", "no such handle");
  conditions[handle].value = value;
}
