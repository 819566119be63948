// SPDX-License-Identifier: Apache-2.0
#include "sums.h"

namespace gemma_ext::sae::cuda {
namespace {

// A block per window and slice: the feature of several runs that begins in the window.
template <class O>
KERNEL_BOUNDS(kMostThreads, 2)
void add_runs_kernel(RunParams p) {
  const int64_t w = simt::block_idx() / p.slices, slice = simt::block_idx() % p.slices;
  const Sorted& s = p.sorted;
  const int64_t last = (w + 1) * p.run - 1;
  if (last >= s.start[p.list.F]) return;
  const uint32_t f = s.feature[last];
  const int64_t start = s.start[f], length = s.start[f + 1] - start;
  if (start / p.run != w || length <= p.run) return;
  const int64_t d = slice * simt::block_dim() + simt::thread_idx(), runs = ceil_div(length, p.run);
  const auto slot = [&](int64_t r) { return 2 * (w + r) + (r == 0); };
  if (d < p.D) {
    float sum[1] = {};
    for (int64_t r = 0; r < runs; ++r) sum[0] += p.parts[slot(r) * p.D + d];
    write_sum<O>(p, f, d, sum);
  }
  if (p.totals && slice == 0 && simt::thread_idx() == 0) {
    float sum = 0.0f;
    for (int64_t r = 0; r < runs; ++r) sum += p.masses[slot(r)];
    p.totals[f] = sum;
  }
}

// Zeros in the rows of features without entries: a warp per row.
template <class O>
KERNEL_BOUNDS(kThreads, 4)
void clear_rows_kernel(RunParams p) {
  for (int64_t f = int64_t{simt::block_idx()} * kWarps + simt::warp_idx(); f < p.list.F;
       f += int64_t{simt::grid_dim()} * kWarps) {
    if (p.sorted.start[f] < p.sorted.start[f + 1]) continue;
    for (int64_t d = simt::lane_idx(); d < p.D; d += simt::kWarpSize)
      static_cast<O*>(p.sums)[f * p.sums_stride + d] = narrow<O>(0.0f);
    if (p.totals && simt::lane_idx() == 0) p.totals[f] = 0.0f;
  }
}

// along[f] = sum over entries of v scale <g, W[f]> / |W[f]|^2 = <S[f], W[f]> / |W[f]|^2; 0 where W[f] is. A warp
// per feature.
struct AlongParams {
  RunParams run;
  const float* dots;
  float* along;
};

KERNEL_BOUNDS(kThreads, 4)
void along_kernel(AlongParams q) {
  const RunParams& p = q.run;
  for (int64_t f = int64_t{simt::block_idx()} * kWarps + simt::warp_idx(); f < p.list.F;
       f += int64_t{simt::grid_dim()} * kWarps) {
    const int begin = p.sorted.start[f], end = p.sorted.start[f + 1];
    if (begin == end) continue;
    float sum = 0.0f, square = 0.0f;
    for (int at = begin + simt::lane_idx(); at < end; at += simt::kWarpSize) {
      const int entry = p.sorted.entry[at];
      const float v = p.list.values[entry];
      if (v != 0.0f) sum += v * q.dots[entry];
    }
    for (int64_t d = simt::lane_idx(); d < p.D; d += simt::kWarpSize) {
      float w[1];
      load_any(p.weight, f, d, w);
      square += w[0] * w[0];
    }
    sum = warp_sum(sum);
    square = warp_sum(square);
    if (simt::lane_idx() == 0) q.along[f] = square > 0.0f ? sum / square : 0.0f;
  }
}

// sum_n scale[n] g[n] of a share of the rows: a block per share and slice of columns; then those in order.
constexpr int kMostShares = 512, kLeastRows = 64;

struct ColumnParams {
  ColumnMemory memory;
  Table rows;
  const float* scale;  // [N] or null: 1
  float* to;           // [D]
  int slices;
};

template <class T>
KERNEL_BOUNDS(kMostThreads, 2)
void sum_rows_kernel(ColumnParams p) {
  const int64_t share = simt::block_idx() / p.slices, slice = simt::block_idx() % p.slices;
  const int64_t d = slice * simt::block_dim() + simt::thread_idx();
  if (d >= p.memory.D) return;
  const int64_t end = least((share + 1) * p.memory.rows, p.memory.N);
  float sum = 0.0f;
  UNROLL_BY(8)
  for (int64_t n = share * p.memory.rows; n < end; ++n)
    sum += (p.scale ? p.scale[n] : 1.0f) * widen(row_of<T>(p.rows, n)[d]);
  p.memory.parts[share * p.memory.D + d] = sum;
}

KERNEL_BOUNDS(kThreads, 4)
void add_shares_kernel(ColumnParams p) {
  const int64_t d = int64_t{simt::block_idx()} * kThreads + simt::thread_idx();
  if (d >= p.memory.D) return;
  float sum = 0.0f;
  for (int64_t share = 0; share < p.memory.shares; ++share)
    sum += p.memory.parts[share * p.memory.D + d];
  p.to[d] = sum;
}

template <class O>
constexpr DType kTypeOf = std::is_same_v<O, float>        ? DType::kFloat32
                          : std::is_same_v<O, simt::bf16> ? DType::kBFloat16
                                                          : DType::kFloat16;

// T of the rows, O of the sums.
template <class T, class O>
void add_typed_sums(Launches& launches, RunParams p) {
  constexpr int kWide = 16 / sizeof(T);
  const bool wide = is_wide(p.rows, p.D, kWide) && is_wide(p.weight, p.D, kWide) &&
                    is_wide(p.sums, p.sums_stride, kTypeOf<O>, p.D, kWide);
  by_width<T>(wide, [&](auto v) {
    constexpr int kV = decltype(v)::value;
    const RowShape shape = row_shape(p.D, kV);
    p.slices = shape.rounds;
    const auto kernel = p.dots ? sum_runs_kernel<T, O, kV, true> : sum_runs_kernel<T, O, kV, false>;
    launches.add(kernel, p.windows * p.slices, shape.threads, sizeof(RunShared), p);
  });
  const RowShape shape = row_shape(p.D, 1);
  p.slices = shape.rounds;
  launches.add(add_runs_kernel<O>, p.windows * p.slices, shape.threads, 0, p);
  if (p.place) return;
  launches.add(clear_rows_kernel<O>, taking_turns(ceil_div(p.list.F, kWarps)), kThreads, 0, p);
}

}  // namespace

RunMemory::RunMemory(Arena& memory, const List& list, int64_t D, bool totals)
    : features(memory, list),
      parts(memory.take<float>(features.windows * 2 * D)),
      masses(memory.take<float>(totals ? features.windows * 2 : 0)) {}

RunParams RunMemory::params(const List& list, int64_t D) const {
  RunParams p{};
  p.list = list;
  p.sorted = features.sorted;
  p.run = features.run;
  p.windows = features.windows;
  p.D = p.sums_stride = D;
  p.parts = parts;
  p.masses = masses;
  return p;
}

void add_sums(Launches& launches, RunParams p, DType sums) {
  by_dtype(p.rows.type, [&](auto type) {
    using T = decltype(type);
    if constexpr (std::is_same_v<T, float>) {
      by_dtype(sums, [&](auto out) { add_typed_sums<T, decltype(out)>(launches, p); });
    } else if (sums == DType::kFloat32) {
      add_typed_sums<T, float>(launches, p);
    } else {
      add_typed_sums<T, T>(launches, p);
    }
  });
}

void add_along(Launches& launches, const RunParams& p, const float* dots, float* along) {
  launches.add(along_kernel, taking_turns(ceil_div(p.list.F, kWarps)), kThreads, 0,
               {p, dots, along});
}

ColumnMemory::ColumnMemory(Arena& memory, int64_t N, int64_t D)
    : N(N),
      D(D),
      rows(most(ceil_div(N, kMostShares), kLeastRows)),
      shares(ceil_div(N, rows)),
      parts(memory.take<float>(shares * D)) {}

void add_column_sums(Launches& launches, const ColumnMemory& m, const Table& rows,
                     const float* scale, float* to) {
  const RowShape shape = row_shape(m.D, 1);
  const ColumnParams p{m, rows, scale, to, shape.rounds};
  by_dtype(rows.type, [&](auto type) {
    launches.add(sum_rows_kernel<decltype(type)>, m.shares * p.slices, shape.threads, 0, p);
  });
  launches.add(add_shares_kernel, ceil_div(m.D, kThreads), kThreads, 0, p);
}

}  // namespace gemma_ext::sae::cuda
