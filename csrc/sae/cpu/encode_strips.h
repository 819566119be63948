// SPDX-License-Identifier: Apache-2.0
// A strip of pre-activations of one row, while it is in cache: what is worth keeping goes to the lists.
#pragma once

#include "../../common/cpu/vec.h"
#include "kernels.h"

namespace gemma_ext::sae::GEMMA_EXT_ISA {

using namespace gemma_ext::cpu::GEMMA_EXT_ISA;

// One bit for each lane that is set.
GEMMA_EXT_INLINE uint32_t lanes_of(Vi mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)mask);
#elif defined(__AVX2__) && !defined(GEMMA_EXT_EMULATED_AMX)
  return _mm256_movemask_ps((__m256)mask);
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= uint32_t(mask[i] & 1) << i;
  return bits;
#endif
}

// The lanes of the vector at i that lie before the end.
GEMMA_EXT_INLINE uint32_t before(int64_t end, int64_t i) {
  return end - i < kLanes ? (1u << (end - i)) - 1 : ~0u;
}

// Features of a strip and what belongs to them, padded to whole vectors.
struct Strip {
  int64_t first;           // feature
  int64_t width;           // of them
  const float* bias;       // or null
  const float* scale;      // or null
  const float* limits;     // or null
  const int32_t* allowed;  // 0 or -1, or null
};

GEMMA_EXT_INLINE Vf score_at(const Strip& strip, int64_t i, Vf p, bool by_magnitude) {
  if (by_magnitude) p = (Vf)((Vi)p & 0x7fffffff);
  return strip.scale ? p * load(strip.scale + i) : p;
}

inline void add_bias(const Strip& strip, float* p) {
  for (int64_t i = 0; i < strip.width; i += kLanes)
    store(p + i, load(p + i) + load(strip.bias + i));
}

inline void keep_top(TopLists& lists, const Strip& strip, int64_t row, const float* p) {
  if (lists.closed[row]) return;
  TopLists::Entry* to = lists.entries + row * lists.capacity;
  int32_t& count = lists.count[row];
  Vf limit = set1(lists.limit[row]);
  for (int64_t i = 0; i < strip.width; i += kLanes) {
    Vi in = ~(score_at(strip, i, load(p + i), lists.by_magnitude) <= limit);
    if (lists.mask) in &= *reinterpret_cast<const Vi*>(strip.allowed + i);
    if (__builtin_expect(!any(in), 1)) continue;
    for (uint32_t bits = lanes_of(in) & before(strip.width, i); bits; bits &= bits - 1) {
      const int64_t at = i + __builtin_ctz(bits);
      to[count++] = {p[at], int32_t(strip.first + at)};
    }
    if (count > lists.capacity - kLanes) {
      shrink(lists, row);
      limit = set1(lists.limit[row]);
      if (lists.closed[row]) return;
    }
  }
}

inline void keep_best(GroupBest& best, const Strip& strip, int64_t row, const float* p) {
  for (int64_t i = 0; i < strip.width;) {
    const int64_t group = (strip.first + i) / best.size, last = (group + 1) * best.size;
    const int64_t end = last - strip.first < strip.width ? last - strip.first : strip.width;
    float top = best.values[row * best.groups + group];
    int32_t at = best.indices[row * best.groups + group];
    if (at < 0) {
      top = p[i];
      at = int32_t(strip.first + i);
    }
    for (; i < end && top == top; i += kLanes) {
      uint32_t bits = lanes_of(~(load(p + i) <= top)) & before(end, i);
      for (; bits; bits &= bits - 1) {
        const int64_t j = i + __builtin_ctz(bits);
        if (p[j] <= top || top != top) continue;
        top = p[j];
        at = int32_t(strip.first + j);
      }
    }
    i = end;
    best.values[row * best.groups + group] = top;
    best.indices[row * best.groups + group] = at;
  }
}

inline void keep_above(Above& above, const Strip& strip, int64_t task_row, int64_t row,
                       const float* p) {
  Above::Entry* to = room(above, strip.width);
  int64_t count = 0;
  const Vf limit = set1(above.limit);
  for (int64_t i = 0; i < strip.width; i += kLanes) {
    const Vf score = score_at(strip, i, load(p + i), false);
    const Vf bound = strip.limits ? load(strip.limits + i) : limit;
    const Vi in = above.inclusive ? ~(score < bound) : ~(score <= bound);
    if (__builtin_expect(!any(in), 1)) continue;
    for (uint32_t bits = lanes_of(in) & before(strip.width, i); bits; bits &= bits - 1) {
      const int64_t at = i + __builtin_ctz(bits);
      const Above::Entry entry{p[at], int32_t(strip.first + at), int32_t(row)};
      const float s = score_of(entry.p, entry.feature, above.scale, false);
      if (s != s) {
        if (above.nan_listed[task_row]) continue;
        above.nan_listed[task_row] = 1;
      } else if (strip.limits && strip.limits[at] != strip.limits[at]) {
        continue;  // nothing is above NaN
      }
      to[count++] = entry;
    }
  }
  above.count += count;
}

}  // namespace gemma_ext::sae::GEMMA_EXT_ISA
