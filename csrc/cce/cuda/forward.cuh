// SPDX-License-Identifier: Apache-2.0
// Forward of one strip block: 128 rows against a tile of 256 columns, as two products of 128 x 128.
//   s = softcap(scale e.c + bias) / T;   per row: max s, sum exp(s - max), sum exp(s - max) T ds/da, ...
// of all columns but the row's label, which `combine.cuh` adds.
// The logits never leave the registers.
#pragma once

#include "head.cuh"

namespace gemma_ext::cce::cuda {

// [tiles at a time, N] each, compact rows; null where not wanted.
struct StripPlanes {
  float *max, *sum, *slope, *square, *weighted, *class_sum;
  int* argmax;
  float* total;  // sum s
};

// Which planes there may be: max and sum; also slope and square; all.
enum class Sums { kPlain, kDrawn, kAll };
inline Sums sums_of(const StripPlanes& p) {
  if (p.weighted || p.class_sum || p.argmax || p.total) return Sums::kAll;
  return p.slope ? Sums::kDrawn : Sums::kPlain;
}

struct StripParams {
  Head head;
  Rows rows;
  StripPlanes out;
  float* target;  // [N] s at the label
  int tiles, row_blocks;
  int first_tile;  // of those that are at hand
};

struct StripSums {
  float max, sum, slope, square, weighted, class_sum;  // square: sum exp(2 (s - max))
  int argmax;
  float total;
};

constexpr StripSums kNoSums{-kInfinity, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, INT32_MAX, 0.0f};

DEVICE StripSums merge(const StripSums& a, const StripSums& b) {
  StripSums r;
  r.max = fmaxf(a.max, b.max);
  const float base = r.max == -kInfinity ? 0.0f : r.max;
  const float fa = exp_of(a.max - base), fb = exp_of(b.max - base);
  r.sum = a.sum * fa + b.sum * fb;
  r.slope = a.slope * fa + b.slope * fb;
  r.square = a.square * fa * fa + b.square * fb * fb;
  r.weighted = a.weighted * fa + b.weighted * fb;
  r.class_sum = a.class_sum + b.class_sum;
  r.argmax = a.max > b.max ? a.argmax : b.max > a.max ? b.argmax : lesser(a.argmax, b.argmax);
  r.total = a.total + b.total;
  return r;
}

// Sums over the columns of one row that its four lanes hold, kCount each; all four get them. at(i) is s or,
// kLog2, s log2(e): an instruction less, and rounded as a large number common to all s is. A NaN logit may
// hide from the maximum, never from the sum. kChains of each sum, for a warp is nearly alone while it adds.
// keep(i, x, exp(s - max)) sees every element.
template <Sums kSums, bool kLog2, int kChains, int kCount, class At, class Id, class Weight,
          class Inside, class Keep>
DEVICE StripSums quad_sums(const StripParams& p, At at, Id id, Weight weight, Inside inside,
                           Keep keep) {
  const LogitMap& map = p.head.map;
  constexpr float kUnit = kLog2 ? kLn2 : 1.0f;
  const auto quad_sum = [](const float (&x)[kChains]) {
    float sum = x[0];
    UNROLL
    for (int k = 1; k < kChains; ++k) sum += x[k];
    sum += simt::shfl_xor(sum, 1);
    return sum + simt::shfl_xor(sum, 2);
  };
  StripSums r = kNoSums;
  float top[kChains];
  UNROLL
  for (int k = 0; k < kChains; ++k) top[k] = at(k);
  UNROLL
  for (int i = kChains; i < kCount; ++i) top[i % kChains] = fmaxf(top[i % kChains], at(i));
  UNROLL
  for (int k = 0; k < kChains; ++k) r.max = fmaxf(r.max, top[k]);
  r.max = fmaxf(r.max, simt::shfl_xor(r.max, 1));
  r.max = fmaxf(r.max, simt::shfl_xor(r.max, 2));
  const float base = r.max == -kInfinity ? 0.0f : r.max;
  constexpr bool kDrawn = kSums != Sums::kPlain;
  const bool drawn = kDrawn && p.out.square;
  const bool sloped = kDrawn && p.out.slope && map.inv_cap > 0.0f;
  float sum[kChains] = {}, bent[kChains] = {}, square[kChains] = {}, weighted[kChains] = {};
  UNROLL
  for (int i = 0; i < kCount; ++i) {
    const float x = at(i), e = simt::exp2_approx(kLog2 ? x - base : (x - base) * kLog2E);
    keep(i, x, e);
    sum[i % kChains] += e;
    if (sloped) bent[i % kChains] += e * (x * x);
    if (drawn) square[i % kChains] += e * e;
    if constexpr (kSums == Sums::kAll) {
      if (p.out.weighted && e > 0.0f) weighted[i % kChains] += e * x;
    }
  }
  r.sum = quad_sum(sum);
  const float t = map.t_over_cap * kUnit;
  r.slope = sloped ? r.sum - quad_sum(bent) * t * t : r.sum;
  if (drawn) r.square = quad_sum(square);
  if constexpr (kSums == Sums::kAll) {
    if (p.out.weighted) r.weighted = quad_sum(weighted) * kUnit;
    if (p.out.class_sum) {
      float classes[kChains] = {};
      UNROLL
      for (int i = 0; i < kCount; ++i) {
        if (inside(i)) classes[i % kChains] += weight(i) * at(i);
      }
      r.class_sum = quad_sum(classes) * kUnit;
    }
    if (p.out.total) {
      float total[kChains] = {};
      UNROLL
      for (int i = 0; i < kCount; ++i) {
        if (inside(i)) total[i % kChains] += at(i);
      }
      r.total = quad_sum(total) * kUnit;
    }
    if (p.out.argmax) {
      UNROLL
      for (int i = 0; i < kCount; ++i) {
        if (inside(i) && at(i) == r.max) r.argmax = lesser(r.argmax, id(i));
      }
      r.argmax = lesser(r.argmax, simt::shfl_xor(r.argmax, 1));
      r.argmax = lesser(r.argmax, simt::shfl_xor(r.argmax, 2));
    }
  }
  r.max *= kUnit;
  return r;
}

DEVICE void write_sums(const StripParams& p, int tile, int64_t row, const StripSums& sums) {
  const int64_t to = (tile - p.first_tile) * p.head.N + row;
  p.out.max[to] = sums.max;
  p.out.sum[to] = sums.sum;
  if (p.out.slope) p.out.slope[to] = sums.slope;
  if (p.out.square) p.out.square[to] = sums.square;
  if (p.out.weighted) p.out.weighted[to] = sums.weighted;
  if (p.out.class_sum) p.out.class_sum[to] = sums.class_sum;
  if (p.out.argmax) p.out.argmax[to] = sums.argmax;
  if (p.out.total) p.out.total[to] = sums.total;
}

// float32 is worth the instruction.
template <class T>
constexpr bool kBase2 = sizeof(T) == 2;
template <class T>
constexpr float kToBase = kBase2<T> ? kLog2E : 1.0f;
template <class T>
constexpr float kFromBase = kBase2<T> ? kLn2 : 1.0f;

// The lane that holds the logit of a row's label writes it, rounded as a maximum is, and takes it out of the
// strip: beside its 1 the sums would lose what a confident row's loss is made of.
template <class T>
DEVICE void move_targets(mma::Tile<T>& tile, const SharedHead<T>& s, const LogitMap& map,
                         int64_t first_column, float* target) {
  const int warp_column = simt::warp_idx() % 4 * 32;
  bool here = false;
  UNROLL
  for (int r = 0; r < 8; ++r) {
    const int64_t at = s.label[mma::Tile<T>::row(r)] - first_column - warp_column;
    here |= at >= 0 && at < 32;
  }
  if (!simt::any(here)) return;
  UNROLL
  for (int r = 0; r < 8; ++r) {
    const int row = mma::Tile<T>::row(r);
    UNROLL
    for (int i = 0; i < 8; ++i) {
      if (s.label[row] == first_column + mma::Tile<T>::column(i)) {
        target[row] = tile.at(r, i) * kToBase<T> * kFromBase<T>;
        tile.at(r, i) = outside(map) * kFromBase<T>;
      }
    }
  }
}

template <class T>
KERNEL_BOUNDS(mma::kThreads, kMmaBlocks<T>)
void strip_stats_kernel(StripParams p) {
  Raster at = raster<kRasterRows>(simt::block_idx(), p.row_blocks, p.tiles);
  at.tile += p.first_tile;
  const int64_t first_row = int64_t{at.row_block} * kBlockRows;
  const int count = *p.rows.count, t = simt::thread_idx();
  if (first_row >= count) return;
  const SharedHead<T> s;
  StripSums* s_parts = simt::shared<StripSums>();  // [128, 4] while the stages are free
  name_rows(s, p.rows, nullptr, first_row, count);
  StripSums sums = kNoSums;
  mma::Tile<T> tile;
  NO_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int64_t first_column = int64_t{at.tile} * kTile + half * kHalf;
    name_columns(s, p.head, first_column);
    simt::sync_block();
    head_logits(tile, s, p.head, first_column);
    move_targets(tile, s, p.head.map, first_column, p.target + first_row);
    tile.each([&](int, int column, float& x) {
      x = s.column[column] < 0 ? outside(p.head.map) : x * kToBase<T>;
    });
    UNROLL
    for (int r = 0; r < 8; ++r) {
      const int row = mma::Tile<T>::row(r);
      const auto id = [&](int i) { return s.column[mma::Tile<T>::column(i)]; };
      const StripSums part = quad_sums<Sums::kAll, kBase2<T>, 1, 8>(
          p, [&](int i) { return tile.at(r, i); }, id,
          [&](int i) { return s.weight[mma::Tile<T>::column(i)]; },
          [&](int i) { return id(i) >= 0 && id(i) != s.label[row]; }, [](int, float, float) {});
      if (simt::lane_idx() % 4 == 0) s_parts[row * 4 + simt::warp_idx() % 4] = part;
    }
    simt::sync_block();
    if (t < kBlockRows) {
      for (int i = 0; i < 4; ++i) sums = merge(sums, s_parts[t * 4 + i]);
    }
    simt::sync_block();  // before the stages and the columns are written again
  }
  if (t < kBlockRows && first_row + t < count) write_sums(p, at.tile, first_row + t, sums);
}

}  // namespace gemma_ext::cce::cuda
