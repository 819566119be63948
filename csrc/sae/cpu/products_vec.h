// SPDX-License-Identifier: Apache-2.0
// Rows of any storage type as vectors of floats; buffers of floats are padded to whole vectors.
#pragma once

#include "../../common/cpu/storage.h"
#include "products_table.h"

namespace gemma_ext::sae::GEMMA_EXT_ISA {
namespace {

using gemma_ext::cpu::GEMMA_EXT_ISA::bf16;
using gemma_ext::cpu::GEMMA_EXT_ISA::half;
using gemma_ext::cpu::GEMMA_EXT_ISA::kLanes;
using gemma_ext::cpu::GEMMA_EXT_ISA::load;
using gemma_ext::cpu::GEMMA_EXT_ISA::load_row;
using gemma_ext::cpu::GEMMA_EXT_ISA::load_some;
using gemma_ext::cpu::GEMMA_EXT_ISA::store;
using gemma_ext::cpu::GEMMA_EXT_ISA::sum;
using gemma_ext::cpu::GEMMA_EXT_ISA::Vf;
using gemma_ext::cpu::GEMMA_EXT_ISA::with_type;

static_assert(kPad % kLanes == 0);

// step(c, read) for every vector of the columns from .. D; read(p) takes what lies at column c of a row.
template <class Step>
GEMMA_EXT_INLINE void each_vector(int64_t from, int64_t D, const Step& step) {
  int64_t c = from;
  for (; c + kLanes <= D; c += kLanes)
    step(c, [](const auto* p) __attribute__((always_inline)) { return load_row(p); });
  if (c < D) {
    const int rest = int(D - c);
    step(c, [rest](const auto* p) __attribute__((always_inline)) { return load_some(p, rest); });
  }
}
template <class Step>
GEMMA_EXT_INLINE void each_vector(int64_t D, const Step& step) {
  each_vector(0, D, step);
}

// The same for many rows at once, in pairs of vectors: step(c, read) as often, ahead(c) once a pair.
template <class Ahead, class Step>
GEMMA_EXT_INLINE void each_pair(int64_t D, const Ahead& ahead, const Step& step) {
  const auto whole = [](const auto* p) __attribute__((always_inline)) { return load_row(p); };
  int64_t c = 0;
  for (; c + 2 * kLanes <= D; c += 2 * kLanes) {
    ahead(c);
    step(c, whole);
    step(c + kLanes, whole);
  }
  each_vector(c, D, step);
}

template <class T>
GEMMA_EXT_INLINE const T* row_of(const Table& t, int64_t i) {
  return static_cast<const T*>(t.data) + i * t.stride;
}

// Row i as floats, 0 up to whole vectors.
inline void widen_row(const Table& t, int64_t i, int64_t D, float* to) {
  with_type(t.type, [&](auto like) {
    const auto* row = row_of<decltype(like)>(t, i);
    each_vector(D, [&](int64_t c, auto read) { store(to + c, read(row + c)); });
  });
}

inline float* floats_of(Scratch& s, int slot, int64_t count) {
  return static_cast<float*>(s.part(slot, padded_width(count) * sizeof(float)));
}

GEMMA_EXT_INLINE void* row_at(void* rows, DType type, int64_t i, int64_t D) {
  return static_cast<char*>(rows) + i * D * size_of(type);
}

// Heads of the rows that come next, and what lies kAhead bytes on in those that are read: sixteen rows are more streams
// than processors follow by themselves.
constexpr int kHead = 256, kAhead = 512;

GEMMA_EXT_INLINE void prefetch_head(const void* row) {
  for (int at = 0; at < kHead; at += 64) __builtin_prefetch(static_cast<const char*>(row) + at);
}
GEMMA_EXT_INLINE void prefetch_ahead(const void* at) {
  __builtin_prefetch(static_cast<const char*>(at) + kAhead);
}

}  // namespace
}  // namespace gemma_ext::sae::GEMMA_EXT_ISA
