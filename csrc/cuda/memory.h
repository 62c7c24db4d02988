// Memory, streams and errors of the CUDA runtime as C++ objects, for the step. What fails throws std::runtime_error
// with the runtime's name for it.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace dive::cuda {

// Memory was wanted that is not there; behind freeing some, what was begun may be tried again.
struct OutOfMemory : std::runtime_error {
  explicit OutOfMemory(const std::string& what)
      : std::runtime_error("CUDA: out of memory: " + what + "; fewer rows at a time (batch_size) need less") {}
};

// Of work that was started: a device that fails in it is not to be tried again, whatever the error says.
inline void check_work(cudaError_t error, const char* doing) {
  if (error == cudaSuccess) return;
  // The runtime remembers a failure until it is asked; left there, the next launch would be blamed for it.
  static_cast<void>(cudaGetLastError());
  throw std::runtime_error(std::string("CUDA: ") + doing + ": " + cudaGetErrorName(error) + ": " +
                           cudaGetErrorString(error));
}

inline void check(cudaError_t error, const char* doing) {
  if (error == cudaErrorMemoryAllocation) {
    static_cast<void>(cudaGetLastError());
    throw OutOfMemory(doing);
  }
  check_work(error, doing);
}

// Bytes on the current device. Throws OutOfMemory that says how much was wanted, for what, and how much is free.
inline void* allocate(std::size_t bytes, const char* what) {
  void* data = nullptr;
  const cudaError_t error = cudaMalloc(&data, bytes ? bytes : 1);
  if (error == cudaErrorMemoryAllocation) {
    static_cast<void>(cudaGetLastError());
    std::size_t free = 0, total = 0;
    static_cast<void>(cudaMemGetInfo(&free, &total));
    const auto mebibytes = [](std::size_t n) { return std::to_string((n + (1 << 20) - 1) >> 20) + " MiB"; };
    throw OutOfMemory(mebibytes(bytes) + " for " + what + ", and " + mebibytes(free) + " of " + mebibytes(total) +
                      " are free");
  }
  check(error, what);
  return data;
}

// Makes a device current until the end of the scope.
class CurrentDevice {
 public:
  explicit CurrentDevice(int device) {
    check(cudaGetDevice(&previous_), "asking for the current device");
    check(cudaSetDevice(device), "choosing the device");
  }
  ~CurrentDevice() { static_cast<void>(cudaSetDevice(previous_)); }
  CurrentDevice(const CurrentDevice&) = delete;

 private:
  int previous_ = 0;
};

template <class T>
class DeviceArray {
 public:
  DeviceArray() = default;
  DeviceArray(std::size_t count, const char* what)
      : data_(static_cast<T*>(allocate(count * sizeof(T), what))), count_(count) {}
  // Takes over what cudaMalloc gave.
  DeviceArray(T* data, std::size_t count) : data_(data), count_(count) {}
  DeviceArray(DeviceArray&& other) noexcept { *this = std::move(other); }
  DeviceArray& operator=(DeviceArray&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(count_, other.count_);
    return *this;
  }
  ~DeviceArray() {
    if (data_) static_cast<void>(cudaFree(data_));
  }

  T* data() const { return data_; }
  std::size_t size() const { return count_; }

 private:
  T* data_ = nullptr;
  std::size_t count_ = 0;
};

template <class T>
DeviceArray<T> uploaded(const std::vector<T>& values, const char* what) {
  DeviceArray<T> array(values.size(), what);
  check(cudaMemcpy(array.data(), values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice), what);
  // The bytes may still be on their way from a buffer of the driver's, and our own streams wait for no other.
  check(cudaStreamSynchronize(nullptr), what);
  return array;
}

// Memory of the host that the device copies from and to by itself, and that kernels reach at on_device().
template <class T>
class PinnedArray {
 public:
  PinnedArray() = default;
  explicit PinnedArray(std::size_t count) : count_(count) {
    void* data = nullptr;
    check(cudaHostAlloc(&data, count ? count * sizeof(T) : 1, cudaHostAllocMapped), "pinning memory of the host");
    data_ = static_cast<T*>(data);
  }
  PinnedArray(PinnedArray&& other) noexcept { *this = std::move(other); }
  PinnedArray& operator=(PinnedArray&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(count_, other.count_);
    return *this;
  }
  ~PinnedArray() {
    if (data_) static_cast<void>(cudaFreeHost(data_));
  }

  T* data() const { return data_; }
  T* on_device() const {
    void* data = nullptr;
    check(cudaHostGetDevicePointer(&data, data_, 0), "mapping memory of the host");
    return static_cast<T*>(data);
  }
  T& operator[](std::size_t i) const { return data_[i]; }
  std::size_t size() const { return count_; }

