// SPDX-License-Identifier: Apache-2.0
// Sums over the tokens of a feature, rows of the tokens by list, and where wanted what every entry's row is along
// the feature's:
//   S[f] = sum v_nf G[n],  s[f] = sum v_nf,  dots <G[n], W[f]>
// A thread keeps a word of the feature's row; the rows of tokens are read once for all of it.
#pragma once

#include "features.cuh"

namespace gemma_ext::sae::cuda {

struct RunParams {
  List list;
  Sorted sorted;
  int64_t run, windows, D;
  Table rows;          // [N, D]
  const float* scale;  // [N] of the rows, or null: 1
  Table weight;        // [F, D], with dots or along
  void* sums;          // [F, D], or null
  int64_t sums_stride;
  const int* place;    // [F] row of the sums, or null: f
  const float* along;  // [F] times the row of the weight, is taken off; or null
  float* totals;       // [F] or null
  float* dots;         // [entries] or null
  float* parts;   // [windows, 2, D] of the features of several runs: of a later one, of the first
  float* masses;  // [windows, 2]
  int slices;     // blocks to a window, each with columns of its own
};

constexpr int kStagedPlaces = 256;
constexpr int kRowsAhead = 4;
constexpr int kInside = INT32_MIN;  // of a run, not its last

// `to`, of the last place of a run: its feature, or -1 - its partial sum.
struct RunShared {
  int token[kStagedPlaces], feature[kStagedPlaces], entry[kStagedPlaces], to[kStagedPlaces];
  float value[kStagedPlaces], scale[kStagedPlaces];
  float dot[2][kRowsAhead][kMostWarps];
};

// Places of the runs that begin in window w; empty where none does.
DEVICE Span places_of(const RunParams& p, int64_t w) {
  const Sorted& s = p.sorted;
  const int64_t count = s.start[p.list.F], last = least((w + 1) * p.run, count) - 1;
  int64_t begin = w * p.run;
  if (begin > last) return {0, 0};
  const uint32_t head = s.feature[begin];
  const int64_t since = begin - s.start[head];
  begin = least(begin + ceil_div(since, p.run) * p.run - since, s.start[head + 1]);
  if (begin > last) return {0, 0};
  const uint32_t tail = s.feature[last];
  const int64_t into = (last - s.start[tail]) % p.run;
  return {begin, least(last - into + p.run, s.start[tail + 1])};
}

DEVICE void stage_places(const RunParams& p, RunShared* s, int64_t from, int count) {
  for (int i = simt::thread_idx(); i < count; i += simt::block_dim()) {
    const int64_t place = from + i;
    const int entry = p.sorted.entry[place], token = p.sorted.token[entry];
    const int f = static_cast<int>(p.sorted.feature[place]);
    const int64_t start = p.sorted.start[f], end = p.sorted.start[f + 1];
    const int64_t into = (place - start) % p.run, begin = place - into;
    const bool last = place + 1 == end || into + 1 == p.run;
    const int64_t slot = begin / p.run * 2 + (begin == start);
    s->token[i] = token;
    s->feature[i] = f;
    s->entry[i] = entry;
    s->value[i] = p.sums || p.totals ? p.list.values[entry] : 0.0f;
    s->scale[i] = p.scale ? p.scale[token] : 1.0f;
    s->to[i] = !last ? kInside : end - start <= p.run ? f : static_cast<int>(-1 - slot);
  }
}

// A finished row of the sums, from column d on.
template <class O, int kV>
DEVICE void write_sum(const RunParams& p, int64_t f, int64_t d, float (&sum)[kV]) {
  if (p.along) {
    const float along = p.along[f];
    float own[kV];
    load_any(p.weight, f, d, own);
    UNROLL
    for (int j = 0; j < kV; ++j) sum[j] -= along * own[j];
  }
  store(static_cast<O*>(p.sums) + (p.place ? p.place[f] : f) * p.sums_stride + d, sum);
}

// T: of the rows; O: of the sums and, with dots, the weight. A block per window and slice of columns; one slice with dots.
template <class T, class O, int kV, bool kDots>
KERNEL_BOUNDS(kMostThreads, 1)
void sum_runs_kernel(RunParams p) {
  RunShared* s = simt::shared<RunShared>();
  const int t = simt::thread_idx();
  const int64_t w = simt::block_idx() / p.slices, slice = simt::block_idx() % p.slices;
  const int64_t d = (slice * simt::block_dim() + t) * kV;
  const bool inside = d < p.D;
  const Span places = places_of(p, w);
  const T* rows = static_cast<const T*>(p.rows.data) + d;
  float sum[kV] = {}, mass = 0.0f;
  Few<O, kV> own{};  // of the feature's row of W
  bool begins = true;
  for (int64_t from = places.begin; from < places.end; from += kStagedPlaces) {
    const int count = static_cast<int>(least(places.end - from, kStagedPlaces));
    simt::sync_block();
    stage_places(p, s, from, count);
    simt::sync_block();
    NO_UNROLL
    for (int i = 0, turn = 0; i < count; i += kRowsAhead, turn ^= 1) {
      Few<T, kV> row[kRowsAhead] = {};
      Few<O, kV> head[kDots ? kRowsAhead : 1] = {};
      float dot[kRowsAhead] = {};
      UNROLL
      for (int a = 0; a < kRowsAhead; ++a) {
        if (i + a >= count || !inside) continue;
        if (kDots || s->value[i + a] != 0.0f)
          row[a] = Few<T, kV>::load(rows + s->token[i + a] * p.rows.stride);
        if constexpr (kDots) {
          if (a == 0 ? begins : s->to[i + a - 1] != kInside)
            head[a] = Few<O, kV>::load(row_of<O>(p.weight, s->feature[i + a]) + d);
        }
      }
      UNROLL
      for (int a = 0; a < kRowsAhead; ++a) {
        if (i + a >= count) continue;
        if constexpr (kDots) {
          if (begins) own = head[a];
          UNROLL
          for (int j = 0; j < kV; ++j) dot[a] += row[a].at(j) * own.at(j);
        }
        const float v = s->value[i + a], scaled = v * s->scale[i + a];
        if (v != 0.0f) {
          UNROLL
          for (int j = 0; j < kV; ++j) sum[j] += scaled * row[a].at(j);
        }
        mass += v;
        const int to = s->to[i + a];
        begins = to != kInside;
        if (!begins) continue;
        if (inside && p.sums) {
          if (to >= 0) {
            write_sum<O>(p, to, d, sum);
          } else {
            store(p.parts + (int64_t{-1} - to) * p.D + d, sum);
          }
        }
        if (p.totals && slice == 0 && t == 0) (to < 0 ? p.masses[-1 - to] : p.totals[to]) = mass;
        UNROLL
        for (int j = 0; j < kV; ++j) sum[j] = 0.0f;
        mass = 0.0f;
      }
      if constexpr (kDots) {
        const float part = four_sums(dot);
        if (simt::lane_idx() % 8 == 0) s->dot[turn][simt::lane_idx() / 8][simt::warp_idx()] = part;
        simt::sync_block();  // the other turn's are read by now
        if (t < kRowsAhead && i + t < count) {
          float all = 0.0f;
          for (int k = 0; k < simt::block_dim() / simt::kWarpSize; ++k) all += s->dot[turn][t][k];
          p.dots[s->entry[i + t]] = all * s->scale[i + t];
        }
      }
    }
  }
}

}  // namespace gemma_ext::sae::cuda
