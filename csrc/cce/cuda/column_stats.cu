// SPDX-License-Identifier: Apache-2.0
// Over a sample of rows, per column: how often p >= eps, and the sum of p; p = exp(s - lse).
#include "head.cuh"

namespace gemma_ext::cce::cuda {
namespace {

struct ColumnParams {
  ColumnStats stats;
  Rows rows;
};

struct ColumnSums {
  float hits[8][32], mass[8][32];  // [warp][its columns]
};

template <class T>
constexpr int kColumnSharedBytes =
    kHeadSharedBytes<T> + kBlockRows * sizeof(float) + sizeof(ColumnSums);

// A block per half tile; every step-th valid row.
template <class T>
KERNEL_BOUNDS(mma::kThreads, kMmaBlocks<T>)
void column_stats_kernel(ColumnParams p) {
  const ColumnStats& stats = p.stats;
  const Head& h = stats.head;
  const SharedHead<T> s;
  float* s_lse = simt::shared<float>(kHeadSharedBytes<T>);
  ColumnSums& s_sums =
      *simt::shared<ColumnSums>(kHeadSharedBytes<T> + kBlockRows * static_cast<int>(sizeof(float)));
  const int64_t first_column = int64_t{simt::block_idx()} * kHalf;
  const int count = *p.rows.count, t = simt::thread_idx();
  const int64_t step = count > stats.max_rows ? (count + stats.max_rows - 1) / stats.max_rows : 1;
  const int64_t sampled = (count + step - 1) / step;
  name_columns(s, h, first_column);
  float hits[8] = {}, mass[8] = {};
  mma::Tile<T> tile;
  NO_UNROLL
  for (int64_t first = 0; first < sampled; first += kBlockRows) {
    if (t < kBlockRows) {
      const int row = first + t < sampled ? p.rows.row[(first + t) * step] : -1;
      s.row[t] = row;
      s_lse[t] = row >= 0 ? stats.lse[row] : kInfinity;  // p = 0
    }
    simt::sync_block();
    head_logits(tile, s, h, first_column);
    UNROLL
    for (int r = 0; r < 8; ++r) {
      const float lse = s_lse[mma::Tile<T>::row_of(r / 2, r % 2)];
      UNROLL
      for (int i = 0; i < 8; ++i) {
        const float prob = exp_of(tile.acc[r / 2][i / 2][r % 2 * 2 + i % 2] - lse);
        mass[i] += prob;
        hits[i] += prob >= stats.eps && lse < kInfinity ? 1.0f : 0.0f;
      }
    }
    simt::sync_block();
  }
  UNROLL
  for (int i = 0; i < 8; ++i) {
    UNROLL
    for (int lane_bit = 4; lane_bit < simt::kWarpSize; lane_bit *= 2) {
      hits[i] += simt::shfl_xor(hits[i], lane_bit);
      mass[i] += simt::shfl_xor(mass[i], lane_bit);
    }
    if (simt::lane_idx() < 4) {
      const int column = i / 2 * 8 + simt::lane_idx() * 2 + i % 2;
      s_sums.hits[simt::warp_idx()][column] = hits[i];
      s_sums.mass[simt::warp_idx()][column] = mass[i];
    }
  }
  simt::sync_block();
  if (t >= kHalf || s.column[t] < 0) return;
  const int warp = t / 32, column = t % 32;
  stats.count[s.column[t]] = s_sums.hits[warp][column] + s_sums.hits[warp + 4][column];
  stats.prob[s.column[t]] = s_sums.mass[warp][column] + s_sums.mass[warp + 4][column];
}

}  // namespace

int64_t workspace(const ColumnStats& c, const Memory&) {
  Arena arena(nullptr);
  Rows rows(arena, c.head);
  return arena.bytes();
}

Status run(const ColumnStats& c, const Memory& memory, Stream stream) {
  Arena arena(memory.workspace);
  const Rows rows(arena, c.head);
  Launches launches(stream);
  gather_rows(launches, c.head, rows);
  by_dtype(c.head.dtype, [&](auto type) {
    using T = decltype(type);
    launches.add(column_stats_kernel<T>, 2 * tiles_of(c.head.V), mma::kThreads,
                 kColumnSharedBytes<T>, {c, rows});
  });
  return launches.status();
}

}  // namespace gemma_ext::cce::cuda
