// SPDX-License-Identifier: Apache-2.0
// Two heads over the same rows and columns (divergence.h): a block has 128 rows against half a tile of both, and
// the logits of either never leave its registers.
#pragma once

#include "../divergence.h"
#include "combine.cuh"
#include "strips.cuh"

namespace gemma_ext::cce::cuda {

// log q and log p of one row.
struct PairLogs {
  float lse, lse_low, teacher_lse, teacher_low;

  DEVICE float q(float s) const { return (s - lse) - lse_low; }
  DEVICE float p(float t) const { return (t - teacher_lse) - teacher_low; }
};

// The names of rows and columns; in place of class weights the teacher's bias.
template <class T>
struct SharedPair {
  SharedHead<T> student, teacher;

  DEVICE SharedPair() : teacher(student) { teacher.bias = student.weight; }

  DEVICE void name_columns(const TwoHeads& h, int64_t first) const {
    cuda::name_columns(student, h.student, first);
    const int t = simt::thread_idx() - kBlockRows;
    if (t < 0 || t >= kHalf) return;
    const int64_t id = first + t;
    teacher.bias[t] = id < h.student.V && h.teacher.bias ? h.teacher.bias[id] : 0.0f;
  }
};

template <class T>
struct PairTiles {
  mma::Tile<T> student, teacher;

