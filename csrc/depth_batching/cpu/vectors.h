// SPDX-License-Identifier: Apache-2.0
// Heads as padded rows of floats.
#pragma once

#include "../../common/cpu/storage.h"
#include "kernels.h"

namespace gemma_ext::depth_batching::GEMMA_EXT_ISA {
namespace {

using gemma_ext::cpu::GEMMA_EXT_ISA::exp;
using gemma_ext::cpu::GEMMA_EXT_ISA::iota;
using gemma_ext::cpu::GEMMA_EXT_ISA::kLanes;
using gemma_ext::cpu::GEMMA_EXT_ISA::load;
using gemma_ext::cpu::GEMMA_EXT_ISA::load_row;
using gemma_ext::cpu::GEMMA_EXT_ISA::load_some;
using gemma_ext::cpu::GEMMA_EXT_ISA::set1;
using gemma_ext::cpu::GEMMA_EXT_ISA::store;
using gemma_ext::cpu::GEMMA_EXT_ISA::tanh;
using gemma_ext::cpu::GEMMA_EXT_ISA::Vf;
using gemma_ext::cpu::GEMMA_EXT_ISA::Vi;
using gemma_ext::cpu::GEMMA_EXT_ISA::with_type;

// Parts of a Scratch.
enum Slot { kHeadSlot, kQueries, kScores, kPageSlot, kTotals, kOnePart };

inline int64_t padded(int64_t width) { return (width + kPad - 1) / kPad * kPad; }

inline float* floats_of(Scratch& s, int slot, int64_t count) {
  return static_cast<float*>(s.part(slot, padded(count) * sizeof(float)));
}

GEMMA_EXT_INLINE const char* row_of(const Rows& rows, DType type, int64_t i) {
  return static_cast<const char*>(rows.data) + i * rows.stride * size_of(type);
}

// `width` elements as floats, 0 up to padded(width).
inline void widen(const void* from, DType type, int64_t width, float* to) {
  with_type(type, [&](auto like) {
    const auto* x = static_cast<const decltype(like)*>(from);
    int64_t d = 0;
    for (; d + kLanes <= width; d += kLanes) store(to + d, load_row(x + d));
    if (d < width) {
      store(to + d, load_some(x + d, int(width - d)));
      d += kLanes;
    }
    for (const int64_t end = padded(width); d < end; d += kLanes) store(to + d, Vf{});
  });
}

// Halves, quarters and so on: few steps, one order.
GEMMA_EXT_INLINE float tree_sum(Vf x) {
  typedef float V4 __attribute__((vector_size(16)));
#if defined(__AVX512F__) || defined(GEMMA_EXT_EMULATED_AMX)
  typedef float V8 __attribute__((vector_size(32)));
  const V8 y = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7) +
               __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
  const V4 z =
      __builtin_shufflevector(y, y, 0, 1, 2, 3) + __builtin_shufflevector(y, y, 4, 5, 6, 7);
#elif defined(__AVX2__)
  const V4 z =
      __builtin_shufflevector(x, x, 0, 1, 2, 3) + __builtin_shufflevector(x, x, 4, 5, 6, 7);
#else
  const V4 z = x;
#endif
  return (z[0] + z[2]) + (z[1] + z[3]);
}

}  // namespace
}  // namespace gemma_ext::depth_batching::GEMMA_EXT_ISA
