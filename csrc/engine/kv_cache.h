// Keys and values of one sequence. Its memory is reserved for the longest it may become and untouched until it is
// written, so what it really takes grows page by page with the sequence.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include "cpu/decode.h"
#include "engine/plan.h"

namespace dive::engine {

class KvCache {
 public:
  KvCache(const Plan& plan, std::int64_t capacity)
      : kv_heads_(plan.kv_heads), head_size_(plan.head_size), element_(cpu::size_of(plan.cache_dtype)),
        capacity_(capacity) {
    // A page of its own for every cache; the size is a multiple of the alignment, as aligned_alloc wants it.
    constexpr std::size_t kAlignment = 4096;
    const std::size_t bytes = plan.layers.size() * 2 * block();
    memory_.reset(static_cast<std::byte*>(
        std::aligned_alloc(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment)));
    if (!memory_) throw std::bad_alloc();
  }

  // [G][capacity][E] of one layer.
  void* keys(std::size_t layer) const { return memory_.get() + 2 * layer * block(); }
  void* values(std::size_t layer) const { return memory_.get() + (2 * layer + 1) * block(); }
  std::int64_t head_stride() const { return capacity_ * head_size_; }
  std::int64_t capacity() const { return capacity_; }

 private:
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };

  std::size_t block() const { return static_cast<std::size_t>(kv_heads_) * capacity_ * head_size_ * element_; }

  std::int64_t kv_heads_, head_size_, element_, capacity_;
  std::unique_ptr<std::byte, Free> memory_;
};

}  // namespace dive::engine
