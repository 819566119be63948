// SPDX-License-Identifier: Apache-2.0
// From gradient strips to gradients, each written by one block in one order:
//   dC_v = sum_n G_nv e_n,   dE_n = sum_v G_nv c_v
#pragma once

#include "strips.cuh"

namespace gemma_ext::cce::cuda {

// Sums of dE in fp32, [N, D].
struct DeSums {
  float* whole;  // compact rows, or null: lean
  uint16_t*
      low;  // of 16-bit heads, compact rows: the lower halves of sums whose upper halves are in dE
};

// Of one row, two neighbours at a time. Lean: in the row of dE itself.
template <class T, bool kLean>
struct SumRow {
  float* whole{};
  T* high{};
  uint16_t* low{};

  DEVICE SumRow(const DeSums& sums, const Rows& rows, void* de, int64_t D, int64_t row) {
    if constexpr (kLean) {
      high = static_cast<T*>(de) + rows.row[row] * D;
      if constexpr (sizeof(T) == 2) low = sums.low + row * D;
    } else {
      whole = sums.whole + row * D;
    }
  }
  DEVICE Pair load(int64_t d) const {
    if constexpr (!kLean)
      return load_pair(whole + d);
    else if constexpr (std::is_same_v<T, float>)
      return load_pair(high + d);
    else {
      const uint32_t upper = *reinterpret_cast<const uint32_t*>(high + d);
      const uint32_t lower = *reinterpret_cast<const uint32_t*>(low + d);
      return {simt::float_of(upper << 16 | (lower & 0xffff)),
              simt::float_of((upper & 0xffff0000) | lower >> 16)};
    }
  }
  DEVICE void store(int64_t d, float x, float y) const {
    if constexpr (!kLean)
      store_pair(whole + d, x, y);
    else if constexpr (std::is_same_v<T, float>)
      store_pair(high + d, x, y);
    else {
      const uint32_t first = simt::bits_of(x), second = simt::bits_of(y);
      *reinterpret_cast<uint32_t*>(high + d) = first >> 16 | (second & 0xffff0000);
      *reinterpret_cast<uint32_t*>(low + d) = (first & 0xffff) | second << 16;
    }
  }
};

struct GradientParams {
  Head head;
  Plan plan;
  DeSums sums;
  Gradients out;
  int column_blocks;  // of 128 columns of D
  int chunk;
};

struct SliceParams {
  Head head;
  Plan plan;
  DeSums sums;
  void* de;
  int chunk, slice;
};

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
    const int64_t begin = plan.first_slot(p.chunk, index);
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
    const float size = plan.unit[0];
    UNROLL
    for (int r = 0; r < 8; ++r) {
      const int64_t v = first_column + mma::Tile<T>::row(r);
      if (v >= p.head.V) continue;
      T* to = static_cast<T*>(p.out.dc) + v * D;
      UNROLL
      for (int j = 0; j < 4; ++j) {
        const int64_t d = d0 + mma::Tile<T>::column(2 * j);
        if (d < D) store_pair(to + d, tile.at(r, 2 * j) * size, tile.at(r, 2 * j + 1) * size);
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
  const int64_t begin = plan.first_slot(p.chunk, index);
  const float sum =
      column_sum(static_cast<const T*>(plan.strips) + begin * kTile, plan.count[index]);
  const int64_t v = index * kTile + simt::block_idx() % kSumParts * kSumColumns + simt::lane_idx();
  if (simt::warp_idx() > 0 || v >= p.head.V) return;
  p.out.dbias[v] = sum * plan.unit[0] / p.head.map.scale;
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
      found.slot[w] = plan.first_slot(p.chunk, tile) + plan.before[at] - 1;
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

// The sums += G C over the tiles of the chunk; a block per 128 rows and 128 columns of D.
template <class T, bool kLean>
DEVICE void add_de(const GradientParams& p) {
  const Plan& plan = p.plan;
  const int64_t block = simt::block_idx() / p.column_blocks, first_row = block * kBlockRows;
  const int d0 = simt::block_idx() % p.column_blocks * mma::kSide, D = static_cast<int>(p.head.D);
  const bool empty = plan.chunk_tile[p.chunk] == plan.chunk_tile[p.chunk + 1];
  if (first_row >= *plan.rows.count || *plan.sparse || (p.chunk > 0 && empty)) return;
  const BlockTile* tiles = plan.block_tiles + block * plan.tiles;
  const T *strips = static_cast<const T*>(plan.strips), *c = static_cast<const T*>(p.head.c);
  mma::Tile<T> tile;
  const auto add_tiles = [&](const BlockTile* from, int count) {
    tile.template multiply<simt::Major::kK, simt::Major::kMn>(
        count * kTile,
        [&](int line, int k) {
          const BlockTile& at = from[k / kTile];
          // the row's own bit becomes the sign, rows after it fall out
          const uint32_t bits = at.keep[line / kWordRows] << (31 - line % kWordRows);
          const int slot = at.slot[line / kWordRows] + simt::popcount(bits);
          return bits >> 31 ? strips + int64_t{slot} * kTile + k % kTile : nullptr;
        },
        [&](int at, int k) {
          const int v = from[k / kTile].tile * kTile + k % kTile;
          return v < p.head.V && d0 + at < D ? c + int64_t{v} * p.head.c_stride + d0 + at : nullptr;
        },
        simt::shared<T>());
  };
  const int count = plan.block_tile_count[block];
  tile.clear();
  if constexpr (mma::Tile<T>::kSplit) {
    // a tensor core cuts off the bits of what it adds to a larger sum: rounded sums of tiles
    float sums[64] = {};
    NO_UNROLL
    for (int t = 0; t < count; ++t) {
      tile.clear();
      add_tiles(tiles + t, 1);
      UNROLL
      for (int e = 0; e < 64; ++e) sums[e] += tile.flat(e);
    }
    UNROLL
    for (int e = 0; e < 64; ++e) tile.flat(e) = sums[e];
  } else {
    add_tiles(tiles, count);
  }
  UNROLL
  for (int r = 0; r < 8; ++r) {
    const int64_t row = first_row + mma::Tile<T>::row(r);
    if (row >= *plan.rows.count) continue;
    const SumRow<T, kLean> sum(p.sums, plan.rows, p.out.de, D, row);
    UNROLL
    for (int j = 0; j < 4; ++j) {
      const int d = d0 + mma::Tile<T>::column(2 * j);
      if (d >= D) continue;
      const Pair before = p.chunk == 0 ? Pair{} : sum.load(d);
      sum.store(d, before.x + tile.at(r, 2 * j), before.y + tile.at(r, 2 * j + 1));
    }
  }
}

template <class T, bool kLean>
KERNEL_BOUNDS(mma::kThreads, kMmaBlocks<T>)
void de_kernel(GradientParams p) {
  add_de<T, kLean>(p);
}

// Spills: of two sets of sums.
template <bool kLean>
KERNEL_BOUNDS(mma::kThreads, 1)
void de_by_tile_kernel(GradientParams p) {
  add_de<float, kLean>(p);
}

// parts[slot] = G[slot] C, columns `slice` of D, of the chunk's strips; units as in strip_gradient_kernel.
template <class T>
KERNEL_BOUNDS(mma::kThreads, kMmaBlocks<T>)
void parts_kernel(SliceParams p) {
  const Plan& plan = p.plan;
  if (!*plan.sparse) return;
  const T *strips = static_cast<const T*>(plan.strips), *c = static_cast<const T*>(p.head.c);
  T* parts = static_cast<T*>(plan.parts);
  const int D = static_cast<int>(p.head.D), halves = 2 * plan.tasks(p.chunk);
  mma::Tile<T> tile;
  NO_UNROLL
  for (int unit = simt::block_idx(); unit < halves; unit += simt::grid_dim()) {
    const int half = unit % 2 * mma::kSide, d0 = p.slice * kSlice + half;
    if (d0 >= D) continue;
    const int index = tile_of_task(plan, p.chunk, unit / 2);
    const int first = first_of_task(plan, p.chunk, index, unit / 2);
    const int left = plan.count[index] - first;  // strips from here on
    const int64_t slot = plan.first_slot(p.chunk, index) + first;
    tile.clear();
    tile.template multiply<simt::Major::kK, simt::Major::kMn>(
        kTile,
        [&](int line, int k) { return line < left ? strips + (slot + line) * kTile + k : nullptr; },
        [&](int at, int k) {
          const int64_t v = int64_t{index} * kTile + k;
          return v < p.head.V && d0 + at < D ? c + v * p.head.c_stride + d0 + at : nullptr;
        },
        simt::shared<T>());
    UNROLL
    for (int r = 0; r < 8; ++r) {
      const int row = mma::Tile<T>::row(r);
      if (row >= left) continue;
      UNROLL
      for (int j = 0; j < 4; ++j) {
        store_pair(parts + (slot + row) * kSlice + half + mma::Tile<T>::column(2 * j),
                   tile.at(r, 2 * j), tile.at(r, 2 * j + 1));
      }
    }
  }
}

constexpr int kRowTiles = kWordTiles * simt::kWarpSize;  // looked at together
struct RowSlots {
  int slot[kRowTiles];
  int count;
};

// The sums of [row, slice] += its parts, in order of the tiles; blocks take turns over rows, a thread per two
// columns.
constexpr int kPartThreads = kSlice / 2;
template <class T, bool kLean>
KERNEL void add_parts_kernel(SliceParams p) {
  const Plan& plan = p.plan;
  RowSlots& s = *simt::shared<RowSlots>();
  const int t = simt::thread_idx(), lane = simt::lane_idx();
  const int tile0 = plan.chunk_tile[p.chunk], tile1 = plan.chunk_tile[p.chunk + 1];
  if (!*plan.sparse || (p.chunk > 0 && tile0 == tile1)) return;
  const int64_t d = p.slice * kSlice + 2 * t;
  const T* parts = static_cast<const T*>(plan.parts) + 2 * t;
  for (int row = simt::block_idx(); row < *plan.rows.count; row += simt::grid_dim()) {
    float sum = 0.0f, next = 0.0f;
    for (int first = tile0 / kWordTiles; first * kWordTiles < tile1; first += simt::kWarpSize) {
      if (simt::warp_idx() == 0) {
        const int word = first + lane;
        uint32_t bits = word < plan.tile_words ? plan.keep_row[row * plan.tile_words + word] : 0;
        if (word * kWordTiles < tile0)
          bits &= ~uint32_t{0} << lesser(tile0 - word * kWordTiles, 31);
        if (word * kWordTiles >= tile1) bits = 0;
        if (tile1 - word * kWordTiles < kWordTiles && bits)
          bits &= (1u << (tile1 - word * kWordTiles)) - 1;
        int at = simt::popcount(bits), total = at;
        UNROLL
        for (int delta = 1; delta < simt::kWarpSize; delta *= 2) {
          const int other = simt::shfl_up(total, delta);
          if (lane >= delta) total += other;
        }
        at = total - at;
        for (; bits; bits &= bits - 1) {
          const int tile = word * kWordTiles + simt::popcount((bits & (~bits + 1)) - 1);
          const int64_t rows = int64_t{tile} * plan.words + row / kWordRows;
          const uint32_t earlier = plan.keep[rows] & ((1u << row % kWordRows) - 1);
          s.slot[at++] =
              plan.first_slot(p.chunk, tile) + plan.before[rows] + simt::popcount(earlier);
        }
        if (lane == simt::kWarpSize - 1) s.count = total;
      }
      simt::sync_block();
      UNROLL_BY(8)
      for (int i = 0; i < s.count; ++i) {
        const Pair part = load_pair(parts + int64_t{s.slot[i]} * kSlice);
        sum += part.x;
        next += part.y;
      }
      simt::sync_block();
    }
    if (d >= p.head.D) continue;
    const SumRow<T, kLean> to(p.sums, plan.rows, p.de, p.head.D, row);
    const Pair before = p.chunk == 0 ? Pair{} : to.load(d);
    to.store(d, before.x + sum, before.y + next);
  }
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

// dE = unit times the sums, rounded once, to the rows it belongs to; a block per row.
template <class T, bool kLean>
KERNEL void finish_de_kernel(GradientParams p) {
  const Plan& plan = p.plan;
  const int64_t row = simt::block_idx(), D = p.head.D;
  if (row >= *plan.rows.count || !*plan.listed) return;
  const float unit = plan.unit[0];
  const SumRow<T, kLean> sums(p.sums, plan.rows, p.out.de, D, row);
  T* to = static_cast<T*>(p.out.de) + plan.rows.row[row] * D;
  for (int64_t d = 2 * simt::thread_idx(); d < D; d += 2 * kPlanThreads) {
    const Pair sum = sums.load(d);
    store_pair(to + d, sum.x * unit, sum.y * unit);
  }
}

}  // namespace gemma_ext::cce::cuda
