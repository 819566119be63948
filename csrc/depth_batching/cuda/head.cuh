// SPDX-License-Identifier: Apache-2.0
// The head: a block's logits of 128 tokens go from registers to shared memory, where a warp reads what is wanted off a
// row's; per row and tile 32 bytes reach memory. A row is then put together from its tiles by one warp, in one order.
#pragma once

#include "depth_batching/noise.h"
#include "feature_tile.cuh"
#include "logits.cuh"

namespace gemma_ext::depth_batching::cuda {

struct TilePart {
  float max, second, sum, below, tempered, score;
  int32_t id, sample;  // -1: none
};

struct HeadParams {
  HeadExit call;
  const void* x;  // [n, x_stride] in the type of weight
  int64_t x_stride;
  TilePart* parts;  // [tiles, n]
  int64_t first_tile, tiles;
  float* logits;  // [n, tiles * kHeadTile] of these tiles, or null
};

DEVICE bool is_wanted(const HeadExit& call, int64_t row) { return !(call.skip && call.skip[row]); }

// One warp and the logits s [kHeadTile] of one row, four neighbours a lane.
DEVICE TilePart read_row(const HeadParams& p, int64_t row, int64_t id0, const float* s) {
  constexpr int kEach = kHeadTile / simt::kWarpSize;
  const HeadExit& call = p.call;
  const int first = simt::lane_idx() * kEach;
  const float heat = heat_of(call, row);
  float x[kEach];
  TopTwo top{kLeast, kLeast, -1};
  UNROLL
  for (int i = 0; i < kEach; ++i) {
    x[i] = s[first + i];
    const int64_t id = id0 + first + i;
    if (id < call.head.V)
      top = merge(top, {x[i] == x[i] ? x[i] : kLeast, kLeast, static_cast<int32_t>(id)});
  }
  top = warp_top(top);
  const float base = top.first == kLeast ? 0.0f : top.first;
  TilePart part{top.first, top.second, 0.0f, 0.0f, 0.0f, kLeast, top.id, -1};
  UNROLL
  for (int i = 0; i < kEach; ++i) {
    const float gap = x[i] - base, e = cce::cuda::exp_of(gap);
    part.sum += e;
    if (e > 0.0f) part.below -= e * gap;
    if (heat > 0.0f) part.tempered += cce::cuda::exp_of(gap / heat);
  }
  part.sum = warp_sum(part.sum);
  part.below = warp_sum(part.below);
  if (!(heat > 0.0f)) return part;  // of the whole warp
  part.tempered = warp_sum(part.tempered);
  uint32_t words[4];
  noise_words(noise_key(call.keys + 3 * row), static_cast<uint32_t>((id0 + first) / 4), words);
  TopTwo best{kLeast, kLeast, -1};
  UNROLL
  for (int i = 0; i < kEach; ++i) {
    const float score = x[i] / heat + gumbel_of(words[i]);
    if (score == score) best = merge(best, {score, kLeast, static_cast<int32_t>(id0 + first + i)});
  }
  best = warp_top(best);
  part.score = best.first;
  part.sample = best.first == kLeast ? -1 : best.id;
  return part;
}

template <class Tile>
KERNEL_BOUNDS(Tile::kThreads, Tile::kBlocks)
void depth_head_kernel(HeadParams p) {
  using T = typename Tile::Type;
  static_assert(Tile::kFeatures == kHeadTile);
  const Head& head = p.call.head;
  const int64_t row_tiles = ceil_div(head.n, Tile::kRows);
  const int64_t at = simt::block_idx() / row_tiles, tile_at = p.first_tile + at;
  const int64_t row0 = simt::block_idx() % row_tiles * Tile::kRows, id0 = tile_at * kHeadTile;
  const int64_t rows = head.n - row0 < Tile::kRows ? head.n - row0 : Tile::kRows;
  bool wanted = false;
  for (int m = simt::lane_idx(); m < rows; m += simt::kWarpSize)
    wanted |= is_wanted(p.call, row0 + m);
  if (!simt::any(wanted)) return;  // every warp has seen the same rows
  Tile tile;
  tile.clear();
  Lines<Tile>::multiply(
      tile, static_cast<int>(head.D),
      [&](int line) {
        return id0 + line < head.V
                   ? static_cast<const T*>(head.weight) + (id0 + line) * head.w_stride
                   : nullptr;
      },
      [&](int line) {
        return line < rows && is_wanted(p.call, row0 + line)
                   ? static_cast<const T*>(p.x) + (row0 + line) * p.x_stride
                   : nullptr;
      });
  float* s_logits = simt::shared<float>();
  tile.each([&](int line, int m, float& x) {
    const int64_t id = id0 + line;
    s_logits[m * kHeadTile + line] = id < head.V ? logit_of(head, id, x) : kLeast;
  });
  simt::sync_block();
  for (int m = simt::warp_idx(); m < rows; m += Tile::kThreads / simt::kWarpSize) {
    if (!is_wanted(p.call, row0 + m)) continue;
    const float* s = s_logits + m * kHeadTile;
    const TilePart part = read_row(p, row0 + m, id0, s);
    if (simt::lane_idx() == 0) p.parts[tile_at * head.n + row0 + m] = part;
    if (p.logits)
      for (int i = simt::lane_idx(); i < kHeadTile; i += simt::kWarpSize)
        p.logits[(row0 + m) * p.tiles * kHeadTile + at * kHeadTile + i] = s[i];
  }
}

// Sums of exp relative to a maximum.
struct RowSums {
  float max, sum, below, tempered;
};
DEVICE RowSums merge(const RowSums& a, const RowSums& b, float heat) {
  const float top = fmaxf(a.max, b.max);
  const auto moved = [&](const RowSums& x) -> RowSums {
    if (x.sum == 0.0f) return {top, 0.0f, 0.0f, 0.0f};
    const float gap = x.max - top, factor = expf(gap);
    return {top, x.sum * factor, factor * (x.below - gap * x.sum),
            heat > 0.0f ? x.tempered * expf(gap / heat) : 0.0f};
  };
  const RowSums x = moved(a), y = moved(b);
  return {top, x.sum + y.sum, x.below + y.below, x.tempered + y.tempered};
}

constexpr int kRowThreads = 128, kRowWarps = kRowThreads / simt::kWarpSize;

// A warp a row.
KERNEL_BOUNDS(kRowThreads, 8) void depth_head_row_kernel(HeadParams p) {
  const HeadExit& call = p.call;
  const int64_t n = call.head.n, tiles = ceil_div(call.head.V, kHeadTile);
  const int64_t row = int64_t{simt::block_idx()} * kRowWarps + simt::warp_idx();
  if (row >= n || !is_wanted(call, row)) return;
  const float heat = heat_of(call, row);
  TopTwo top{kLeast, kLeast, -1}, drawn{kLeast, kLeast, -1};
  RowSums sums{kLeast, 0.0f, 0.0f, 0.0f};
  for (int64_t tile = simt::lane_idx(); tile < tiles; tile += simt::kWarpSize) {
    const TilePart part = p.parts[tile * n + row];
    top = merge(top, {part.max, part.second, part.id});
    drawn = merge(drawn, {part.score, kLeast, part.sample});
    sums = merge(sums, {part.max, part.sum, part.below, part.tempered}, heat);
  }
  top = warp_top(top);
  drawn = warp_top(drawn);
  UNROLL
  for (int mask = 1; mask < simt::kWarpSize; mask *= 2)
    sums = merge(sums,
                 {simt::shfl_xor(sums.max, mask), simt::shfl_xor(sums.sum, mask),
                  simt::shfl_xor(sums.below, mask), simt::shfl_xor(sums.tempered, mask)},
                 heat);
  if (simt::lane_idx() != 0) return;
  const float base = sums.max == kLeast ? 0.0f : sums.max;
  const float log_sum = logf(sums.sum), lse = base + log_sum;
  const float entropy = log_sum + sums.below / sums.sum;
  call.ids[row] = top.id < 0 ? 0 : top.id;
  call.top[2 * row] = top.first;
  call.top[2 * row + 1] = top.second;
  call.lse[row] = lse;
  call.entropy[row] = entropy;
  if (call.mode != kNever) {
    const float limit = call.threshold[row];
    // relative to the maximum, so that lse's rounding does not show
    const float p1 = expf((top.first - base) - log_sum), p2 = expf((top.second - base) - log_sum);
    call.exits[row] = call.mode == kEntropy
                          ? leaves_below(entropy, limit, call.strict)
                          : leaves_above(call.mode == kMaxProb ? p1 : p1 - p2, limit, call.strict);
  }
  if (!call.temperature) return;
  call.samples[row] = heat > 0.0f ? (drawn.id < 0 ? 0 : drawn.id) : call.ids[row];
  call.tempered[row] = heat > 0.0f ? base / heat + logf(sums.tempered) : lse;
}

}  // namespace gemma_ext::depth_batching::cuda
