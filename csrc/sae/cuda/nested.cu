// SPDX-License-Identifier: Apache-2.0
// Errors of nested reconstructions, and their gradients by the suffix sums of sae-kernels 2.1: a block per token.
#include "nested.cuh"

#include <optional>

#include "sums.h"

namespace gemma_ext::sae::cuda {
namespace {

struct NestedParams {
  Nested call;
  Levels levels;
};

struct NestedShared {
  LevelShared level;
  float parts[kMostWarps];
};

// x^ - x of a thread's word.
template <int kV>
DEVICE void residual(const Nested& c, int64_t n, int64_t d, const float (&sum)[kV],
                     float (&r)[kV]) {
  load_any(c.target, n, d, r);
  UNROLL
  for (int i = 0; i < kV; ++i) r[i] = sum[i] + (c.bias ? c.bias[d + i] : 0.0f) - r[i];
}

template <class T, int kV>
KERNEL_BOUNDS(kMostThreads, 2)
void nested_kernel(NestedParams p) {
  NestedShared* s = simt::shared<NestedShared>();
  const Nested& c = p.call;
  const int t = simt::thread_idx(), threads = simt::block_dim();
  for (int64_t n = simt::block_idx(); n < c.list.N; n += simt::grid_dim()) {
    const Span span = entries_of(c.list, n);
    for (int64_t first = 0; first < c.D || first == 0; first += threads * kV) {
      const int64_t d = first + t * kV;
      const bool inside = d < c.D;
      const T* column = static_cast<const T*>(c.weight.data) + d;
      float sum[kV] = {};
      for (int m = 0; m < p.levels.count; ++m) {
        each_stage(c.list, p.levels, span, m, s->level, [&] {
          if (inside) add_rows(s->level.staged, s->level.count, column, c.weight.stride, sum);
        });
        float square = 0.0f, r[kV];
        if (inside) {
          residual(c, n, d, sum, r);
          UNROLL
          for (int i = 0; i < kV; ++i) square += r[i] * r[i];
        }
        square = block_sum(square, s->parts);
        float* to = c.squared + n * p.levels.count + m;
        if (t == 0) *to = first == 0 ? square : *to + square;
      }
    }
  }
}

// Columns of the call, which are some of those of its rows.
struct SuffixParams {
  NestedBackward call;
  Levels levels;
  float* suffix;   // [N, levels, D] s_j, or null; without a level zeros [N, 1, D]
  int64_t stride;  // of d_target
  bool goes_on;    // d_values hold what columns before brought
};

struct SuffixShared {
  LevelShared level;
  float dot[4][kMostWarps];
};

// From the last level to the first: s += 2 d_squared_m r_m, then x^_(m - 1) = x^_m - v W of its entries, whose
// gradients are <s, W>.
template <class T, int kV>
KERNEL_BOUNDS(kMostThreads, 1)
void nested_backward_kernel(SuffixParams p) {
  SuffixShared* s = simt::shared<SuffixShared>();
  Staged& staged = s->level.staged;
  const Nested& c = p.call.nested;
  const int t = simt::thread_idx(), threads = simt::block_dim(), levels = p.levels.count;
  for (int64_t n = simt::block_idx(); n < c.list.N; n += simt::grid_dim()) {
    const Span span = entries_of(c.list, n);
    for (int64_t first = 0; first < c.D; first += threads * kV) {
      const int64_t d = first + t * kV;
      const bool inside = d < c.D;
      const T* column = static_cast<const T*>(c.weight.data) + d;
      float sum[kV] = {}, suffix[kV] = {};
      for (int m = 0; m < levels; ++m) {
        each_stage(c.list, p.levels, span, m, s->level, [&] {
          if (inside) add_rows(staged, s->level.count, column, c.weight.stride, sum);
        });
      }
      for (int m = levels - 1; m >= 0; --m) {
        const float up = 2.0f * p.call.d_squared[n * levels + m];
        if (inside) {
          float r[kV];
          residual(c, n, d, sum, r);
          UNROLL
          for (int i = 0; i < kV; ++i) suffix[i] += up * r[i];
          if (p.suffix) store(p.suffix + (n * levels + m) * c.D + d, suffix);
        }
        each_stage(c.list, p.levels, span, m, s->level, [&] {
          const int count = s->level.count;
          for (int j = 0; j < count; j += 4) {
            Few<T, kV> row[4] = {};
            float dot[4] = {};
            UNROLL
            for (int a = 0; a < 4; ++a) {
              if (j + a < count && inside)
                row[a] = Few<T, kV>::load(column + staged.index[j + a] * c.weight.stride);
            }
            UNROLL
            for (int a = 0; a < 4; ++a) {
              const float v = j + a < count ? staged.value[j + a] : 0.0f;
              UNROLL
              for (int i = 0; i < kV; ++i) {
                dot[a] += suffix[i] * row[a].at(i);
                if (v != 0.0f) sum[i] -= v * row[a].at(i);
              }
            }
            if (!p.call.d_values) continue;
            const float part = four_sums(dot);
            simt::sync_block();  // the last four have been read
            if (simt::lane_idx() % 8 == 0) s->dot[simt::lane_idx() / 8][simt::warp_idx()] = part;
            simt::sync_block();
            if (t >= 4 || j + t >= count) continue;
            float all = 0.0f;
            for (int w = 0; w < threads / simt::kWarpSize; ++w) all += s->dot[t][w];
            float* to = p.call.d_values + s->level.entry[j + t];
            if (is_feature(c.list, c.list.indices[s->level.entry[j + t]]))
              *to = first == 0 && !p.goes_on ? all : *to + all;
          }
        });
      }
      if (!inside) continue;
      if (p.suffix && levels == 0) store(p.suffix + n * c.D + d, suffix);
      if (!p.call.d_target) continue;
      UNROLL
      for (int i = 0; i < kV; ++i) {
        store_any(p.call.d_target, c.target.type, n * p.stride + d + i, -suffix[i]);
      }
    }
  }
}

// Columns whose suffix sums are held at a time: those that a second-level cache holds, and a warp's at least.
int64_t slice_of(const Nested& c) {
  constexpr int64_t kBytes = 32 << 20, kColumns = 256;
  const int64_t column = most(c.list.N * c.levels, 1) * int64_t{sizeof(float)};
  return least(c.D, most(kBytes / column / kColumns, 1) * kColumns);
}

template <class Void>
Void* moved(Void* data, int64_t bytes) {
  return data ? const_cast<char*>(static_cast<const char*>(data)) + bytes : nullptr;
}

// Of the columns from `first` on, at most `slice`.
NestedBackward columns_of(NestedBackward call, int64_t first, int64_t slice) {
  Nested& c = call.nested;
  const int64_t weights = first * size_of(c.weight.type), targets = first * size_of(c.target.type);
  c.weight.data = moved(c.weight.data, weights);
  c.target.data = moved(c.target.data, targets);
  call.d_weight = moved(call.d_weight, weights);
  call.d_target = moved(call.d_target, targets);
  if (c.bias) c.bias += first;
  if (call.d_bias) call.d_bias += first;
  c.D = least(slice, c.D - first);
  return call;
}

struct SuffixMemory {
  int64_t slice;
  float *suffix = nullptr, *dots = nullptr, *along = nullptr;
  std::optional<RunMemory> run;
  std::optional<ColumnMemory> columns;

