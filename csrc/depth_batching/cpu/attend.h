// SPDX-License-Identifier: Apache-2.0
// Attention of the queries of a task: rows that follow each other in one request, heads that share K. A page is
// widened once for all of them. What a query gets depends on its own tokens alone: their order is that of their
// positions, and those that it does not see are never added.
#pragma once

#include "vectors.h"

namespace gemma_ext::depth_batching::GEMMA_EXT_ISA {
namespace {

constexpr float kNothing = -__builtin_inff();

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

// Scores of a split, [count, kSplit], become weights exp(score - maximum); the part's head is filled in.
inline void weigh(const Attention& a, float* scores, Seen seen, float* part) {
  Vf most = set1(kNothing);
  const auto in = [&](int32_t t) { return (iota() + t >= seen.begin) & (iota() + t < seen.end); };
  const int32_t begin = seen.begin / kLanes * kLanes;
  for (int32_t t = begin; t < seen.end; t += kLanes) {
    Vf score = load(scores + t) * a.scale;
    if (a.softcap > 0) score = tanh(score / a.softcap) * a.softcap;
    score = in(t) ? score : set1(kNothing);
    store(scores + t, score);
    most = score > most ? score : most;
  }
  const float maximum = gemma_ext::cpu::GEMMA_EXT_ISA::max(most);
  Vf total{};
  // of scores that are all -inf nothing is left, as of no token
  for (int32_t t = begin; t < seen.end; t += kLanes) {
    const Vf weight = maximum == kNothing ? Vf{} : exp(load(scores + t) - maximum);
    const Vf kept = in(t) ? weight : Vf{};
    store(scores + t, kept);
    total += kept;
  }
  part[0] = maximum;
  part[1] = tree_sum(total);
}

// parts [count, kPartHead + stride] of one split.
void attend_split(const Queries& q, int64_t split, float* parts, Scratch& s) {
  const int64_t part = kPartHead + q.stride, begin = split * kSplit;
  float* scores = floats_of(s, kScores, q.count * kSplit);
  int32_t first = kSplit, last = 0;
  for (int64_t i = 0; i < q.count; ++i) {
    const Seen seen = q.seen(i, begin, kSplit);
    if (seen.begin < seen.end) {
      first = seen.begin < first ? seen.begin : first;
      last = seen.end > last ? seen.end : last;
    }
  }
  const int32_t page0 = first / kPage * kPage;
  const auto each_page = [&](int64_t half, auto visit) {
    for (int32_t t = page0; t < last; t += kPage) {
      const char* from = memory_of(q, (begin + t) / kPage, half);
      if (t + kPage < last)
        prefetch_page(q.call->pool, memory_of(q, (begin + t) / kPage + 1, half));
      else if (half == 0)
        prefetch_page(q.call->pool, memory_of(q, (begin + page0) / kPage, 1));
      visit(t, rows_of_page(q, from, s));
    }
  };
  each_page(0, [&](int32_t t, const float* k) {
    for (int64_t i = 0; i < q.count;)
      with_count(q.count - i, [&](auto block) {
        score_page<block.value>(q.x + i * q.stride, k, q.stride, scores + i * kSplit + t);
        i += block.value;
      });
  });
  for (int64_t i = 0; i < q.count; ++i) {
    memset(parts + i * part, 0, part * sizeof(float));
    weigh(*q.call, scores + i * kSplit, q.seen(i, begin, kSplit), parts + i * part);
  }
  each_page(1, [&](int32_t t, const float* v) {
    for (int64_t i = 0; i < q.count;) {
      const Seen seen = q.seen(i, begin + t, kPage);
      int64_t alike = 1;
      for (; i + alike < q.count && alike < kMost; ++alike) {
        const Seen other = q.seen(i + alike, begin + t, kPage);
        if (other.begin != seen.begin || other.end != seen.end) break;
      }
      with_count(alike, [&](auto block) {
        add_page<block.value>(scores + i * kSplit + t, v, seen, q.stride,
                              parts + i * part + kPartHead, part);
        i += block.value;
      });
    }
  });
}

// total = total and, to its right, part.
void join_part(float* total, const float* part, int64_t stride) {
  if (part[1] == 0) return;
  if (total[1] == 0) {
    memcpy(total, part, (kPartHead + stride) * sizeof(float));
    return;
  }
  const float maximum = part[0] > total[0] ? part[0] : total[0];
  const Vf left = exp(set1(total[0] - maximum)), right = exp(set1(part[0] - maximum));
  total[0] = maximum;
  total[1] = total[1] * left[0] + part[1] * right[0];
  for (int64_t d = kPartHead; d < kPartHead + stride; d += kLanes)
    store(total + d, load(total + d) * left + load(part + d) * right);
}

// The result of a query from its total, which is divided.
void write_result(const Queries& q, int64_t i, float* total) {
  const Attention& a = *q.call;
  const int64_t width = a.pool.width, at = q.row(i) * a.q_heads + q.head * q.group + i % q.group;
  const Vf sum = set1(total[1]);
  float* x = total + kPartHead;
  for (int64_t d = 0; d < q.stride; d += kLanes) store(x + d, load(x + d) / sum);
  store_row(static_cast<char*>(a.out) + at * width * size_of(a.pool.type), a.pool.type, x, width);
}

Queries queries_of(const AttendTask& task) {
  const Attention& a = *task.call;
  const int64_t group = a.q_heads / a.pool.heads;
  return {&a, task.row0, task.head, group, task.rows * group, padded(a.pool.width), nullptr};
}

void attend(const AttendTask& task, Scratch& s) {
  const Attention& a = *task.call;
  Queries q = queries_of(task);
  const int64_t width = a.pool.width, part = kPartHead + q.stride;
  float* x = floats_of(s, kQueries, q.count * q.stride);
  for (int64_t i = 0; i < q.count; ++i) {
    const int64_t head = q.head * q.group + i % q.group;
    widen(row_of(a.q, a.pool.type, q.row(i)) + head * width * size_of(a.pool.type), a.pool.type,
          width, x + i * q.stride);
  }
  q.x = x;
  if (task.parts) {
    for (int64_t split = task.split0; split < task.split1; ++split)
      attend_split(q, split, task.parts + (split - task.split0) * q.count * part, s);
    return;
  }
  float* totals = floats_of(s, kTotals, q.count * part);
  for (int64_t split = task.split0; split < task.split1; ++split) {
    if (split == task.split0) {
      attend_split(q, split, totals, s);
      continue;
    }
    float* parts = floats_of(s, kOnePart, q.count * part);
    attend_split(q, split, parts, s);
    for (int64_t i = 0; i < q.count; ++i) join_part(totals + i * part, parts + i * part, q.stride);
  }
  for (int64_t i = 0; i < q.count; ++i) write_result(q, i, totals + i * part);
}

void join(const AttendTask& task) {
  const Queries q = queries_of(task);
  const int64_t part = kPartHead + q.stride;
  for (int64_t i = 0; i < q.count; ++i) {
    float* total = task.parts + i * part;
    for (int64_t split = task.split0 + 1; split < task.split1; ++split)
      join_part(total, task.parts + ((split - task.split0) * q.count + i) * part, q.stride);
    write_result(q, i, total);
  }
}

}  // namespace
}  // namespace gemma_ext::depth_batching::GEMMA_EXT_ISA
