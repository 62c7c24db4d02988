// Element types of the tensors that kernels read and write. Functions here are static: kernels are compiled once per
// instruction-set level, and an inline function would be shared between the levels.
#pragma once

namespace dive::cpu {

enum class DType { kFloat32, kBFloat16, kFloat16 };

// static: files compiled for different instruction sets each keep their own copy.
static inline int size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

}  // namespace dive::cpu
