// SPDX-License-Identifier: Apache-2.0
// The backward of decode, and scatter.
#include <optional>

#include "sums.h"
#include "touched.cuh"

namespace gemma_ext::sae::cuda {
namespace {

struct DotsParams {
  List list;
  Table weight, grad;
  const float* scale;
  float* dots;
  int64_t D;
};

// dots = scale[n] <g[n], W[i_nj]>: a block per token, a warp to four entries of it.
template <class G, class T, int kV>
KERNEL_BOUNDS(kThreads, 2)
void dots_kernel(DotsParams p) {
  constexpr int kTogether = 4;
  for (int64_t n = simt::block_idx(); n < p.list.N; n += simt::grid_dim()) {
    const Span span = entries_of(p.list, n);
    const G* row = row_of<G>(p.grad, n);
    const float scale = p.scale ? p.scale[n] : 1.0f;
    for (int64_t first = span.begin + simt::warp_idx() * kTogether; first < span.end;
         first += kWarps * kTogether) {
      float sum[kTogether] = {};
      const T* weight[kTogether];
      UNROLL
      for (int e = 0; e < kTogether; ++e) {
        const int index = p.list.indices[least(first + e, span.end - 1)];
        weight[e] = row_of<T>(p.weight, is_feature(p.list, index) ? index : 0);
      }
      for (int64_t d = simt::lane_idx() * kV; d < p.D; d += simt::kWarpSize * kV) {
        const Few<G, kV> g = Few<G, kV>::load(row + d);
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
      if (simt::lane_idx() % 8 == 0 && at < span.end && is_feature(p.list, p.list.indices[at]))
        p.dots[at] = own * scale;
    }
  }
}

// Elements of grad in 16 bytes, where all rows that are read so far allow it.
int width_of(const DecodeBackward& c, const void* d_weight) {
  const int kV = static_cast<int>(16 / size_of(c.grad.type));
  const bool wide = is_wide(c.weight, c.D, kV) && is_wide(c.grad, c.D, kV) &&
                    is_wide(d_weight, c.D, c.weight.type, c.D, kV);
  return wide ? kV : 1;
}

template <class G, class T>
void add_typed_dots(Launches& launches, const DecodeBackward& c, float* dots) {
  by_width<G>(width_of(c, nullptr) > 1, [&](auto v) {
    launches.add(dots_kernel<G, T, decltype(v)::value>, taking_turns(c.list.N), kThreads, 0,
                 {c.list, c.weight, c.grad, c.scale, dots, c.D});
  });
}

void add_dots(Launches& launches, const DecodeBackward& c, float* dots) {
  by_dtype(c.weight.type, [&](auto type) {
    using T = decltype(type);
    if (c.grad.type == DType::kFloat32) {
      add_typed_dots<float, T>(launches, c, dots);
    } else {
      add_typed_dots<T, T>(launches, c, dots);
    }
  });
}

struct BackwardMemory {
  std::optional<ColumnMemory> columns;
  std::optional<RunMemory> run;
  std::optional<TouchedMemory> touched;
  float *dots, *along = nullptr;

  BackwardMemory(Arena& memory, const DecodeBackward& c) : dots(c.d_values) {
    if (c.d_bias) columns.emplace(memory, c.list.N, c.D);
    if (!c.want_weight) return;
    run.emplace(memory, c.list, c.D, false);
    if (c.rows_only) touched.emplace(memory, c.list.F);
    if (!c.unit_norm) return;
    along = memory.take<float>(c.list.F);
    if (!dots) dots = memory.take<float>(c.list.entries);
  }
};

}  // namespace

int64_t workspace(const DecodeBackward& call) {
  Arena arena(nullptr);
  BackwardMemory(arena, call);
  return arena.bytes();
}

Status run(const DecodeBackward& c, void* memory, Stream stream, const AllocateRows& allocate) {
  Launches launches(stream);
  Arena arena(memory);
  const BackwardMemory m(arena, c);
  if (c.d_bias) add_column_sums(launches, *m.columns, c.grad, c.scale, c.d_bias);
  // what is parallel to a row is known by the dots of all its entries
  const bool together = c.want_weight && m.dots && !c.unit_norm &&
                        row_shape(c.D, width_of(c, c.d_weight)).rounds == 1;
  if (m.dots) add_clear(launches, c.list, m.dots);
  if (m.dots && !together) add_dots(launches, c, m.dots);
  if (!c.want_weight) return launches.status();
  RunParams p = m.run->params(c.list, c.D);
  p.rows = c.grad;
  p.scale = c.scale;
  p.weight = c.weight;
  p.sums = c.d_weight;
  add_by_feature(launches, c.list, m.run->features);
  if (together) p.dots = m.dots;
  if (c.unit_norm) {
    add_along(launches, p, m.dots, m.along);
    p.along = m.along;
  }
  if (c.rows_only) {
    int64_t touched = 0;
    add_touched_count(launches, p.sorted, c.list.F, *m.touched);
    launches.copy_out(&touched, m.touched->before + m.touched->blocks, sizeof(touched));
    if (launches.status() != 0) return launches.status();
    const TouchedRows rows = allocate(touched);
    add_touched(launches, p.sorted, c.list.F, *m.touched, rows.features);
    p.sums = rows.d_weight;
    p.place = m.touched->place;
  }
  add_sums(launches, p, c.weight.type);
  return launches.status();
}

Status run(const DecodeBackward& call, void* memory, Stream stream) {
  return run(call, memory, stream, {});
}

int64_t workspace(const Scatter& call) {
  Arena arena(nullptr);
  RunMemory(arena, call.list, call.D, true);
  return arena.bytes();
}

Status run(const Scatter& call, void* memory, Stream stream) {
  Launches launches(stream);
  Arena arena(memory);
  const RunMemory m(arena, call.list, call.D, true);
  RunParams p = m.params(call.list, call.D);
  p.rows = call.rows;
  p.sums = call.sums;
  p.totals = call.totals;
  add_by_feature(launches, call.list, m.features);
  add_sums(launches, p, DType::kFloat32);
  return launches.status();
}

const char* status_text(Status status) {
  return simt::status_text(static_cast<simt::Status>(status));
}

}  // namespace gemma_ext::sae::cuda
