// Between decode.cpp, which divides the work among workers, and decode_*_kernel.cpp, which do it.
#pragma once

#include <cstdint>

#include "cpu/decode_types.h"
#include "cpu/isa.h"

namespace dive::cpu {

// Query heads that attention takes at a time. 16 of them times a block of positions are 4 KiB of scores.
inline constexpr int kHeadTile = 16;

// What attention over some positions leaves for one query head: [E] the sum of exp(score - largest) * values, then
// `largest` and the sum of the exponentials. Static because this header is compiled at every level.
static inline std::int64_t partial_size(int head_size) { return head_size + 2; }

// Floats that B rows of K columns take in a form of the inputs, and the forms.
DIVE_DECLARE_VARIANTS(std::int64_t paired_size(int batch, std::int64_t columns))
DIVE_DECLARE_VARIANTS(std::int64_t int8_size(int batch, std::int64_t columns))
DIVE_DECLARE_VARIANTS(void arrange_pairs(const float* x, int batch, std::int64_t columns, float* out))
DIVE_DECLARE_VARIANTS(void arrange_int8(const float* x, int batch, std::int64_t columns, float* out))

// outputs[b][n] = x[b] . weight[n] + bias[n], or plus that where `add`, for n in [begin, end), begin a multiple of 16
// for int8; rows of outputs are weight.rows apart. Whoever calls reads from `next` on afterwards (null: it is not
// known).
DIVE_DECLARE_VARIANTS(void project_rows(const Weight& weight, std::int64_t begin, std::int64_t end, const Inputs& x,
                                        int batch, float* outputs, bool add, const void* next))
DIVE_DECLARE_VARIANTS(void project_gated_rows(const Weight& gate, const Weight& up, std::int64_t begin,
                                              std::int64_t end, const Inputs& x, int batch, GatedActivation activation,
                                              float* outputs, const void* next))
DIVE_DECLARE_VARIANTS(void quantize_rows(const Weight& weight, std::int64_t begin, std::int64_t end, std::int8_t* out,
                                         float* scales))
DIVE_DECLARE_VARIANTS(void embed_row(const Weight& embedding, std::int64_t token, float scale, float* out))

DIVE_DECLARE_VARIANTS(void norm_row(const float* x, const float* weight, float eps, std::int64_t size, float* out))
DIVE_DECLARE_VARIANTS(void rotate_head(float* x, const float* cos, const float* sin, int head_size))
DIVE_DECLARE_VARIANTS(void gate_range(GatedActivation activation, const float* gate, const float* up,
                                      std::int64_t count, float* out))
DIVE_DECLARE_VARIANTS(void add_range(const float* a, const float* b, std::int64_t count, float* out))
DIVE_DECLARE_VARIANTS(void softcap_range(float* x, std::int64_t count, float cap))
DIVE_DECLARE_VARIANTS(void narrow_range(const float* x, std::int64_t count, DType dtype, void* out))
DIVE_DECLARE_VARIANTS(std::uint32_t read_range(const void* data, std::int64_t bytes))
DIVE_DECLARE_VARIANTS(std::uint64_t digest_range(const void* data, std::int64_t bytes, std::uint64_t place))
DIVE_DECLARE_VARIANTS(std::int64_t argmax_range(const float* x, std::int64_t count))

// Positions [begin, end) of one key/value head's cache for the H / G query heads that share it: q and partials hold
// them one after the other.
DIVE_DECLARE_VARIANTS(void attend_positions(const AttentionShape& shape, const float* q, const CacheRow& row,
                                            int kv_head, std::int64_t begin, std::int64_t end, float* partials))
// out[E] from `count` partials of one query head, `stride` apart.
DIVE_DECLARE_VARIANTS(void merge_partials(const float* partials, std::int64_t stride, int count, int head_size,
                                          float* out))

}  // namespace dive::cpu
