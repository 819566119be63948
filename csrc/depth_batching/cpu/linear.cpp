// SPDX-License-Identifier: Apache-2.0
// Norms and linear layers: rows are packed, x A_j^T of every segment, then every column.
#include <algorithm>
#include <vector>

#include "deal.h"
#include "kernels.h"
#include "linear_engine.h"
#include "packed_rows.h"

namespace gemma_ext::depth_batching::cpu {
namespace {

constexpr int64_t kNormRows = 4;  // of a task

Wrong wrong_slot(const int32_t* slots, int64_t n, int64_t S) {
  for (int64_t i = 0; i < n; ++i)
    if (slots[i] >= S) return {"slots", i, slots[i], INT32_MIN, S};
  return {};
}

struct Shrink {
  int projection;
  int64_t loop, column;
};

std::vector<Shrink> shrinks(const Linear& call) {
  std::vector<Shrink> tasks;
  for (int p = 0; p < call.count; ++p)
    for (int64_t j = 0; call.projections[p].rank > 0 && j < call.loops; ++j)
      if (call.seg_offsets[j] < call.seg_offsets[j + 1])
        for (int64_t column = 0; column < call.projections[p].rank; column += kColumns)
          tasks.push_back({p, j, column});
  return tasks;
}

struct Expand {
  int projection;
  int64_t column;
};

std::vector<Expand> expands(const Linear& call) {
  std::vector<Expand> tasks;
  const int count = call.activation == kNone ? call.count : 1;
  for (int p = 0; p < count; ++p)
    for (int64_t column = 0; column < call.projections[p].features; column += kColumns)
      tasks.push_back({p, column});
  return tasks;
}

}  // namespace

Wrong find_wrong(const Gather& call) { return wrong_slot(call.slots, call.n, call.S); }

Wrong find_wrong(const Scatter& call) {
  const Wrong wrong = wrong_slot(call.slots, call.n, call.S);
  if (wrong.what) return wrong;
  std::vector<bool> taken(call.S);
  for (int64_t i = 0; i < call.n; ++i) {
    if (call.slots[i] < 0) continue;
    if (taken[call.slots[i]]) return {"slots that differ", i, call.slots[i], 0, call.S};
    taken[call.slots[i]] = true;
  }
  return {};
}

Wrong find_wrong(const Linear& call) {
  for (int64_t j = 0; call.seg_offsets && j <= call.loops; ++j) {
    const int64_t least = j ? call.seg_offsets[j - 1] : 0, at = call.seg_offsets[j];
    const int64_t end = j ? call.n + 1 : 1;
    if (at < least || at >= end) return {"ascending seg_offsets", j, at, least, end};
  }
  return {};
}

void run(const Gather& call, Workers& workers) {
  deal(workers, call.n * call.D, (call.n + kNormRows - 1) / kNormRows, [&](int64_t task, Scratch&) {
    for (int64_t i = task * kNormRows; i < std::min(call.n, (task + 1) * kNormRows); ++i)
      kernels().linear.gather(call, i);
  });
}

void run(const Scatter& call, Workers& workers) {
  deal(workers, call.n * call.D, (call.n + kNormRows - 1) / kNormRows,
       [&](int64_t task, Scratch& s) {
         for (int64_t i = task * kNormRows; i < std::min(call.n, (task + 1) * kNormRows); ++i)
           kernels().linear.scatter(call, i, s);
       });
}

void run(const Linear& call, Workers& workers) {
  if (call.n == 0) return;
  const LinearKernels& k = kernels().linear;
  const int64_t size = k.packed_size(call.type);
  const bool in_place = size == size_of(call.type) && call.D % kWhole == 0;
  PackedRows x(in_place ? 0 : call.n, call.D, size);
  Packed packed = x.rows();
  if (in_place) {
    packed = {const_cast<void*>(call.x), call.x_stride};
  } else {
    deal(workers, call.n * call.D, (call.n + kRows - 1) / kRows, [&](int64_t task, Scratch&) {
      for (int64_t i = task * kRows; i < std::min(call.n, (task + 1) * kRows); ++i)
        k.pack(call, i, packed);
    });
  }
  std::vector<PackedRows> kept;
  Packed low[kMostProjections] = {};
  int64_t ranks = 0;
  for (int p = 0; p < call.count; ++p) {
    const int64_t rank = call.projections[p].rank;
    ranks += rank;
    kept.emplace_back(rank ? call.n : 0, rank, size);
    low[p] = kept.back().rows();
  }
  const std::vector<Shrink> down = shrinks(call);
  if (!down.empty())
    deal(workers, call.n * call.D * ranks, int64_t(down.size()), [&](int64_t task, Scratch& s) {
      const auto& [p, j, column] = down[task];
      const Projection& projection = call.projections[p];
      k.shrink(call, projection, j, call.seg_offsets[j], call.seg_offsets[j + 1], column,
               std::min(projection.rank, column + kColumns), packed, low[p], s);
    });
  const std::vector<Expand> up = expands(call);
  deal(workers, call.n * call.D * call.y_width, int64_t(up.size()), [&](int64_t task, Scratch& s) {
    k.expand(call, up[task].projection, up[task].column, packed, low, s);
  });
}

}  // namespace gemma_ext::depth_batching::cpu
