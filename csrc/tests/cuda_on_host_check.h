// What tests of CUDA on the host share.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "cuda_on_host/control.h"

namespace cuda_on_host_test {

inline void expect(bool holds, const std::string& what) {
  if (holds) return;
  std::fprintf(stderr, "cuda_on_host_test: failed: %s\n", what.c_str());
  std::exit(1);
}

inline void check(cudaError_t error, cudaError_t expected = cudaSuccess) {
  expect(error == expected, std::string(cudaGetErrorName(error)) + " instead of " + cudaGetErrorName(expected));
  if (error != cudaSuccess) expect(cudaGetLastError() == error, "the last error is remembered");
}

template <class T>
class Device {
 public:
  explicit Device(std::size_t count) : count_(count) { check(cudaMalloc(&data_, count * sizeof(T))); }
  explicit Device(const std::vector<T>& values) : Device(values.size()) {
    check(cudaMemcpy(data_, values.data(), count_ * sizeof(T), cudaMemcpyHostToDevice));
  }
  ~Device() { check(cudaFree(data_)); }
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  T* get() const { return data_; }
  std::vector<T> values() const {
    std::vector<T> result(count_);
    check(cudaMemcpy(result.data(), data_, count_ * sizeof(T), cudaMemcpyDeviceToHost));
    return result;
  }

 private:
  std::size_t count_;
  T* data_ = nullptr;
};

class Stream {
 public:
  Stream() { check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking)); }
  ~Stream() { check(cudaStreamDestroy(stream_)); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  operator cudaStream_t() const { return stream_; }

 private:
  cudaStream_t stream_;
};

struct Test {
  const char* name;
  void (*run)();
};

std::vector<Test> runtime_tests();  // cuda_on_host_runtime_test.cpp

}  // namespace cuda_on_host_test
