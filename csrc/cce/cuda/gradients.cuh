// SPDX-License-Identifier: Apache-2.0
// From gradient strips to gradients, each written by one block in one order:
//   dC_v = sum_n G_nv e_n + q_v sum_n W_nj e_n,   dE_n = sum_v G_nv c_v + sum_j W_nj mean_j
// with W the masses of dropped strips, q the profile of a tile, mean_j = sum_v q_v c_v.
#pragma once

#include "strips.cuh"

namespace gemma_ext::cce::cuda {

struct GradientParams {
  Head head;
  Plan plan;
  const double* summary;
  const float* prob;  // [V] or null
  float* profile;     // [tiles, kTile]
  void* mean;         // [tiles, D] in the head's dtype, rows of whole 16-byte words
  float* push;        // [tiles, D]
  float* de_sum;      // [N, D], compact rows
  Gradients out;
  bool exact_elsewhere;
  int column_blocks;  // of 128 columns of D
  int chunk;
};

struct SliceParams {
  Head head;
  Plan plan;
  float* de_sum;
  int chunk, slice;
};

// A block per tile; its share of each column, uniform without a profile.
KERNEL void profile_kernel(GradientParams p) {
  if (eps_of(p.summary) == 0) return;
  float* s_weight = simt::shared<float>();
  const int t = simt::thread_idx();
  const int64_t first = int64_t{simt::block_idx()} * kTile;
  const int valid = static_cast<int>(p.head.V - first < kTile ? p.head.V - first : kTile);
  s_weight[t] = p.prob && t < valid ? p.prob[column_id(p.head, first + t)] : 0.0f;
  simt::sync_block();
  double total = 0;
  for (int i = 0; i < kTile; ++i) total += s_weight[i];
  const float uniform = 1.0f / static_cast<float>(valid);
  p.profile[first + t] = t >= valid  ? 0.0f
                         : total > 0 ? static_cast<float>(s_weight[t] / total)
                                     : uniform;
}

// A block per tile.
template <class T>
KERNEL void tile_mean_kernel(GradientParams p) {
  if (eps_of(p.summary) == 0) return;
  const int64_t tile = simt::block_idx(), first = tile * kTile;
  const int valid = static_cast<int>(p.head.V - first < kTile ? p.head.V - first : kTile);
  T* mean = static_cast<T*>(p.mean) + tile * p.head.D;
  for (int64_t d = 2 * simt::thread_idx(); d < p.head.D; d += 2 * kPlanThreads) {
    float x = 0.0f, y = 0.0f;
    for (int v = 0; v < valid; ++v) {
      const T* c =
          static_cast<const T*>(p.head.c) + int64_t{column_id(p.head, first + v)} * p.head.c_stride;
      const float share = p.profile[first + v];
      x += share * widen(c[d]);
      y += share * widen(c[d + 1]);
    }
    store_pair(mean + d, x, y);
  }
}

// push[tile, d] = sum_n mass[tile, n] e[n, d]; a block per 128 tiles and 128 columns.
template <class T>
KERNEL_BOUNDS(mma::kThreads, kMmaBlocks<T>)
void push_kernel(GradientParams p) {
  if (eps_of(p.summary) == 0) return;
  const Plan& plan = p.plan;
  const int64_t tile0 = simt::block_idx() / p.column_blocks * mma::kSide;
  const int64_t d0 = simt::block_idx() % p.column_blocks * mma::kSide;
  const int64_t D = p.head.D, stride = plan.mass_stride;
  const int count = *plan.rows.count;
  const T *mass = static_cast<const T*>(plan.mass), *e = static_cast<const T*>(p.head.e);
  mma::Tile<T> tile;
  tile.clear();
  tile.template multiply<simt::Major::kK, simt::Major::kMn>(
      count,
      [&](int line, int k) {
        return tile0 + line < plan.tiles && k < stride ? mass + (tile0 + line) * stride + k
                                                       : nullptr;
      },
      [&](int at, int k) {
        return k < count && d0 + at < D ? e + int64_t{plan.rows.row[k]} * p.head.e_stride + d0 + at
                                        : nullptr;
      },
      simt::shared<T>());
  tile.each([&](int row, int column, float x) {
    if (tile0 + row < plan.tiles && d0 + column < D) {
      p.push[(tile0 + row) * D + d0 + column] = x;
    }
  });
}

// A unit is a half tile of the chunk and 128 columns of D.
template <class T>
KERNEL_BOUNDS(mma::kThreads, kMmaBlocks<T>)
void dc_kernel(GradientParams p) {
  const Plan& plan = p.plan;
  const int first_tile = plan.chunk_tile[p.chunk];
  const int units = (plan.chunk_tile[p.chunk + 1] - first_tile) * 2 * p.column_blocks;
  NO_UNROLL
  for (int unit = simt::block_idx(); unit < units; unit += simt::grid_dim()) {
    const int half = unit / p.column_blocks % 2;
    const int64_t index = first_tile + unit / p.column_blocks / 2;
    const int64_t first_column = index * kTile + half * kHalf;
    const int64_t d0 = unit % p.column_blocks * mma::kSide, D = p.head.D;
    const int64_t begin = plan.begin[index];
    const int count = plan.count[index];
    const T* strips = static_cast<const T*>(p.plan.strips) + begin * kTile + half * kHalf;
    const T* e = static_cast<const T*>(p.head.e);
    const int* list_row = plan.list_row + begin;
    mma::Tile<T> tile;
    tile.clear();
    tile.template multiply<simt::Major::kMn, simt::Major::kMn>(
        count,
        [&](int at, int k) { return k < count ? strips + int64_t{k} * kTile + at : nullptr; },
        [&](int at, int k) {
          return k < count && d0 + at < D ? e + int64_t{list_row[k]} * p.head.e_stride + d0 + at
                                          : nullptr;
        },
        simt::shared<T>());
    const bool pushed = eps_of(p.summary) != 0;
    const float size = plan.unit[0];
    UNROLL
    for (int r = 0; r < 8; ++r) {
      const int64_t position = first_column + mma::Tile<T>::row_of(r / 2, r % 2);
      if (position >= p.head.V) continue;
      T* to = static_cast<T*>(p.out.dc) + int64_t{column_id(p.head, position)} * D;
      const float share = pushed ? p.profile[position] : 0.0f;
      UNROLL
      for (int j = 0; j < 4; ++j) {
        const int64_t d = d0 + mma::Tile<T>::column_of(j, 0);
        if (d >= D) continue;
        float x = tile.acc[r / 2][j][r % 2 * 2], y = tile.acc[r / 2][j][r % 2 * 2 + 1];
        if (pushed) {
          x += share * p.push[index * D + d];
          y += share * p.push[index * D + d + 1];
        }
        store_pair(to + d, x * size, y * size);
      }
    }
  }
}

// kSumParts blocks per tile of the chunk.
template <class T>
KERNEL void dbias_kernel(GradientParams p) {
  const Plan& plan = p.plan;
  const int64_t index = plan.chunk_tile[p.chunk] + simt::block_idx() / kSumParts;
  if (index >= plan.chunk_tile[p.chunk + 1]) return;
  float sum = column_sum(static_cast<const T*>(plan.strips) + int64_t{plan.begin[index]} * kTile,
                         plan.count[index]);
  const int64_t position =
      index * kTile + simt::block_idx() % kSumParts * kSumColumns + simt::lane_idx();
  if (simt::warp_idx() > 0 || position >= p.head.V) return;
  if (eps_of(p.summary) != 0) sum += p.profile[position] * plan.bias_push[index];
  p.out.dbias[column_id(p.head, position)] = sum * plan.unit[0] / p.head.map.scale;
}

// Of each block of 128 rows, the tiles of the chunk of which one of them kept a strip; a block per block.
KERNEL void block_tiles_kernel(GradientParams p) {
  const Plan& plan = p.plan;
  const int64_t block = simt::block_idx();
  const int tile0 = plan.chunk_tile[p.chunk], tile1 = plan.chunk_tile[p.chunk + 1];
  if (*plan.sparse) return;
  int total = 0;
  for (int first = tile0; first < tile1; first += kPlanThreads) {
    const int64_t tile = first + simt::thread_idx();
    BlockTile found{static_cast<int>(tile), {}, {}};
    UNROLL
    for (int w = 0; w < kBlockWords; ++w) {
      const int64_t word = block * kBlockWords + w, at = tile * plan.words + word;
      if (tile >= tile1 || word >= plan.words) continue;
      found.keep[w] = plan.keep[at];
      found.slot[w] = plan.begin[tile] + plan.before[at] - 1;
    }
    uint32_t any = 0;
    UNROLL
    for (int w = 0; w < kBlockWords; ++w) any |= found.keep[w];
    const int before = total;
    const int rank = block_rank<kPlanThreads>(any != 0, simt::shared<int>(), total);
    if (any) plan.block_tiles[block * plan.tiles + before + rank] = found;
  }
  if (simt::thread_idx() == 0) plan.block_tile_count[block] = total;
}

// de_sum += G C over the tiles of the chunk; a block per 128 rows and 128 columns of D.
template <class T>
KERNEL_BOUNDS(mma::kThreads, kMmaBlocks<T>)
void de_kernel(GradientParams p) {
  const Plan& plan = p.plan;
  const int64_t block = simt::block_idx() / p.column_blocks, first_row = block * kBlockRows;
  const int d0 = simt::block_idx() % p.column_blocks * mma::kSide, D = static_cast<int>(p.head.D);
  const bool empty = plan.chunk_tile[p.chunk] == plan.chunk_tile[p.chunk + 1];
  if (first_row >= *plan.rows.count || *plan.sparse || (p.chunk > 0 && empty)) return;
  const BlockTile* tiles = plan.block_tiles + block * plan.tiles;
  const T *strips = static_cast<const T*>(plan.strips), *c = static_cast<const T*>(p.head.c);
  mma::Tile<T> tile;
  tile.clear();
  tile.template multiply<simt::Major::kK, simt::Major::kMn>(
      plan.block_tile_count[block] * kTile,
      [&](int line, int k) {
        const BlockTile& at = tiles[k / kTile];
        // the row's own bit becomes the sign, rows after it fall out
        const uint32_t bits = at.keep[line / kWordRows] << (31 - line % kWordRows);
        const int slot = at.slot[line / kWordRows] + simt::popcount(bits);
        return bits >> 31 ? strips + int64_t{slot} * kTile + k % kTile : nullptr;
      },
      [&](int at, int k) {
        const int position = tiles[k / kTile].tile * kTile + k % kTile;
        if (position >= p.head.V || d0 + at >= D) return static_cast<const T*>(nullptr);
        return c + int64_t{column_id(p.head, position)} * p.head.c_stride + d0 + at;
      },
      simt::shared<T>());
  tile.each([&](int row, int column, float x) {
    if (first_row + row >= *plan.rows.count || d0 + column >= D) return;
    float& sum = p.de_sum[(first_row + row) * p.head.D + d0 + column];
    sum = p.chunk == 0 ? x : sum + x;
  });
}

// parts[slot] = G[slot] C, columns `slice` of D, of the chunk's strips; units as in strip_gradient_kernel.
template <class T>
KERNEL_BOUNDS(mma::kThreads, kMmaBlocks<T>)
void parts_kernel(SliceParams p) {
  const Plan& plan = p.plan;
  if (!*plan.sparse) return;
  const T *strips = static_cast<const T*>(plan.strips), *c = static_cast<const T*>(p.head.c);
  const int D = static_cast<int>(p.head.D), halves = 2 * plan.chunk_tasks[p.chunk];
  mma::Tile<T> tile;
  NO_UNROLL
  for (int unit = simt::block_idx(); unit < halves; unit += simt::grid_dim()) {
    const int half = unit % 2 * mma::kSide, d0 = p.slice * kSlice + half;
    if (d0 >= D) continue;
    const int index = tile_of_task(plan, p.chunk, unit / 2);
    const int first = (unit / 2 - plan.task[index]) * kBlockRows;
    const int left = plan.count[index] - first;  // strips from here on
    const int64_t slot = plan.begin[index] + first;
    tile.clear();
    tile.template multiply<simt::Major::kK, simt::Major::kMn>(
        kTile,
        [&](int line, int k) { return line < left ? strips + (slot + line) * kTile + k : nullptr; },
        [&](int at, int k) {
          const int64_t position = int64_t{index} * kTile + k;
          if (position >= p.head.V || d0 + at >= D) return static_cast<const T*>(nullptr);
          return c + int64_t{column_id(p.head, position)} * p.head.c_stride + d0 + at;
        },
        simt::shared<T>());
    UNROLL
    for (int r = 0; r < 8; ++r) {
      const int row = mma::Tile<T>::row_of(r / 2, r % 2);
      if (row >= left) continue;
      UNROLL
      for (int j = 0; j < 4; ++j) {
        store_pair(plan.parts + (slot + row) * kSlice + half + mma::Tile<T>::column_of(j, 0),
                   tile.acc[r / 2][j][r % 2 * 2], tile.acc[r / 2][j][r % 2 * 2 + 1]);
      }
    }
  }
}

struct RowSlots {
  int slot[kPlanThreads];
  int counts[kPlanThreads / simt::kWarpSize];
};

// de_sum[row, slice] += its parts, in order of the tiles; a block per row, a thread per column.
KERNEL void add_parts_kernel(SliceParams p) {
  static_assert(kPlanThreads == kSlice);
  const Plan& plan = p.plan;
  RowSlots& s = *simt::shared<RowSlots>();
  const int t = simt::thread_idx(), row = simt::block_idx();
  const int tile0 = plan.chunk_tile[p.chunk], tile1 = plan.chunk_tile[p.chunk + 1];
  if (!*plan.sparse || row >= *plan.rows.count || (p.chunk > 0 && tile0 == tile1)) return;
  float sum = 0.0f;
  for (int first = tile0; first < tile1; first += kPlanThreads) {
    const int64_t tile = first + t, word = tile * plan.words + row / kWordRows;
    const uint32_t bits = tile < tile1 ? plan.keep[word] << (31 - row % kWordRows) : 0;
    int kept = 0;
    const int at = block_rank<kPlanThreads>(bits >> 31, s.counts, kept);
    if (bits >> 31) {
      s.slot[at] = plan.begin[tile] + plan.before[word] + simt::popcount(bits) - 1;
    }
    simt::sync_block();
    UNROLL
    for (int i = 0; i < kept; ++i) sum += plan.parts[int64_t{s.slot[i]} * kSlice + t];
    simt::sync_block();
  }
  const int64_t d = p.slice * kSlice + t;
  if (d >= p.head.D) return;
  float& to = p.de_sum[row * p.head.D + d];
  to = p.chunk == 0 ? sum : to + sum;
}

struct ClearParams {
  void* to;
  int64_t count;  // even
};

// Rows of dE that are not valid stay zero.
template <class T>
KERNEL void clear_kernel(ClearParams p) {
  const int64_t i = 2 * (int64_t{simt::block_idx()} * kPlanThreads + simt::thread_idx());
  if (i < p.count) store_pair(static_cast<T*>(p.to) + i, 0.0f, 0.0f);
}

// dE = de_sum + mass^T mean, rounded once, to the rows it belongs to.
template <class T>
KERNEL_BOUNDS(mma::kThreads, kMmaBlocks<T>)
void finish_de_kernel(GradientParams p) {
  const Plan& plan = p.plan;
  const int64_t first_row = int64_t{simt::block_idx() / p.column_blocks} * kBlockRows;
  const int64_t d0 = simt::block_idx() % p.column_blocks * mma::kSide, D = p.head.D;
  const int count = *plan.rows.count;
  if (first_row >= count || (p.exact_elsewhere && eps_of(p.summary) == 0)) return;
  const T *mass = static_cast<const T*>(plan.mass), *mean = static_cast<const T*>(p.mean);
  mma::Tile<T> tile;
  tile.clear();
  if (eps_of(p.summary) != 0) {
    tile.template multiply<simt::Major::kMn, simt::Major::kMn>(
        plan.tiles,
        [&](int at, int k) {
          return k < plan.tiles && first_row + at < plan.mass_stride
                     ? mass + k * plan.mass_stride + first_row + at
                     : nullptr;
        },
        [&](int at, int k) {
          return k < plan.tiles && d0 + at < D ? mean + k * D + d0 + at : nullptr;
        },
        simt::shared<T>());
  }
  const float unit = plan.unit[0];
  UNROLL
  for (int r = 0; r < 8; ++r) {
    const int64_t row = first_row + mma::Tile<T>::row_of(r / 2, r % 2);
    if (row >= count) continue;
    T* to = static_cast<T*>(p.out.de) + plan.rows.row[row] * D;
    UNROLL
    for (int j = 0; j < 4; ++j) {
      const int64_t d = d0 + mma::Tile<T>::column_of(j, 0);
      if (d >= D) continue;
      const float* sum = p.de_sum + row * D + d;
      store_pair(to + d, (tile.acc[r / 2][j][r % 2 * 2] + sum[0]) * unit,
                 (tile.acc[r / 2][j][r % 2 * 2 + 1] + sum[1]) * unit);
    }
  }
}

}  // namespace gemma_ext::cce::cuda
