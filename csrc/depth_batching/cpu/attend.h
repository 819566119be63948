// SPDX-License-Identifier: Apache-2.0
// Attention of the queries of a task: rows that follow each other in one request, heads that share K. A page is
// widened once for all of them. What a query gets depends on its own tokens alone: their order is that of their
// positions, and those that it does not see are never added.
#pragma once

#include "attend_page.h"

namespace gemma_ext::depth_batching::GEMMA_EXT_ISA {
namespace {

constexpr float kNothing = -__builtin_inff();

// Scores of a split, [count, kSplit], become weights exp(score - maximum); the part's head is filled in.
inline void weigh(const Attention& a, float* scores, Seen seen, Seen sunk, float* part) {
  Vf most = set1(kNothing);
  const auto in = [&](int32_t t) {
    return ((iota() + t >= seen.begin) & (iota() + t < seen.end)) | (iota() + t < sunk.end);
  };
  const int32_t begin = sunk.end > 0 ? 0 : seen.begin / kLanes * kLanes;
  const int32_t end = seen.begin < seen.end ? seen.end : sunk.end;
  for (int32_t t = begin; t < end; t += kLanes) {
    Vf score = load(scores + t) * a.scale;
    if (a.softcap > 0) score = tanh(score / a.softcap) * a.softcap;
    score = in(t) ? score : set1(kNothing);
    store(scores + t, score);
    most = score > most ? score : most;
  }
  const float maximum = gemma_ext::cpu::GEMMA_EXT_ISA::max(most);
  Vf total{};
  for (int32_t t = begin; t < end; t += kLanes) {
    const Vf score = load(scores + t);
    // of scores that are all -inf nothing is left, as of no token; NaN, which no maximum sees, stays
    const Vf weight =
        maximum == kNothing ? (score == kNothing ? Vf{} : score) : exp(score - maximum);
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
    const Seen seen = q.seen(i, begin, kSplit), sunk = q.sunk(i, begin, kSplit);
    if (sunk.end > 0) {
      first = 0;
      last = sunk.end > last ? sunk.end : last;
    }
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
    weigh(*q.call, scores + i * kSplit, q.seen(i, begin, kSplit), q.sunk(i, begin, kSplit),
          parts + i * part);
  }
  const auto add = [&](int32_t t, const float* v, auto of) {
    for (int64_t i = 0; i < q.count;) {
      const Seen seen = of(i);
      int64_t alike = 1;
      for (; i + alike < q.count && alike < kMost; ++alike) {
        const Seen other = of(i + alike);
        if (other.begin != seen.begin || other.end != seen.end) break;
      }
      with_count(alike, [&](auto block) {
        add_page<block.value>(scores + i * kSplit + t, v, seen, q.stride,
                              parts + i * part + kPartHead, part);
        i += block.value;
      });
    }
  };
  each_page(1, [&](int32_t t, const float* v) {
    if (q.call->sinks > 0) add(t, v, [&](int64_t i) { return q.sunk(i, begin + t, kPage); });
    add(t, v, [&](int64_t i) { return q.seen(i, begin + t, kPage); });
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
