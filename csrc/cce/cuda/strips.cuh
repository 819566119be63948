// SPDX-License-Identifier: Apache-2.0
// Gradient strips: the kept logits of a chunk once more, turned into scale G / unit in registers.
//   G[n, v] = (w p (a + q (s - mean)) + class_coef w_v - b 1{v = label}) ds/da,  p = exp(s - lse),
// with w the weight of the strip's draw
#pragma once

#include "plan.cuh"

namespace gemma_ext::cce::cuda {

// The tile of a task of the chunk: the last whose first task is not beyond it and that has any.
DEVICE int tile_of_task(const Plan& plan, int chunk, int task) {
  task += plan.chunk_task[chunk];
  int low = plan.chunk_tile[chunk], high = plan.chunk_tile[chunk + 1] - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (plan.task[middle] <= task) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

DEVICE int first_of_task(const Plan& plan, int chunk, int tile, int task) {
  return (plan.chunk_task[chunk] + task - plan.task[tile]) * kBlockRows;
}

template <class T>
constexpr int kStripSharedBytes = kHeadSharedBytes<T> + kBlockRows * sizeof(Coefficients);

template <class T>
KERNEL_BOUNDS(mma::kThreads, kMmaBlocks<T>)
void strip_gradient_kernel(PlanParams p) {
  const Plan& plan = p.plan;
  const LogitMap& map = p.head.map;
  const SharedHead<T> s;
  Coefficients* s_row = simt::shared<Coefficients>(kHeadSharedBytes<T>);
  const int halves = 2 * plan.tasks(p.chunk);
  mma::Tile<T> tile;
  NO_UNROLL
  for (int unit = simt::block_idx(); unit < halves; unit += simt::grid_dim()) {
    const int index = tile_of_task(plan, p.chunk, unit / 2);
    const int begin = plan.first_slot(p.chunk, index), count = plan.count[index];
    const int first = first_of_task(plan, p.chunk, index, unit / 2);
    const int64_t first_column = int64_t{index} * kTile + unit % 2 * kHalf;
    const int t = simt::thread_idx();
    name_rows(s, plan.rows, plan.list + begin, first, count);
    name_columns(s, p.head, first_column);
    if (t < kBlockRows && first + t < count) {
      const int slot = begin + first + t;
      Coefficients c = plan.row[plan.list[slot]];
      c.a *= plan.list_weight[slot];
      c.q *= plan.list_weight[slot];
      s_row[t] = c;
    }
    simt::sync_block();
    head_logits(tile, s, p.head, first_column);
    const float unscale = map.scale / plan.unit[0];
    T* strips = static_cast<T*>(plan.strips) + int64_t{begin + first} * kTile + unit % 2 * kHalf;
    UNROLL
    for (int r = 0; r < 8; ++r) {
      const int row = mma::Tile<T>::row(r);
      if (first + row >= count) continue;
      const Coefficients c = s_row[row];
      UNROLL
      for (int i = 0; i < 8; ++i) {
        const int column = mma::Tile<T>::column(i);
        float& x = tile.at(r, i);
        const float prob = exp_of((x - c.lse) - c.lse_low);
        float g = s.label[row] == first_column + column ? c.at_label : prob * c.a;
        if (c.q != 0.0f) g += prob * (x - c.mean) * c.q;
        if (c.class_coef != 0.0f) g += s.weight[column] * c.class_coef;
        x = x == -kInfinity ? 0.0f : g * slope_at(map, x) * unscale;
      }
      UNROLL
      for (int j = 0; j < 4; ++j) {
        store_pair(strips + row * kTile + mma::Tile<T>::column(2 * j), tile.at(r, 2 * j),
                   tile.at(r, 2 * j + 1));
      }
    }
    simt::sync_block();  // before the names are written again
  }
}

// Sums of the columns of a tile's strips, a block per 32 of them; warp 0 gets them, a column per lane.
constexpr int kSumColumns = simt::kWarpSize, kSumParts = kTile / kSumColumns, kSumWarps = 8;
constexpr int kSumThreads = kSumWarps * simt::kWarpSize;
constexpr int kSumSharedBytes = kSumThreads * sizeof(float);

template <class T>
DEVICE float column_sum(const T* strips, int count) {
  float* s_sum = simt::shared<float>();
  const int warp = simt::warp_idx(), lane = simt::lane_idx();
  const T* column = strips + simt::block_idx() % kSumParts * kSumColumns + lane;
  float sum = 0.0f;
  for (int k = warp; k < count; k += kSumWarps) sum += widen(column[int64_t{k} * kTile]);
  s_sum[simt::thread_idx()] = sum;
  simt::sync_block();
  for (int w = 1; w < kSumWarps && warp == 0; ++w) sum += s_sum[w * simt::kWarpSize + lane];
  return sum;
}

}  // namespace gemma_ext::cce::cuda