  // The caller has synchronised after naming rows and columns.
  DEVICE void multiply(const SharedPair<T>& s, const TwoHeads& h, int64_t first_column) {
    head_logits(student, s.student, h.student, first_column);
    head_logits(teacher, s.teacher, h.teacher, first_column);
  }
};

constexpr int kMoments = 4;

// [tiles, N] each, compact rows; null where not wanted. Sums of the first sweep are without the label's column,
// relative to the strip's own maxima, s' = s - max s, t' = t - max t, x = s' - t'.
struct PairPlanes {
  float *max, *sum, *teacher_max, *teacher_sum;
  float* cross;  // sum exp(t') -x of forward KL, sum exp(s') x of reverse KL
  // Of the filter. Forward KL: sum exp(2 s'), exp(s' + t'), exp(2 t'). Reverse KL: sum exp(s') x^2, exp(2 s'),
  // exp(2 s') x, exp(2 s') x^2. JSD, TVD: sum q h^2, q^2, q^2 h, q^2 h^2, every column.
  float* moment[kMoments];
  float *value, *mean;  // JSD, TVD: the divergence's share, sum q h; every column
};

struct PairParams {
  TwoHeads heads;
  Rows rows;
  PairPlanes out;
  float *target, *teacher_target;  // [N] s and t at the label
  int tiles, row_blocks;
  DivergenceRows row;  // second sweep: lse of both
};

struct PairSums {
  float max, sum, teacher_max, teacher_sum, cross, moment[kMoments];
};

DEVICE float base_of(float max) { return max == -kInfinity ? 0.0f : max; }

// The sums relative to other maxima, which are not smaller.
DEVICE PairSums moved(Kind kind, const PairSums& a, float max, float teacher_max) {
  PairSums r = a;
  r.max = max;
  r.teacher_max = teacher_max;
  const float by = base_of(a.max) - base_of(max);
  const float teacher_by = base_of(a.teacher_max) - base_of(teacher_max);
  const float f = a.max == -kInfinity ? 0.0f : exp_of(by);
  const float g = a.teacher_max == -kInfinity ? 0.0f : exp_of(teacher_by);
  r.sum = a.sum * f;
  r.teacher_sum = a.teacher_sum * g;
  const float k = by - teacher_by;  // x moves by it
  if (kind == Kind::kForwardKl) {
    r.cross = a.teacher_sum == 0.0f ? 0.0f : g * (a.cross - k * a.teacher_sum);
    r.moment[0] = a.moment[0] * f * f;
    r.moment[1] = a.moment[1] * f * g;
    r.moment[2] = a.moment[2] * g * g;
  }
  if (kind == Kind::kReverseKl) {
    const bool none = a.sum == 0.0f;
    r.cross = none ? 0.0f : f * (a.cross + k * a.sum);
    r.moment[0] = none ? 0.0f : f * (a.moment[0] + 2.0f * k * a.cross + k * k * a.sum);
    r.moment[1] = f * f * a.moment[1];
    r.moment[2] = none ? 0.0f : f * f * (a.moment[2] + k * a.moment[1]);
    r.moment[3] =
        none ? 0.0f : f * f * (a.moment[3] + 2.0f * k * a.moment[2] + k * k * a.moment[1]);
  }
  return r;
}

DEVICE PairSums merge(Kind kind, const PairSums& a, const PairSums& b) {
  const float max = fmaxf(a.max, b.max), teacher_max = fmaxf(a.teacher_max, b.teacher_max);
  const PairSums x = moved(kind, a, max, teacher_max), y = moved(kind, b, max, teacher_max);
  PairSums r{max, x.sum + y.sum, teacher_max, x.teacher_sum + y.teacher_sum, x.cross + y.cross, {}};
  UNROLL
  for (int i = 0; i < kMoments; ++i) r.moment[i] = x.moment[i] + y.moment[i];
  return r;
}

DEVICE float quad_sum(float x) {
  x += simt::shfl_xor(x, 1);
  return x + simt::shfl_xor(x, 2);
}
DEVICE float quad_max(float x) {
  x = fmaxf(x, simt::shfl_xor(x, 1));
  return fmaxf(x, simt::shfl_xor(x, 2));
}

// Of the eight columns of the thread's row r and its quad's.
template <class T>
DEVICE PairSums pair_sums(PairTiles<T>& tiles, int r, Kind kind, bool moments) {
  PairSums sums{-kInfinity, 0.0f, -kInfinity, 0.0f, 0.0f, {}};
  UNROLL
  for (int i = 0; i < 8; ++i) {
    sums.max = fmaxf(sums.max, tiles.student.at(r, i));
    sums.teacher_max = fmaxf(sums.teacher_max, tiles.teacher.at(r, i));
  }
  sums.max = quad_max(sums.max);
  sums.teacher_max = quad_max(sums.teacher_max);
  const float base = base_of(sums.max), teacher_base = base_of(sums.teacher_max);
  UNROLL
  for (int i = 0; i < 8; ++i) {
    const float s = tiles.student.at(r, i) - base, t = tiles.teacher.at(r, i) - teacher_base;
    const float es = exp_of(s), et = exp_of(t);
    sums.sum += es;
    sums.teacher_sum += et;
    if (kind == Kind::kForwardKl) {
      if (et > 0.0f) sums.cross += et * (t - s);
      if (!moments) continue;
      sums.moment[0] += es * es;
      sums.moment[1] += es * et;
      sums.moment[2] += et * et;
    } else if (kind == Kind::kReverseKl && es > 0.0f) {
      const float x = s - t, e = es * x;
      sums.cross += e;
      if (!moments) continue;
      sums.moment[0] += e * x;
      sums.moment[1] += es * es;
      sums.moment[2] += es * e;
      sums.moment[3] += e * e;
    }
  }
  sums.sum = quad_sum(sums.sum);
  sums.teacher_sum = quad_sum(sums.teacher_sum);
  if (!needs_lse(kind)) sums.cross = quad_sum(sums.cross);
  UNROLL
  for (int i = 0; i < kMoments; ++i) {
    if (moments) sums.moment[i] = quad_sum(sums.moment[i]);
  }
  return sums;
}

// The lane that holds the logits of a row's label writes them and takes them out.
template <class T>
DEVICE void move_pair_targets(PairTiles<T>& tiles, const SharedPair<T>& s, int64_t first_column,
                              float* target, float* teacher_target) {
  UNROLL
  for (int r = 0; r < 8; ++r) {
    const int row = mma::Tile<T>::row(r);
    UNROLL
    for (int i = 0; i < 8; ++i) {
      if (s.student.label[row] != first_column + mma::Tile<T>::column(i)) continue;
      target[row] = tiles.student.at(r, i);
      teacher_target[row] = tiles.teacher.at(r, i);
      tiles.student.at(r, i) = tiles.teacher.at(r, i) = -kInfinity;
    }
  }
}

// A block per 128 rows and a tile; f(tiles, s, first_row, first_column) for both halves of it.
template <class T, class F>
DEVICE void each_half(const PairParams& p, const Raster& at, const SharedPair<T>& s, int64_t count,
                      F f) {
  const int64_t first_row = int64_t{at.row_block} * kBlockRows;
  name_rows(s.student, p.rows, nullptr, first_row, count);
  PairTiles<T> tiles;
  NO_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int64_t first_column = int64_t{at.tile} * kTile + half * kHalf;
    s.name_columns(p.heads, first_column);
    simt::sync_block();
    tiles.multiply(s, p.heads, first_column);
    f(tiles, first_column);
  }
}

