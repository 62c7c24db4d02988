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

// `count` positions of every head, from rows `stride` bytes apart to rows that follow each other.
void copy_heads(const std::byte* from, std::int64_t head_stride, std::int64_t stride, int heads, std::int64_t count,
                std::int64_t row, std::byte* to) {
  for (int head = 0; head < heads; ++head) {
    const std::byte* source = from + head * head_stride;
    std::byte* target = to + head * kBlock * row;
    if (stride == row) {
      std::memcpy(target, source, count * row);
    } else {
      for (std::int64_t i = 0; i < count; ++i) std::memcpy(target + i * row, source + i * stride, row);
    }
  }
}

}  // namespace

BlockPool::BlockPool(const Plan& plan)
    : layers_(plan.layers.size()), kv_heads_(plan.kv_heads), row_(plan.head_size * cpu::size_of(plan.cache_dtype)),
      slab_(plan.kv_heads * kBlock * row_), element_(cpu::size_of(plan.cache_dtype)) {}

BlockPool::Block BlockPool::take() {
  std::unique_ptr<std::byte, Free> memory;
  if (free_.empty()) {
    const std::size_t bytes = (block_bytes() + kAlignment - 1) / kAlignment * kAlignment;
    memory.reset(static_cast<std::byte*>(std::aligned_alloc(kAlignment, bytes)));
    if (!memory) throw std::bad_alloc();
    // Giving a block back must not fail, so there is room for all of them from the start.
    free_.reserve(made_ + 1);
    ++made_;
  } else {
    memory = std::move(free_.back());
    free_.pop_back();
  }
  return {memory.release(), [this](std::byte* block) { free_.emplace_back(block); }};
}

void BlockPool::copy(const std::byte* from, std::byte* to, std::int64_t positions) const {
  for (std::size_t slab = 0; slab < 2 * layers_; ++slab) {
    copy_heads(from + slab * slab_, kBlock * row_, row_, kv_heads_, positions, row_, to + slab * slab_);
  }
}

void KvCache::add(BlockPool::Block block) {
  table_.push_back(block.get());
  held_.push_back(std::move(block));
}

void KvCache::fill(const std::vector<PrefilledLayer>& layers, std::int64_t count) {
  const std::int64_t element = pool_->element_, row = pool_->row_bytes();
  for (std::int64_t first = 0; first < count; first += kBlock) {
    add(pool_->take());
    const std::int64_t some = std::min(kBlock, count - first);
    for (std::size_t l = 0; l < layers.size(); ++l) {
      const PrefilledLayer& from = layers[l];
      copy_heads(static_cast<const std::byte*>(from.keys) + first * from.keys_stride * element,
                 from.keys_head_stride * element, from.keys_stride * element, pool_->kv_heads(), some, row,
                 table_.back() + keys(l));
      copy_heads(static_cast<const std::byte*>(from.values) + first * from.values_stride * element,
                 from.values_head_stride * element, from.values_stride * element, pool_->kv_heads(), some, row,
                 table_.back() + values(l));
    }
  }
}

void KvCache::make_room(std::int64_t position) {
  const std::size_t index = static_cast<std::size_t>(position / kBlock);
  if (index == held_.size()) {
    add(pool_->take());
  } else if (held_[index].use_count() > 1) {
    BlockPool::Block own = pool_->take();
    pool_->copy(held_[index].get(), own.get(), position % kBlock);
    table_[index] = own.get();
    held_[index] = std::move(own);
  }
}

}  // namespace dive::engine
