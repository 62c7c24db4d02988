#include "engine/kv_cache.h"

#include <algorithm>
#include <cstring>
#include <new>
#include <utility>

#include "cpu/decode_types.h"

namespace dive::engine {
namespace {

constexpr std::int64_t kBlock = cpu::kCacheBlock;
// Of a cache line, which is also the widest vector.
constexpr std::size_t kAlignment = 64;

class HostMemory final : public CacheMemory {
 public:
  std::byte* allocate(std::size_t bytes) override {
    void* const memory = std::aligned_alloc(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
    if (!memory) throw std::bad_alloc();
    return static_cast<std::byte*>(memory);
  }

  void release(std::byte* memory) override { std::free(memory); }

  void copy(const std::vector<HeadsCopy>& copies, int heads, std::int64_t row_bytes, bool) override {
    for (const HeadsCopy& copy : copies) {
      for (int head = 0; head < heads; ++head) {
        const std::byte* from = copy.from + head * copy.from_head;
        std::byte* to = copy.to + head * copy.to_head;
        if (copy.from_position == row_bytes) {
          std::memcpy(to, from, copy.positions * row_bytes);
          continue;
        }
        for (std::int64_t i = 0; i < copy.positions; ++i, from += copy.from_position, to += row_bytes) {
          std::memcpy(to, from, row_bytes);
        }
      }
    }
  }
};

}  // namespace

CacheMemory& host_memory() {
  static HostMemory memory;
  return memory;
}

BlockPool::BlockPool(const Plan& plan, CacheMemory& memory)
    : memory_(memory), layers_(plan.layers.size()), kv_heads_(plan.kv_heads),
      row_(plan.head_size * cpu::size_of(plan.cache_dtype)), slab_(plan.kv_heads * kBlock * row_),
      element_(cpu::size_of(plan.cache_dtype)) {}

BlockPool::Block BlockPool::take() {
  std::unique_ptr<std::byte, Free> memory(nullptr, Free{&memory_});
  if (free_.empty()) {
    memory.reset(memory_.allocate(block_bytes()));
    // Giving a block back must not fail, so there is room for all of them from the start.
    free_.reserve(made_ + 1);
    ++made_;
  } else {
    memory = std::move(free_.back());
    free_.pop_back();
  }
  return {memory.release(), [this](std::byte* block) { free_.emplace_back(block, Free{&memory_}); }};
}

void BlockPool::copy(const std::byte* from, std::byte* to, std::int64_t positions) const {
  const std::int64_t head = kBlock * row_;
  std::vector<HeadsCopy> copies;
  for (std::size_t slab = 0; slab < 2 * layers_; ++slab) {
    copies.push_back({from + slab * slab_, head, row_, to + slab * slab_, head, positions});
  }
  memory_.copy(copies, kv_heads_, row_, false);
}

void KvCache::add(BlockPool::Block block) {
  table_.push_back(block.get());
  held_.push_back(std::move(block));
}

void KvCache::fill(const std::vector<PrefilledLayer>& layers, std::int64_t count) {
  const std::int64_t element = pool_->element_, row = pool_->row_bytes();
  std::vector<HeadsCopy> copies;
  for (std::int64_t first = 0; first < count; first += kBlock) {
    add(pool_->take());
    const std::int64_t some = std::min(kBlock, count - first);
    const auto copy = [&](const void* from, std::int64_t head, std::int64_t position, std::int64_t slab) {
      copies.push_back({static_cast<const std::byte*>(from) + first * position * element, head * element,
                        position * element, table_.back() + slab, kBlock * row, some});
    };
    for (std::size_t l = 0; l < layers.size(); ++l) {
      copy(layers[l].keys, layers[l].keys_head_stride, layers[l].keys_stride, keys(l));
      copy(layers[l].values, layers[l].values_head_stride, layers[l].values_stride, values(l));
    }
  }
  pool_->memory_.copy(copies, pool_->kv_heads(), row, true);
}

void KvCache::make_room(std::int64_t position, std::int64_t count) {
  const std::size_t index = static_cast<std::size_t>(position / kBlock);
  if (index < held_.size() && held_[index].use_count() > 1) {
    BlockPool::Block own = pool_->take();
    pool_->copy(held_[index].get(), own.get(), position % kBlock);
    table_[index] = own.get();
    held_[index] = std::move(own);
  }
  const std::size_t last = static_cast<std::size_t>((position + count - 1) / kBlock);
  while (held_.size() <= last) add(pool_->take());
}

}  // namespace dive::engine