// First sweep.
template <class T>
KERNEL_BOUNDS(mma::kThreads, 1)
void pair_sums_kernel(PairParams p) {
  const Raster at = raster<kRasterRows>(simt::block_idx(), p.row_blocks, p.tiles);
  const int64_t first_row = int64_t{at.row_block} * kBlockRows;
  const int count = *p.rows.count, t = simt::thread_idx();
  if (first_row >= count) return;
  const Kind kind = p.heads.kind;
  const bool moments = p.out.moment[0] && !needs_lse(kind);
  const SharedPair<T> s;
  PairSums* s_parts = simt::shared<PairSums>();  // [128, 4] while the stages are free
  PairSums sums{-kInfinity, 0.0f, -kInfinity, 0.0f, 0.0f, {}};
  each_half(p, at, s, count, [&](PairTiles<T>& tiles, int64_t first_column) {
    move_pair_targets(tiles, s, first_column, p.target + first_row, p.teacher_target + first_row);
    UNROLL
    for (int r = 0; r < 8; ++r) {
      const PairSums part = pair_sums(tiles, r, kind, moments);
      if (simt::lane_idx() % 4 == 0)
        s_parts[mma::Tile<T>::row(r) * 4 + simt::warp_idx() % 4] = part;
    }
    simt::sync_block();
    if (t < kBlockRows) {
      for (int i = 0; i < 4; ++i) sums = merge(kind, sums, s_parts[t * 4 + i]);
    }
    simt::sync_block();  // before the stages and the columns are written again
  });
  if (t >= kBlockRows || first_row + t >= count) return;
  const int64_t to = at.tile * p.heads.student.N + first_row + t;
  p.out.max[to] = sums.max;
  p.out.sum[to] = sums.sum;
  p.out.teacher_max[to] = sums.teacher_max;
  p.out.teacher_sum[to] = sums.teacher_sum;
  if (p.out.cross) p.out.cross[to] = sums.cross;
  UNROLL
  for (int i = 0; i < kMoments; ++i) {
    if (moments) p.out.moment[i][to] = sums.moment[i];
  }
}

// h of the kinds that have one, 0 where q is; and, of those that ask for lse, a column's share of the divergence.
struct Score {
  float h, value;
};
DEVICE Score score(Kind kind, float beta, float log_q, float log_p, float q, float p) {
  if (kind == Kind::kReverseKl) return {q > 0.0f ? log_q - log_p : 0.0f, 0.0f};
  if (kind == Kind::kTvd) {
    const float d = q - p;
    return {d > 0.0f ? 0.5f : d < 0.0f ? -0.5f : d, 0.5f * fabsf(d)};
  }
  // log(m / q) and log(m / p) from the larger of the two
  const float distance = log_p - log_q, r = exp_of(-fabsf(distance)), rest = 1.0f - beta;
  const bool above = distance > 0.0f;
  const float m = logf(above ? beta + rest * r : beta * r + rest);
  const float over_q = above ? m + distance : m, over_p = above ? m : m - distance;
  const float h = q > 0.0f ? -rest * over_q : 0.0f;
  return {h, q * h - (p > 0.0f ? beta * p * over_p : 0.0f)};
}

struct MeanSums {
  float value, mean, moment[kMoments];
};

// Second sweep, of JSD and TVD.
template <class T>
KERNEL_BOUNDS(mma::kThreads, 1)
void pair_means_kernel(PairParams p) {
  const Raster at = raster<kRasterRows>(simt::block_idx(), p.row_blocks, p.tiles);
  const int64_t first_row = int64_t{at.row_block} * kBlockRows;
  const int count = *p.rows.count, t = simt::thread_idx();
  if (first_row >= count) return;
  const Kind kind = p.heads.kind;
  const SharedPair<T> s;
  PairLogs* s_logs = simt::shared<PairLogs>(kHeadSharedBytes<T>);
  MeanSums* s_parts = simt::shared<MeanSums>();
  MeanSums sums{};
  if (t < kBlockRows && first_row + t < count) {
    const int row = p.rows.row[first_row + t];
    s_logs[t] = {p.row.lse[row], p.row.lse_low[row], p.row.teacher_lse[row],
                 p.row.teacher_low[row]};
  } else if (t < kBlockRows) {
    s_logs[t] = {};
  }
  each_half(p, at, s, count, [&](PairTiles<T>& tiles, int64_t) {
    UNROLL
    for (int r = 0; r < 8; ++r) {
      const int row = mma::Tile<T>::row(r);
      const PairLogs logs = s_logs[row];
      MeanSums part{};
      UNROLL
      for (int i = 0; i < 8; ++i) {
        const float log_q = logs.q(tiles.student.at(r, i)), log_p = logs.p(tiles.teacher.at(r, i));
        const float q = exp_of(log_q), prob = exp_of(log_p);
        const Score x = score(kind, p.heads.beta, log_q, log_p, q, prob);
        const float qh = q * x.h;
        part.value += x.value;
        part.mean += qh;
        part.moment[0] += qh * x.h;
        part.moment[1] += q * q;
        part.moment[2] += q * qh;
        part.moment[3] += qh * qh;
      }
      part.value = quad_sum(part.value);
      part.mean = quad_sum(part.mean);
      UNROLL
      for (int i = 0; i < kMoments; ++i) part.moment[i] = quad_sum(part.moment[i]);
      if (simt::lane_idx() % 4 == 0) s_parts[row * 4 + simt::warp_idx() % 4] = part;
    }
    simt::sync_block();
    if (t < kBlockRows) {
      for (int i = 0; i < 4; ++i) {
        const MeanSums& part = s_parts[t * 4 + i];
        sums.value += part.value;
        sums.mean += part.mean;
        UNROLL
        for (int k = 0; k < kMoments; ++k) sums.moment[k] += part.moment[k];
      }
    }
    simt::sync_block();
  });
  if (t >= kBlockRows || first_row + t >= count) return;
  const int64_t to = at.tile * p.heads.student.N + first_row + t;
  p.out.value[to] = sums.value;
  p.out.mean[to] = sums.mean;
  UNROLL
  for (int i = 0; i < kMoments; ++i) {
    if (p.out.moment[i]) p.out.moment[i][to] = sums.moment[i];
  }
}