  SuffixMemory(Arena& memory, const NestedBackward& c) : slice(slice_of(c.nested)) {
    const Nested& nested = c.nested;
    if (c.d_weight || c.d_bias)
      suffix = memory.take<float>(nested.list.N * most(nested.levels, 1) * slice);
    if (c.d_weight) run.emplace(memory, nested.list, slice, false);
    if (c.d_weight && c.unit_norm) {
      along = memory.take<float>(nested.list.F);
      dots = c.d_values ? c.d_values : memory.take<float>(nested.list.entries);
    }
    if (c.d_bias) columns.emplace(memory, nested.list.N, slice);
  }
};

bool reads_wide(const Nested& c, const void* d_target, int64_t stride) {
  const int kWide = static_cast<int>(16 / size_of(c.weight.type));
  return is_wide(c.weight, c.D, kWide) && is_wide(c.target, c.D, kWide) &&
         is_wide(d_target, stride, c.target.type, c.D, kWide);
}

void add_walk(Launches& launches, const SuffixParams& p) {
  const Nested& c = p.call.nested;
  by_dtype(c.weight.type, [&](auto type) {
    using T = decltype(type);
    by_width<T>(reads_wide(c, p.call.d_target, p.stride), [&](auto v) {
      constexpr int kV = decltype(v)::value;
      launches.add(nested_backward_kernel<T, kV>, taking_turns(c.list.N),
                   row_shape(c.D, kV).threads, sizeof(SuffixShared), p);
    });
  });
}

}  // namespace

int64_t workspace(const Nested&) { return 0; }

Status run(const Nested& call, void*, Stream stream) {
  Launches launches(stream);
  by_dtype(call.weight.type, [&](auto type) {
    using T = decltype(type);
    by_width<T>(reads_wide(call, nullptr, 0), [&](auto v) {
      constexpr int kV = decltype(v)::value;
      launches.add(nested_kernel<T, kV>, taking_turns(call.list.N), row_shape(call.D, kV).threads,
                   sizeof(NestedShared), {call, Levels(call)});
    });
  });
  return launches.status();
}

int64_t workspace(const NestedBackward& call) {
  Arena arena(nullptr);
  SuffixMemory(arena, call);
  return arena.bytes();
}

Status run(const NestedBackward& call, void* memory, Stream stream) {
  const Nested& c = call.nested;
  const Levels levels(c);
  Launches launches(stream);
  Arena arena(memory);
  const SuffixMemory m(arena, call);
  NestedBackward left = call;
  if (m.dots) left.d_values = m.dots;
  if (left.d_values) add_clear(launches, c.list, left.d_values, &levels);
  if (call.d_weight) add_by_feature(launches, c.list, m.run->features, &levels);
  // what is parallel to a row is known by the dots over all columns
  if (!m.suffix || (m.along && m.slice < c.D)) {
    add_walk(launches, {left, levels, nullptr, c.D, false});
    left.d_values = nullptr;
    left.d_target = nullptr;
  }
  if (!m.suffix) return launches.status();
  for (int64_t first = 0; first == 0 || first < c.D; first += most(m.slice, 1)) {
    const NestedBackward part = columns_of(left, first, m.slice);
    const int64_t D = part.nested.D;
    add_walk(launches, {part, levels, m.suffix, c.D, first > 0});
    if (call.d_bias) {
      ColumnMemory columns = *m.columns;
      columns.D = D;
      const Table s_0{m.suffix, most(c.levels, 1) * D, DType::kFloat32};
      add_column_sums(launches, columns, s_0, nullptr, part.d_bias);
    }
    if (!call.d_weight) continue;
    RunParams p = m.run->params(c.list, c.D);
    p.weight = c.weight;
    if (m.along && first == 0) add_along(launches, p, m.dots, m.along);
    p.D = D;
    p.rows = {m.suffix, D, DType::kFloat32};
    p.weight = part.nested.weight;
    p.sums = part.d_weight;
    p.along = m.along;
    add_sums(launches, p, c.weight.type);
  }
  return launches.status();
}

}  // namespace gemma_ext::sae::cuda
