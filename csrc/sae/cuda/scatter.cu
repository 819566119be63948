// SPDX-License-Identifier: Apache-2.0
// Sums over the tokens of each feature, and the backward of decode.
#include <optional>

#include "runs.cuh"
#include "touched.cuh"

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
      static_cast<O*>(p.sums)[f * p.D + d] = narrow<O>(0.0f);
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

struct DotsParams {
  List list;
  Table weight, grad;
  const float* scale;
  float* dots;
  int64_t D;
};

// dots = scale[n] <g[n], W[i_nj]>: a block per token, a warp to four entries of it. Nobody's are 0.
template <class T, int kV>
KERNEL_BOUNDS(kThreads, 2)
void dots_kernel(DotsParams p) {
  constexpr int kTogether = 4;
  for (int64_t n = simt::block_idx(); n < p.list.N; n += simt::grid_dim()) {
    const Span span = entries_of(p.list, n), gap = gap_behind(p.list, n);
    const T* row = row_of<T>(p.grad, n);
    const float scale = p.scale ? p.scale[n] : 1.0f;
    for (int64_t first = span.begin + simt::warp_idx() * kTogether; first < span.end;
         first += kWarps * kTogether) {
      float sum[kTogether] = {};
      const T* weight[kTogether];
      UNROLL
      for (int e = 0; e < kTogether; ++e) {
        const int index = p.list.indices[least(first + e, span.end - 1)];
        const bool valid = is_feature(p.list, index);
        weight[e] = row_of<T>(p.weight, valid ? index : 0);
        if (!valid) sum[e] = kNan;
      }
      for (int64_t d = simt::lane_idx() * kV; d < p.D; d += simt::kWarpSize * kV) {
        const Few<T, kV> g = Few<T, kV>::load(row + d);
        Few<T, kV> w[kTogether];
        UNROLL
        for (int e = 0; e < kTogether; ++e) w[e] = Few<T, kV>::load(weight[e] + d);
        UNROLL
        for (int e = 0; e < kTogether; ++e) {
          UNROLL
          for (int i = 0; i < kV; ++i) sum[e] += g.at(i) * w[e].at(i);
        }
      }
      const float own = four_sums(sum);
      const int64_t at = first + simt::lane_idx() / 8;
      if (simt::lane_idx() % 8 == 0 && at < span.end) p.dots[at] = own * scale;
    }
    for (int64_t e = gap.begin + simt::thread_idx(); e < gap.end; e += kThreads) p.dots[e] = 0.0f;
  }
}

// sum_n scale[n] g[n] of a share of the rows: a block per share and slice of columns; then those in order.
constexpr int kMostShares = 512, kLeastRows = 64;

struct BiasParams {
  Table grad;
  const float* scale;
  int64_t N, D, rows, shares;  // rows of a share
  float *parts, *out;          // [shares, D], [D]
  int slices;
};

template <class T>
KERNEL_BOUNDS(kMostThreads, 2)
void sum_rows_kernel(BiasParams p) {
  const int64_t share = simt::block_idx() / p.slices, slice = simt::block_idx() % p.slices;
  const int64_t d = slice * simt::block_dim() + simt::thread_idx();
  if (d >= p.D) return;
  const int64_t end = least((share + 1) * p.rows, p.N);
  float sum = 0.0f;
  UNROLL_BY(8)
  for (int64_t n = share * p.rows; n < end; ++n)
    sum += (p.scale ? p.scale[n] : 1.0f) * widen(row_of<T>(p.grad, n)[d]);
  p.parts[share * p.D + d] = sum;
}

KERNEL_BOUNDS(kThreads, 4)
void add_shares_kernel(BiasParams p) {
  const int64_t d = int64_t{simt::block_idx()} * kThreads + simt::thread_idx();
  if (d >= p.D) return;
  float sum = 0.0f;
  for (int64_t share = 0; share < p.shares; ++share) sum += p.parts[share * p.D + d];
  p.out[d] = sum;
}

struct RunMemory {
  FeatureMemory features;
  float *parts, *masses;

  RunMemory(Arena& memory, const List& list, int64_t D, bool sums, bool totals)
      : features(memory, list),
        parts(memory.take<float>(sums ? features.windows * 2 * D : 0)),
        masses(memory.take<float>(totals ? features.windows * 2 : 0)) {}

  RunParams params(const List& list, int64_t D) const {
    RunParams p{};
    p.list = list;
    p.sorted = features.sorted;
    p.run = features.run;
    p.windows = features.windows;
    p.D = D;
    p.parts = parts;
    p.masses = masses;
    return p;
  }
};

template <class O>
constexpr DType kTypeOf = std::is_same_v<O, float>        ? DType::kFloat32
                          : std::is_same_v<O, simt::bf16> ? DType::kBFloat16
                                                          : DType::kFloat16;

