// Numbers for vector instructions: a load of 64 bytes that begins in the middle of a cache line costs two.
#pragma once

#include <cstddef>
#include <new>
#include <vector>

namespace dive::cpu {

template <class T>
struct LineAligned {
  using value_type = T;
  static constexpr std::align_val_t kLine{64};

  LineAligned() = default;
  template <class U>
  LineAligned(const LineAligned<U>&) {}

  T* allocate(std::size_t count) { return static_cast<T*>(::operator new(count * sizeof(T), kLine)); }
  void deallocate(T* memory, std::size_t) { ::operator delete(memory, kLine); }

  template <class U>
  bool operator==(const LineAligned<U>&) const {
    return true;
  }
};

using AlignedFloats = std::vector<float, LineAligned<float>>;

}  // namespace dive::cpu
