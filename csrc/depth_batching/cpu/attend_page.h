// SPDX-License-Identifier: Apache-2.0
// Queries of a task and the pages that they read: one page, some queries.
#pragma once

#include "vectors.h"

namespace gemma_ext::depth_batching::GEMMA_EXT_ISA {
namespace {

// Tokens of a query in a stretch of keys.
struct Seen {
  int32_t begin, end;
};

struct Queries {
  const Attention* call;
  int64_t row0, head, group, count;  // count = rows * group, the heads of a row side by side
  int64_t stride;                    // padded width
  const float* x;                    // [count, stride]

  int64_t row(int64_t i) const { return row0 + i / group; }
  // Of the keys begin .. begin + length.
  Seen seen(int64_t i, int64_t begin, int32_t length) const {
    const int64_t first = first_token(*call, row(i)) - begin;
    const int64_t end = call->places.pos[row(i)] + 1 - begin;
    return {int32_t(first < 0        ? 0
                    : first > length ? length
                                     : first),
            int32_t(end < 0        ? 0
                    : end > length ? length
                                   : end)};
  }
  // Those of the sinks that lie in front of the query's window.
  Seen sunk(int64_t i, int64_t begin, int32_t length) const {
    const int64_t first = first_token(*call, row(i));
    const int64_t end = (first < call->sinks ? first : call->sinks) - begin;
    return {0, int32_t(end < 0 ? 0 : end > length ? length : end)};
  }
};

inline const char* memory_of(const Queries& q, int64_t page, int64_t half) {
  const Attention& a = *q.call;
  const Pool& pool = a.pool;
  const Places& p = a.places;
  const int64_t id = p.block_tables[p.req[q.row0] * p.max_pages + page];
  const int64_t begin = page_at(pool, a.depth_of[p.loop[q.row0]], id, half, q.head);
  return static_cast<const char*>(pool.data) + begin * size_of(pool.type);
}

// Pages lie anywhere, and processors follow no stream across their own.
GEMMA_EXT_INLINE void prefetch_page(const Pool& pool, const char* from) {
  const int64_t bytes = kPage * pool.width * size_of(pool.type);
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(from + at);
}

// The tokens of a page as rows of floats: where they lie, if they already are.
inline const float* rows_of_page(const Queries& q, const char* from, Scratch& s) {
  const Pool& pool = q.call->pool;
  if (pool.type == DType::kFloat32 && q.stride == pool.width)
    return reinterpret_cast<const float*>(from);
  float* to = floats_of(s, kPageSlot, kPage * q.stride);
  if (q.stride == pool.width) {
    widen(from, pool.type, kPage * pool.width, to);
  } else {
    for (int64_t t = 0; t < kPage; ++t)
      widen(from + t * pool.width * size_of(pool.type), pool.type, pool.width, to + t * q.stride);
  }
  return to;
}

template <int kValue>
struct Count {
  static constexpr int value = kValue;
};

constexpr int kMost = 4;  // queries of a block of products, which stays in registers
constexpr int kTokens = kLanes >= 16 ? 4 : 2;

// scores[i][t] = <x_i, k_t> of kQ queries and a page.
template <int kQ>
inline void score_page(const float* x, const float* k, int64_t stride, float* scores) {
  for (int t = 0; t < kPage; t += kTokens) {
    Vf sums[kQ][kTokens] = {};
    for (int64_t d = 0; d < stride; d += kLanes) {
      Vf keys[kTokens];
      for (int j = 0; j < kTokens; ++j) keys[j] = load(k + (t + j) * stride + d);
      for (int i = 0; i < kQ; ++i) {
        const Vf query = load(x + i * stride + d);
        for (int j = 0; j < kTokens; ++j) sums[i][j] += query * keys[j];
      }
    }
    for (int i = 0; i < kQ; ++i)
      for (int j = 0; j < kTokens; ++j) scores[i * kSplit + t + j] = tree_sum(sums[i][j]);
  }
}

// add_page of the vectors at d, which stay in registers.
template <int kQ, int kVectors>
GEMMA_EXT_INLINE void add_vectors(const float* p, const float* v, Seen seen, int64_t stride,
                                  int64_t d, float* sums, int64_t sums_stride) {
  Vf acc[kQ][kVectors];
  for (int i = 0; i < kQ; ++i)
    for (int j = 0; j < kVectors; ++j) acc[i][j] = load(sums + i * sums_stride + d + j * kLanes);
  for (int t = seen.begin; t < seen.end; ++t) {
    Vf values[kVectors];
    for (int j = 0; j < kVectors; ++j) values[j] = load(v + t * stride + d + j * kLanes);
    for (int i = 0; i < kQ; ++i) {
      const Vf weight = set1(p[i * kSplit + t]);
      for (int j = 0; j < kVectors; ++j) acc[i][j] += weight * values[j];
    }
  }
  for (int i = 0; i < kQ; ++i)
    for (int j = 0; j < kVectors; ++j) store(sums + i * sums_stride + d + j * kLanes, acc[i][j]);
}

// sums[i] += sum_t p[i][t] v_t of kQ queries and the tokens begin .. end of a page.
template <int kQ>
inline void add_page(const float* p, const float* v, Seen seen, int64_t stride, float* sums,
                     int64_t sums_stride) {
  constexpr int kVectors = kLanes >= 16 ? 4 : 2;
  int64_t d = 0;
  for (; d + kVectors * kLanes <= stride; d += kVectors * kLanes)
    add_vectors<kQ, kVectors>(p, v, seen, stride, d, sums, sums_stride);
  for (; d < stride; d += kLanes) add_vectors<kQ, 1>(p, v, seen, stride, d, sums, sums_stride);
}

// f(number) with a number of 1 to 4 as a constant.
template <class F>
GEMMA_EXT_INLINE void with_count(int64_t count, const F& f) {
  if (count >= 4) return f(Count<4>());
  if (count == 3) return f(Count<3>());
  if (count == 2) return f(Count<2>());
  f(Count<1>());
}

}  // namespace
}  // namespace gemma_ext::depth_batching::GEMMA_EXT_ISA
