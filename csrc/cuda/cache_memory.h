// Cache blocks in a device's memory.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "cuda/kernels.h"
#include "cuda/memory.h"
#include "engine/kv_cache.h"

namespace dive::cuda {

class DeviceMemory final : public engine::CacheMemory {
 public:
  DeviceMemory(int device, cudaStream_t stream) : device_(device), stream_(stream) {}

  // Taking memory from the device takes a tenth of a millisecond and more, so several blocks are taken at a time: as
  // many as there are, up to a gigabyte, and one where that is too much.
  std::byte* allocate(std::size_t bytes) override {
    const CurrentDevice current(device_);
    const std::size_t size = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    if (left_ < size) {
      const std::size_t wanted = std::min(std::max<std::size_t>(made_, 1), std::max<std::size_t>(kMostBytes / size, 1));
      if (!try_chunk(wanted * size)) chunks_.emplace_back(size, "keys and values");
      left_ = chunks_.back().size();
    }
    std::byte* const block = chunks_.back().data() + (chunks_.back().size() - left_);
    left_ -= size;
    ++made_;
    return block;
  }

  // Goes with the rest.
  void release(std::byte*) override {}

  void copy(const std::vector<engine::HeadsCopy>& copies, int heads, std::int64_t row_bytes, bool foreign) override {
    if (copies.empty()) return;
    for (const engine::HeadsCopy& copy : copies) {
      const auto places = reinterpret_cast<std::uintptr_t>(copy.from) | copy.from_head | copy.from_position;
      if (places % 16) throw std::invalid_argument("layers: keys and values do not lie at multiples of 16 bytes");
    }
    const CurrentDevice current(device_);
    if (foreign) wait_for_others("waiting for a prompt");
    if (copies_.size() < copies.size())
      copies_ = DeviceArray<engine::HeadsCopy>(copies.size(), "copies of keys and values");
    check(cudaMemcpyAsync(copies_.data(), copies.data(), copies.size() * sizeof(copies[0]), cudaMemcpyDefault, stream_),
          "copying keys and values");
    check(copy_heads(stream_, copies_.data(), static_cast<int>(copies.size()), heads, row_bytes),
          "copying keys and values");
    // The list and what it names are the caller's.
    check(cudaStreamSynchronize(stream_), "copying keys and values");
  }

 private:
  static constexpr std::size_t kAlignment = 256, kMostBytes = std::size_t{1} << 30;

  bool try_chunk(std::size_t bytes) {
    void* data = nullptr;
    const cudaError_t error = cudaMalloc(&data, bytes);
    if (error == cudaErrorMemoryAllocation) {
      static_cast<void>(cudaGetLastError());
      return false;
    }
    check(error, "keys and values");
    chunks_.emplace_back(static_cast<std::byte*>(data), bytes);
    return true;
  }

  const int device_;
  const cudaStream_t stream_;
  std::vector<DeviceArray<std::byte>> chunks_;
  std::size_t left_ = 0, made_ = 0;  // bytes at the last chunk's end, blocks so far
  DeviceArray<engine::HeadsCopy> copies_;
};

}  // namespace dive::cuda
