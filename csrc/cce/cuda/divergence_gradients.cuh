// SPDX-License-Identifier: Apache-2.0
// Gradient strips of a divergence: the kept logits of both heads once more, turned into scale G / unit.
#pragma once

#include "divergence.cuh"
#include "strips.cuh"

namespace gemma_ext::cce::cuda {

struct PairCoefficientParams {
  Rows rows;
  Coefficients* row;
  PairLogs* logs;
  DivergenceRows from;
  const float *d_divergence, *d_nll, *d_lse;
};

// Before unit_kernel. The filter's q is the upstream gradient of the divergence.
KERNEL void pair_coefficients_kernel(PairCoefficientParams p) {
  const int64_t r = int64_t{simt::block_idx()} * kPlanThreads + simt::thread_idx();
  if (r >= *p.rows.count) return;
  const int from = p.rows.row[r];
  const float b = p.d_nll[from];
  Coefficients c{};
  c.lse = p.from.lse[from];
  c.lse_low = p.from.lse_low[from];
  c.a = b + p.d_lse[from];
  c.q = p.d_divergence[from];
  c.mean = p.from.mean[from];
  // of p near 1, p - 1 would lose what nll still knows
  c.at_label = c.a * expm1f(-p.from.nll[from]) + (c.a - b);
  c.scale = fmaxf(fabsf(c.a), fabsf(b)) + fabsf(c.q) * p.from.size[from];
  if (isnan(c.scale) || isnan(b)) c.scale = kInfinity;
  p.row[r] = c;
  p.logs[r] = {c.lse, c.lse_low, p.from.teacher_lse[from], p.from.teacher_low[from]};
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
