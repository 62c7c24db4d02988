// Keys and values of sequences, in blocks of some positions. Sequences that begin alike share blocks, and whoever
// writes to a shared one gets a copy of it first; so a sequence is copied, or put in another's place, by swapping
// references.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

#include "engine/plan.h"

namespace dive::engine {

// One layer's keys or values of a prompt, [G][positions][E] with the given strides in elements; the last is unit.
struct PrefilledLayer {
  const void *keys, *values;
  std::int64_t keys_head_stride, keys_stride, values_head_stride, values_stride;
};

// Rows [heads][positions] from one place to another. Strides count bytes; within a head, rows of the target follow each
// other.
struct HeadsCopy {
  const std::byte* from;
  std::int64_t from_head, from_position;
  std::byte* to;
  std::int64_t to_head, positions;
};

// Where cache blocks lie.
class CacheMemory {
 public:
  virtual ~CacheMemory() = default;

  // Throws std::bad_alloc or what says more.
  virtual std::byte* allocate(std::size_t bytes) = 0;
  virtual void release(std::byte* memory) = 0;

  // In the order of the steps that use them. `foreign` where the memory copied from is not this one's: it is ready at
  // the beginning, and may change when this returns.
  virtual void copy(const std::vector<HeadsCopy>& copies, int heads, std::int64_t row_bytes, bool foreign) = 0;
};

// The host's own.
CacheMemory& host_memory();

// The memory of one session's caches, which it must outlive. Blocks that nobody holds are kept for the next sequence.
// Only the thread that runs the session may use it.
class BlockPool {
 public:
  using Block = std::shared_ptr<std::byte>;

  BlockPool(const Plan& plan, CacheMemory& memory);
  BlockPool(const BlockPool&) = delete;

  // A block for cpu::kCacheBlock positions in all layers, its contents undefined.
  Block take();

  // Copies the first `positions` of one block to another.
  void copy(const std::byte* from, std::byte* to, std::int64_t positions) const;

  // Bytes from a block's start to a layer's keys or values, [G][cpu::kCacheBlock][E].
  std::int64_t keys(std::size_t layer) const { return static_cast<std::int64_t>(2 * layer) * slab_; }
  std::int64_t values(std::size_t layer) const { return keys(layer) + slab_; }
  std::size_t layers() const { return layers_; }
  int kv_heads() const { return kv_heads_; }
  std::int64_t row_bytes() const { return row_; }  // of one position's keys in one head

  std::int64_t block_bytes() const { return static_cast<std::int64_t>(layers_) * 2 * slab_; }
  std::int64_t blocks_made() const { return made_; }
  std::int64_t blocks_held() const { return made_ - static_cast<std::int64_t>(free_.size()); }

 private:
  struct Free {
    CacheMemory* memory;
    void operator()(std::byte* block) const { memory->release(block); }
  };

  CacheMemory& memory_;
  const std::size_t layers_;
  const int kv_heads_;
  const std::int64_t row_, slab_, element_;
  std::vector<std::unique_ptr<std::byte, Free>> free_;
  std::int64_t made_ = 0;

  friend class KvCache;
};

// One sequence's keys and values. A copy shares all blocks.
class KvCache {
 public:
  explicit KvCache(BlockPool& pool) : pool_(&pool) {}

  // Positions 0 ... count - 1 from a prompt's tensors; the cache must be empty.
  void fill(const std::vector<PrefilledLayer>& layers, std::int64_t count);

  // Before `count` positions from `position` on, the first one behind those written, are written: sees to it that their
  // blocks are there, and this sequence's alone.
  void make_room(std::int64_t position, std::int64_t count = 1);

  std::byte* const* blocks() const { return table_.data(); }
  std::int64_t keys(std::size_t layer) const { return pool_->keys(layer); }
  std::int64_t values(std::size_t layer) const { return pool_->values(layer); }

 private:
  void add(BlockPool::Block block);

  BlockPool* pool_;
  std::vector<BlockPool::Block> held_;
  std::vector<std::byte*> table_;  // the blocks of held_
};

}  // namespace dive::engine