// T of the rows, O of the sums.
template <class T, class O>
void add_sums(Launches& launches, RunParams p) {
  constexpr int kWide = 16 / sizeof(T);
  const bool wide = is_wide(p.rows, p.D, kWide) && is_wide(p.weight, p.D, kWide) &&
                    is_wide(p.sums, p.D, kTypeOf<O>, p.D, kWide);
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

// Whether a block that sums sees whole rows, and may take dots along.
bool in_one_round(const DecodeBackward& c) {
  const int kV = static_cast<int>(16 / size_of(c.weight.type));
  const bool wide = is_wide(c.weight, c.D, kV) && is_wide(c.grad, c.D, kV) &&
                    is_wide(c.d_weight, c.D, c.weight.type, c.D, kV);
  return row_shape(c.D, wide ? kV : 1).rounds == 1;
}

struct BackwardMemory {
  std::optional<RunMemory> run;
  std::optional<TouchedMemory> touched;
  float *dots = nullptr, *along = nullptr, *shares = nullptr;
  int64_t share_rows;

  BackwardMemory(Arena& memory, const DecodeBackward& c)
      : share_rows(most(ceil_div(c.list.N, kMostShares), kLeastRows)) {
    if (c.want_weight) {
      run.emplace(memory, c.list, c.D, true, false);
      if (c.rows_only) touched.emplace(memory, c.list.F);
      if (c.unit_norm) {
        along = memory.take<float>(c.list.F);
        dots = c.d_values ? c.d_values : memory.take<float>(c.list.entries);
      }
    }
    if (c.d_bias) shares = memory.take<float>(ceil_div(c.list.N, share_rows) * c.D);
  }
};

template <class T>
void add_bias(Launches& launches, const DecodeBackward& c, const BackwardMemory& m) {
  const RowShape shape = row_shape(c.D, 1);
  const BiasParams p{c.grad,
                     c.scale,
                     c.list.N,
                     c.D,
                     m.share_rows,
                     ceil_div(c.list.N, m.share_rows),
                     m.shares,
                     c.d_bias,
                     shape.rounds};
  launches.add(sum_rows_kernel<T>, p.shares * p.slices, shape.threads, 0, p);
  launches.add(add_shares_kernel, ceil_div(c.D, kThreads), kThreads, 0, p);
}

template <class T>
void add_dots(Launches& launches, const DecodeBackward& c, float* dots) {
  constexpr int kWide = 16 / sizeof(T);
  by_width<T>(is_wide(c.weight, c.D, kWide) && is_wide(c.grad, c.D, kWide), [&](auto v) {
    launches.add(dots_kernel<T, decltype(v)::value>, taking_turns(c.list.N), kThreads, 0,
                 {c.list, c.weight, c.grad, c.scale, dots, c.D});
  });
}

// Up to where a card knows how many features are touched.
template <class T>
RunParams begin(Launches& launches, const DecodeBackward& c, const BackwardMemory& m) {
  if (c.d_bias) add_bias<T>(launches, c, m);
  if (!c.want_weight) {
    if (c.d_values) add_dots<T>(launches, c, c.d_values);
    return {};
  }
  RunParams p = m.run->params(c.list, c.D);
  p.rows = c.grad;
  p.scale = c.scale;
  p.weight = c.weight;
  const bool together = c.d_values && !c.unit_norm && in_one_round(c);
  float* dots = c.unit_norm ? m.dots : c.d_values;
  add_by_feature(launches, c.list, m.run->features, together ? dots : nullptr);
  if (together) {
    p.dots = dots;
  } else if (dots) {
    add_dots<T>(launches, c, dots);
  }
  if (c.unit_norm) {
    launches.add(along_kernel, taking_turns(ceil_div(c.list.F, kWarps)), kThreads, 0,
                 {p, dots, m.along});
    p.along = m.along;
  }
  if (c.rows_only) add_touched_count(launches, p.sorted, c.list.F, *m.touched);
  return p;
}

}  // namespace

int64_t workspace(const DecodeBackward& call) {
  Arena arena(nullptr);
  BackwardMemory(arena, call);
  return arena.bytes();
}

Status run(const DecodeBackward& call, void* memory, Stream stream, const AllocateRows& allocate) {
  Launches launches(stream);
  Arena arena(memory);
  const BackwardMemory m(arena, call);
  by_dtype(call.weight.type, [&](auto type) {
    using T = decltype(type);
    RunParams p = begin<T>(launches, call, m);
    if (!call.want_weight) return;
    p.sums = call.d_weight;
    if (call.rows_only) {
      int64_t touched = 0;
      launches.copy_out(&touched, m.touched->before + m.touched->blocks, sizeof(touched));
      if (launches.status() != 0) return;
      const TouchedRows rows = allocate(touched);
      add_touched(launches, p.sorted, call.list.F, *m.touched, rows.features);
      p.sums = rows.d_weight;
      p.place = m.touched->place;
    }
    add_sums<T, T>(launches, p);
  });
  return launches.status();
}

Status run(const DecodeBackward& call, void* memory, Stream stream) {
  return run(call, memory, stream, {});
}

int64_t workspace(const Scatter& call) {
  Arena arena(nullptr);
  RunMemory(arena, call.list, call.D, true, true);
  return arena.bytes();
}

Status run(const Scatter& call, void* memory, Stream stream) {
  Launches launches(stream);
  by_dtype(call.rows.type, [&](auto type) {
    Arena arena(memory);
    const RunMemory m(arena, call.list, call.D, true, true);
    RunParams p = m.params(call.list, call.D);
    p.rows = call.rows;
    p.sums = call.sums;
    p.totals = call.totals;
    add_by_feature(launches, call.list, m.features, nullptr);
    add_sums<decltype(type), float>(launches, p);
  });
  return launches.status();
}

const char* status_text(Status status) {
  return simt::status_text(static_cast<simt::Status>(status));
}

}  // namespace gemma_ext::sae::cuda
