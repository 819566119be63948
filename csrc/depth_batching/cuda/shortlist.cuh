// SPDX-License-Identifier: Apache-2.0
// The shortlist: bounds of 128 logits at a time from their codes, the head's logits of the few tokens whose upper bounds
// are highest, and what both say of a row. Bounds reach memory a part of the vocabulary at a time, for the choice.
#pragma once

#include "code_tile.cuh"
#include "depth_batching/verdict.h"
#include "logits.cuh"

namespace gemma_ext::depth_batching::cuda {

// Of the bounds of a tile: sums of exp, each relative to its own maximum.
struct BoundPart {
  float high_max, high_sum, low_max, low_sum;
};

struct ScreenParams {
  Shortlist call;
  const void* x;  // [n, x_stride] in the type of weight
  int64_t x_stride;
  const float* lengths;  // [n] |x|, from above
  float longest;         // |W_v| <= longest scale_v + slack_v
  float slip;            // share of |x| |W_v| that tensor cores may lose
  BoundPart* parts;      // [tiles, n]
  int64_t first_tile, tiles;
  float* upper;  // [n, tiles * kHeadTile] of these tiles, before soft-capping
};

// What lies between two sums of tensor cores and the exact ones, beyond 2^-22 (D + 16) |x| |W_v| of the slack. An adder
// of at least 8 products that cuts off what is below 2^-23 of the largest loses 5/4 2^-23 a product, of |x| |W_v|: two
// sums 5/4 2^-22 D. float takes two sums of halves with codes and three with weights, 25/8 2^-22 D, and what the
// halves leave out: 2^-18 of a code's product, 3 2^-18 of a weight's.
inline float slip_of(DType type, int64_t D) {
  const float products = static_cast<float>(D) * 0x1p-24f;
  return type == DType::kFloat32 ? 0x1p-15f + 9.0f * products : products;
}

// From a maximum without NaN to the sum of exp relative to it, of the warp's values.
template <int kEach>
DEVICE void warp_exp_sum(const float (&x)[kEach], float& top, float& sum) {
  top = kLeast;
  UNROLL
  for (int i = 0; i < kEach; ++i) top = fmaxf(top, x[i]);
  UNROLL
  for (int mask = 1; mask < simt::kWarpSize; mask *= 2) top = fmaxf(top, simt::shfl_xor(top, mask));
  const float base = top == kLeast ? 0.0f : top;
  sum = 0.0f;
  UNROLL
  for (int i = 0; i < kEach; ++i) sum += expf(x[i] - base);
  sum = warp_sum(sum);
}

template <class Tile>
KERNEL_BOUNDS(Tile::kThreads, Tile::kBlocks)
void depth_screen_kernel(ScreenParams p) {
  using T = typename Tile::Type;
  static_assert(Tile::kFeatures == kHeadTile);
  constexpr int kEach = kHeadTile / simt::kWarpSize;
  const Shortlist& call = p.call;
  const Head& head = call.head;
  const int64_t row_tiles = ceil_div(head.n, Tile::kRows);
  const int64_t at = simt::block_idx() / row_tiles, tile_at = p.first_tile + at;
  const int64_t row0 = simt::block_idx() % row_tiles * Tile::kRows, id0 = tile_at * kHeadTile;
  const int64_t rows = head.n - row0 < Tile::kRows ? head.n - row0 : Tile::kRows;
  Tile tile;
  tile.clear();
  Lines<Tile>::multiply(
      tile, static_cast<int>(head.D),
      [&](int line) {
        return id0 + line < head.V ? call.codes + (id0 + line) * call.code_stride : nullptr;
      },
      [&](int line) {
        return line < rows ? static_cast<const T*>(p.x) + (row0 + line) * p.x_stride : nullptr;
      });
  float* s_products = simt::shared<float>();
  tile.each([&](int line, int m, float& x) { s_products[m * kHeadTile + line] = x; });
  simt::sync_block();

  const int first = simt::lane_idx() * kEach;
  const float reach = fabsf(head.scale);
  float scale[kEach], slack[kEach], bias[kEach];
  UNROLL
  for (int i = 0; i < kEach; ++i) {
    const int64_t id = id0 + first + i;
    const bool inside = id < head.V;
    scale[i] = inside ? call.code_scale[id] : 0.0f;
    slack[i] = inside ? call.slack[id] : 0.0f;
    slack[i] += p.slip * (p.longest * scale[i] + slack[i]);
    bias[i] = inside && head.bias ? head.bias[id] : 0.0f;
  }
  for (int m = simt::warp_idx(); m < rows; m += Tile::kThreads / simt::kWarpSize) {
    const int64_t row = row0 + m;
    const float width = reach * p.lengths[row];
    float* upper = p.upper + (row * p.tiles + at) * kHeadTile + first;
    float high[kEach], low[kEach];
    UNROLL
    for (int i = 0; i < kEach; ++i) {
      const bool inside = id0 + first + i < head.V;
      const float a = s_products[m * kHeadTile + first + i] * scale[i] * head.scale + bias[i];
      const float size = fabsf(a);
      // a bias is added here and in the head, and a width to it: each rounds by 2^-24 of the sum
      const float around = slack[i] * width + (size < -kLeast ? size * 0x1p-21f : 0.0f);
      upper[i] = a + around;
      high[i] = inside ? capped(head, a + around) : kLeast;
      low[i] = inside ? capped(head, a - around) : kLeast;
    }
    BoundPart part;
    warp_exp_sum(high, part.high_max, part.high_sum);
    warp_exp_sum(low, part.low_max, part.low_sum);
    if (simt::lane_idx() == 0) p.parts[tile_at * head.n + row] = part;
  }
}

struct ExactParams {
  Head head;
  const void* x;
  int64_t x_stride;
  const int32_t* ids;  // [n, listed]
  int64_t listed, count;
  float* logits;  // [n, count]
};

// The head's logits of the first `count` tokens of a row's list: the chains of depth_head_kernel.
template <class Tile>
KERNEL_BOUNDS(Tile::kThreads, Tile::kBlocks)
void depth_exact_kernel(ExactParams p) {
  using T = typename Tile::Type;
  const Head& head = p.head;
  const int64_t tiles = ceil_div(p.count, Tile::kFeatures);
  const int64_t row = simt::block_idx() / tiles;
  const int64_t c0 = simt::block_idx() % tiles * Tile::kFeatures;
  const int32_t* ids = p.ids + row * p.listed + c0;
  Tile tile;
  tile.clear();
  Lines<Tile>::multiply(
      tile, static_cast<int>(head.D),
      [&](int line) {
        return c0 + line < p.count ? static_cast<const T*>(head.weight) + ids[line] * head.w_stride
                                   : nullptr;
      },
      [&](int line) {
        return line == 0 ? static_cast<const T*>(p.x) + row * p.x_stride : nullptr;
      });
  tile.each([&](int line, int m, float& x) {
    if (m == 0 && c0 + line < p.count)
      p.logits[row * p.count + c0 + line] = logit_of(head, ids[line], x);
  });
}

struct VerdictParams {
  Shortlist call;
  const BoundPart* parts;  // [tiles, n]
  const float* upper;      // [n, listed], descending
  const int32_t* ids;      // [n, listed]
  int64_t listed;          // the candidates, and the best of the others if there are any
  const float* logits;     // [n, candidates]
};

constexpr int kVerdictThreads = 128;

struct VerdictShared {
  double sums[4][kVerdictThreads];
  TopTwo tops[kVerdictThreads / simt::kWarpSize];
  float maxima[kVerdictThreads / simt::kWarpSize];
};

// A block a row; sums in double, in one order.
KERNEL_BOUNDS(kVerdictThreads, 4) void depth_verdict_kernel(VerdictParams p) {
  VerdictShared& s = *simt::shared<VerdictShared>();
  const Shortlist& call = p.call;
  const Head& head = call.head;
  const int64_t row = simt::block_idx(), n = head.n, tiles = ceil_div(head.V, kHeadTile);
  const int64_t count = call.candidates;
  const float *upper = p.upper + row * p.listed, *logits = p.logits + row * count;
  const int32_t* ids = p.ids + row * p.listed;
  const int t = simt::thread_idx();
  TopTwo top{kLeast, kLeast, -1};
  for (int64_t c = t; c < count; c += kVerdictThreads)
    if (logits[c] > kLeast) top = merge(top, {logits[c], kLeast, ids[c]});
  top = warp_top(top);
  float most = kLeast;
  for (int64_t tile = t; tile < tiles; tile += kVerdictThreads)
    most = fmaxf(most, p.parts[tile * n + row].high_max);
  UNROLL
  for (int mask = 1; mask < simt::kWarpSize; mask *= 2)
    most = fmaxf(most, simt::shfl_xor(most, mask));
  if (simt::lane_idx() == 0) {
    s.tops[simt::warp_idx()] = top;
    s.maxima[simt::warp_idx()] = most;
  }
  simt::sync_block();
  top = s.tops[0];
  most = s.maxima[0];
  for (int w = 1; w < kVerdictThreads / simt::kWarpSize; ++w) {
    top = merge(top, s.tops[w]);
    most = fmaxf(most, s.maxima[w]);
  }
  const double base = most == kLeast ? 0.0 : most;

  double high = 0, low = 0, of_high = 0, known = 0;
  for (int64_t tile = t; tile < tiles; tile += kVerdictThreads) {
    const BoundPart part = p.parts[tile * n + row];
    if (part.high_sum != 0.0f) high += exp(part.high_max - base) * part.high_sum;
    if (part.low_sum != 0.0f) low += exp(part.low_max - base) * part.low_sum;
  }
  for (int64_t c = t; c < count; c += kVerdictThreads) {
    of_high += exp(capped(head, upper[c]) - base);
    known += exp(logits[c] - base);
  }
  s.sums[0][t] = high;
  s.sums[1][t] = low;
  s.sums[2][t] = of_high;
  s.sums[3][t] = known;
  for (int step = kVerdictThreads / 2; step > 0; step /= 2) {
    simt::sync_block();
    for (int i = 0; t < step && i < 4; ++i) s.sums[i][t] += s.sums[i][t + step];
  }
  if (t != 0) return;
  const BoundSums sums{base, s.sums[0][0], s.sums[1][0], s.sums[2][0], s.sums[3][0]};
  call.ids[row] = top.id < 0 ? 0 : top.id;
  call.top[2 * row] = top.first;
  call.top[2 * row + 1] = top.second;
  const float others = p.listed > count ? capped(head, upper[count]) : kLeast;
  judge(call, row, top.first, others, sums);
}

}  // namespace gemma_ext::depth_batching::cuda