struct PairGradientParams {
  PlanParams planning;  // its rows' q is the upstream gradient of the divergence
  TwoHeads heads;
  const PairLogs* logs;  // [N], compact
};

template <class T>
constexpr int kPairSharedBytes =
    kHeadSharedBytes<T> + kBlockRows * static_cast<int>(sizeof(Coefficients) + sizeof(PairLogs));

// As strip_gradient_kernel, of both heads.
template <class T>
KERNEL_BOUNDS(mma::kThreads, 1)
void pair_gradient_kernel(PairGradientParams p) {
  const Plan& plan = p.planning.plan;
  const int chunk = p.planning.chunk, t = simt::thread_idx();
  const Kind kind = p.heads.kind;
  const LogitMap& map = p.heads.student.map;
  const SharedPair<T> s;
  Coefficients* s_row = simt::shared<Coefficients>(kHeadSharedBytes<T>);
  PairLogs* s_logs =
      simt::shared<PairLogs>(kHeadSharedBytes<T> + kBlockRows * sizeof(Coefficients));
  const int halves = 2 * plan.tasks(chunk);
  PairTiles<T> tiles;
  NO_UNROLL
  for (int unit = simt::block_idx(); unit < halves; unit += simt::grid_dim()) {
    const int index = tile_of_task(plan, chunk, unit / 2);
    const int begin = plan.first_slot(chunk, index), count = plan.count[index];
    const int first = first_of_task(plan, chunk, index, unit / 2);
    const int64_t first_column = int64_t{index} * kTile + unit % 2 * kHalf;
    name_rows(s.student, plan.rows, plan.list + begin, first, count);
    s.name_columns(p.heads, first_column);
    if (t < kBlockRows && first + t < count) {
      const int slot = begin + first + t, row = plan.list[slot];
      Coefficients c = plan.row[row];
      c.a *= plan.list_weight[slot];
      c.q *= plan.list_weight[slot];
      s_row[t] = c;
      s_logs[t] = p.logs[row];
    }
    simt::sync_block();
    tiles.multiply(s, p.heads, first_column);
    const float unscale = map.scale / plan.unit[0];
    T* strips = static_cast<T*>(plan.strips) + int64_t{begin + first} * kTile + unit % 2 * kHalf;
    UNROLL
    for (int r = 0; r < 8; ++r) {
      const int row = mma::Tile<T>::row(r);
      if (first + row >= count) continue;
      const Coefficients c = s_row[row];
      const PairLogs logs = s_logs[row];
      UNROLL
      for (int i = 0; i < 8; ++i) {
        const int column = mma::Tile<T>::column(i);
        float& x = tiles.student.at(r, i);
        const float log_q = logs.q(x), log_p = logs.p(tiles.teacher.at(r, i));
        const float q = exp_of(log_q), prob = exp_of(log_p);
        const float of_divergence =
            kind == Kind::kForwardKl
                ? q - prob
                : q * (score(kind, p.heads.beta, log_q, log_p, q, prob).h - c.mean);
        const bool at_label = s.student.label[row] == first_column + column;
        const float g = c.q * of_divergence + (at_label ? c.at_label : q * c.a);
        x = x == -kInfinity ? 0.0f : g * slope_at(map, x) * unscale;
      }
      UNROLL
      for (int j = 0; j < 4; ++j) {
        store_pair(strips + row * kTile + mma::Tile<T>::column(2 * j), tiles.student.at(r, 2 * j),
                   tiles.student.at(r, 2 * j + 1));
      }
    }
    simt::sync_block();  // before the names are written again
  }
}

}  // namespace gemma_ext::cce::cuda