 private:
  T* data_ = nullptr;
  std::size_t count_ = 0;
};

class OwnStream {
 public:
  OwnStream() { check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "making a stream"); }
  ~OwnStream() { static_cast<void>(cudaStreamDestroy(stream_)); }
  OwnStream(const OwnStream&) = delete;

  operator cudaStream_t() const { return stream_; }
  void wait() const { check_work(cudaStreamSynchronize(stream_), "running a step"); }

  // Whether all that was started has ended.
  bool idle() const {
    const cudaError_t status = cudaStreamQuery(stream_);
    if (status == cudaErrorNotReady) {
      // No failure, and remembered as one; torch, which asks after its launches, would report it.
      static_cast<void>(cudaGetLastError());
      return false;
    }
    check_work(status, "running a step");
    return true;
  }

 private:
  cudaStream_t stream_ = nullptr;
};

// Held by who records, and by who waits for a whole device, which must not record meanwhile.
inline std::mutex& recording() {
  static std::mutex mutex;
  return mutex;
}

// Waits for what other streams of the current device do, which are not known here: PyTorch's.
inline void wait_for_others(const char* what) {
  const std::lock_guard lock(recording());
  check_work(cudaDeviceSynchronize(), what);
}

// Kernels recorded once and started together.
class Graph {
 public:
  // Records what `enqueue` starts on the stream.
  template <class F>
  Graph(cudaStream_t stream, F enqueue) {
    const std::lock_guard lock(recording());
    check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "recording a step");
    instantiate(record(stream, enqueue, true));
  }
  ~Graph() {
    if (exec_) static_cast<void>(cudaGraphExecDestroy(exec_));
  }
  Graph(const Graph&) = delete;

#if CUDART_VERSION >= 12040
  // Whether the driver has nodes that repeat what is in them.
  static bool can_repeat() {
    int driver = 0;
    return cudaDriverGetVersion(&driver) == cudaSuccess && driver >= 12040;
  }

  // Records what enqueue(condition) starts, to be repeated until a kernel sets the condition to 0.
  template <class F>
  static std::unique_ptr<Graph> repeating(cudaStream_t stream, F enqueue) {
    const std::lock_guard lock(recording());
    cudaGraph_t graph = nullptr;
    check(cudaGraphCreate(&graph, 0), "recording a loop");
    std::unique_ptr<Graph> made(new Graph);
    try {
      cudaGraphConditionalHandle condition = 0;
      check(cudaGraphConditionalHandleCreate(&condition, graph, 1, cudaGraphCondAssignDefault), "recording a loop");
      cudaGraphNodeParams node{};
      node.type = cudaGraphNodeTypeConditional;
      node.conditional.handle = condition;
      node.conditional.type = cudaGraphCondTypeWhile;
      node.conditional.size = 1;
      cudaGraphNode_t added = nullptr;
#if CUDART_VERSION >= 13000
      check(cudaGraphAddNode(&added, graph, nullptr, nullptr, 0, &node), "recording a loop");
#else
      check(cudaGraphAddNode(&added, graph, nullptr, 0, &node), "recording a loop");
#endif
      check(cudaStreamBeginCaptureToGraph(stream, node.conditional.phGraph_out[0], nullptr, nullptr, 0,
                                          cudaStreamCaptureModeThreadLocal),
            "recording a loop");
      record(stream, [&] { enqueue(condition); }, false);
    } catch (...) {
      static_cast<void>(cudaGraphDestroy(graph));
      throw;
    }
    made->instantiate(graph);
    return made;
  }
#else
  static bool can_repeat() { return false; }
#endif

  void launch(cudaStream_t stream) const { check(cudaGraphLaunch(exec_, stream), "starting a step"); }

 private:
  Graph() = default;

  // Of a stream that records already; ends that in any case, or nothing could be freed any more. A graph that is part
  // of another one belongs to that.
  template <class F>
  static cudaGraph_t record(cudaStream_t stream, F enqueue, bool own) {
    cudaGraph_t graph = nullptr;
    try {
      enqueue();
      check(cudaStreamEndCapture(stream, &graph), "recording a step");
    } catch (...) {
      static_cast<void>(cudaStreamEndCapture(stream, &graph));
      static_cast<void>(cudaGetLastError());
      if (own && graph) static_cast<void>(cudaGraphDestroy(graph));
      throw;
    }
    return graph;
  }

  void instantiate(cudaGraph_t graph) {
    const cudaError_t error = cudaGraphInstantiate(&exec_, graph, 0);
    static_cast<void>(cudaGraphDestroy(graph));
    check(error, "preparing a recorded step");
  }

  cudaGraphExec_t exec_ = nullptr;
};

}  // namespace dive::cuda
