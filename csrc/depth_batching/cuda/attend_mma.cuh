// SPDX-License-Identifier: Apache-2.0
// 16-bit storage on tensor cores: tokens are the rows of a product, queries its 8 kTiles columns. The columns are
// the heads that share K, of as many rows of one chunk as have room: rows of one request at positions that follow
// each other are computed by the block of the first whose position is a multiple of their number. A column's bits do
// not depend on the others: what a column does not see has weight 0.
//
//   S [64 tokens, queries] = K q^T        a warp has 16 tokens
//   O^T [width, queries] += V^T P         a warp has every fourth 16 of the width
#pragma once

#include "attention.cuh"

namespace gemma_ext::depth_batching::cuda {

constexpr int kMmaThreads = 128, kMmaWarps = kMmaThreads / simt::kWarpSize;
constexpr int kTokens = 64;  // of a tile

// Rows are padded by 16 bytes: an odd number of 16-byte words apart, as ldmatrix wants them.
template <class T, int kWidth, int kTiles>
struct MmaShared {
  static constexpr int kColumns = 8 * kTiles, kRow = kWidth + 8, kWeightRow = kTokens + 8;
  T k[kTokens][kRow], v[kTokens][kRow];
  T q[kColumns][kRow];
  T weights[kColumns][kWeightRow];
  float most[kMmaWarps][kColumns], total[kMmaWarps][kColumns];
};

// Tokens begin .. end of the request, without those between the sinks and `first`; what else a tile holds is 0.
template <class T, int kRow>
DEVICE void load_tile(T (&to)[kTokens][kRow], const Attention& a, int64_t row, int head,
                      int64_t half, int tile, int begin, int end, int first) {
  constexpr int kWords = (kRow - 8) / 8;  // of a token; those of a page lie one behind the other
  const T* anywhere = static_cast<const T*>(a.pool.data);
  UNROLL
  for (int page = 0; page < kTokens / kPage; ++page) {
    const int at = tile + page * kPage;
    const bool any = at < end && at + kPage > begin;
    const T* from = any ? page_of<T>(a, row, at / kPage, half, head) : nullptr;
    for (int i = simt::thread_idx(); i < kPage * kWords; i += kMmaThreads) {
      const int token = i / kWords, t = at + token;
      const bool seen = from && t >= begin && t < end && (t >= first || t < a.sinks);
      simt::cp_async(&to[page * kPage + token][i % kWords * 8], seen ? from + i * 8 : anywhere,
                     seen ? 16 : 0);
    }
  }
}

template <class T, int kWidth, int kTiles>
KERNEL_BOUNDS(kMmaThreads, 2)
void attend_mma_kernel(AttendParams p) {
  using Shared = MmaShared<T, kWidth, kTiles>;
  constexpr int kColumns = Shared::kColumns, kSlabs = (kWidth / 16 + kMmaWarps - 1) / kMmaWarps;
  Shared& s = *simt::shared<Shared>();
  const Attention& a = p.call;
  const Places& places = a.places;
  const Unit u = unit_of(p);
  if (!is_row(a, u.row)) return;
  const int room = kColumns / u.heads, pos = places.pos[u.row];
  if (u.row > p.row0 && follows(places, u.row) && pos % room != 0) return;
  int rows = 1;
  while (u.row + rows < p.row0 + p.rows && (pos + rows) % room != 0 &&
         follows(places, u.row + rows) && is_row(a, u.row + rows))
    ++rows;
  const int reach = a.window ? a.window[places.loop[u.row]] : 0;
  const int base = u.split * kSplit, first = first_token(a, u.row);
  const int begin = first > base && base >= a.sinks ? first : base;
  const int end = pos + rows < base + kSplit ? pos + rows : base + kSplit;
  if (begin >= end) return;

  const int warp = simt::warp_idx(), lane = simt::lane_idx(), thread = simt::thread_idx();
  for (int e = thread; e < kColumns * kWidth; e += kMmaThreads) {
    const int column = e / kWidth, row = column / u.heads, head = column % u.heads;
    T x = narrow<T>(0.0f);
    if (row < rows)
      x = static_cast<const T*>(
          a.q.data)[(u.row + row) * a.q.stride + (u.first + head) * kWidth + e % kWidth];
    s.q[column][e % kWidth] = x;
  }
  const int tile0 = begin / kTokens * kTokens;
  load_tile(s.k, a, u.row, u.head, 0, tile0, begin, end, first);
  simt::cp_async_commit();
  load_tile(s.v, a, u.row, u.head, 1, tile0, begin, end, first);
  simt::cp_async_commit();

  // Of the columns 8 i + lane % 4 * 2 + j.
  float most[kTiles][2], total[kTiles][2] = {};
  int seen_from[kTiles][2], seen_to[kTiles][2];
  UNROLL
  for (int i = 0; i < kTiles; ++i) {
    UNROLL
    for (int j = 0; j < 2; ++j) {
      const int row = (8 * i + lane % 4 * 2 + j) / u.heads, to = pos + row + 1;
      most[i][j] = kNothing;
      seen_to[i][j] = row < rows ? to : 0;
      seen_from[i][j] = reach > 0 && reach < to ? to - reach : 0;
    }
  }
  float sums[kSlabs][kTiles][4] = {};

  for (int tile = tile0; tile < end; tile += kTokens) {
    simt::cp_async_wait<1>();
    simt::sync_block();  // K has come
    float scores[kTiles][4] = {};
    UNROLL_BY(2)
    for (int d = 0; d < kWidth; d += 16) {
      uint32_t k[4];
      simt::ldmatrix(k, &s.k[warp * 16 + lane % 16][d + lane / 16 * 8]);
      UNROLL
      for (int i = 0; i < kTiles; ++i) {
        uint32_t q[2];
        simt::ldmatrix(q, &s.q[8 * i + lane % 8][d + lane / 8 % 2 * 8]);
        simt::mma_m16n8k16<T>(scores[i], k, q);
      }
    }
    const int token = tile + warp * 16 + lane / 4;
    UNROLL
    for (int i = 0; i < kTiles; ++i) {
      UNROLL
      for (int j = 0; j < 2; ++j) {
        float top = kNothing;
        UNROLL
        for (int r = 0; r < 2; ++r) {
          const int t = token + 8 * r;
          float& score = scores[i][2 * r + j];
          const bool seen = (t >= seen_from[i][j] || t < a.sinks) && t < seen_to[i][j];
          score = seen ? score_of(a, score) : kNothing;
          top = score > top ? score : top;
        }
        UNROLL
        for (int mask = 4; mask < simt::kWarpSize; mask *= 2) {
          const float other = simt::shfl_xor(top, mask);
          top = other > top ? other : top;
        }
        if (lane < 4) s.most[warp][8 * i + lane * 2 + j] = top;
      }
    }
    simt::sync_block();  // K is read, the maxima are there
    if (tile + kTokens < end)
      load_tile(s.k, a, u.row, u.head, 0, tile + kTokens, begin, end, first);
    simt::cp_async_commit();
    float shrink[kTiles][2];
    UNROLL
    for (int i = 0; i < kTiles; ++i) {
      UNROLL
      for (int j = 0; j < 2; ++j) {
        const int column = 8 * i + lane % 4 * 2 + j;
        float top = most[i][j];
        UNROLL
        for (int w = 0; w < kMmaWarps; ++w) top = s.most[w][column] > top ? s.most[w][column] : top;
        shrink[i][j] = top == most[i][j] ? 1.0f : simt::exp2_approx(most[i][j] - top);
        most[i][j] = top;
        float sum = 0;
        UNROLL
        for (int r = 0; r < 2; ++r) {
          const float score = scores[i][2 * r + j];
          const float weight = weight_of(score, top);
          s.weights[column][warp * 16 + lane / 4 + 8 * r] = narrow<T>(weight);
          sum += weight;
        }
        total[i][j] = total[i][j] * shrink[i][j] + sum;
      }
    }
    simt::cp_async_wait<1>();
    simt::sync_block();  // V has come, the weights are there
    UNROLL
    for (int slab = 0; slab < kSlabs; ++slab) {
      UNROLL
      for (int i = 0; i < kTiles; ++i) {
        UNROLL
        for (int e = 0; e < 4; ++e) sums[slab][i][e] *= shrink[i][e % 2];
      }
    }
    UNROLL
    for (int t = 0; t < kTokens; t += 16) {
      uint32_t weights[kTiles][2];
      UNROLL
      for (int i = 0; i < kTiles; ++i)
        simt::ldmatrix(weights[i], &s.weights[8 * i + lane % 8][t + lane / 8 % 2 * 8]);
      UNROLL
      for (int slab = 0; slab < kSlabs; ++slab) {
        const int d = (slab * kMmaWarps + warp) * 16;
        if (d >= kWidth) continue;
        uint32_t v[4];
        simt::ldmatrix_trans(v, &s.v[t + lane / 16 * 8 + lane % 8][d + lane / 8 % 2 * 8]);
        UNROLL
        for (int i = 0; i < kTiles; ++i) simt::mma_m16n8k16<T>(sums[slab][i], v, weights[i]);
      }
    }
    simt::sync_block();  // V and the weights are read
    if (tile + kTokens < end)
      load_tile(s.v, a, u.row, u.head, 1, tile + kTokens, begin, end, first);
    simt::cp_async_commit();
  }

  UNROLL
  for (int i = 0; i < kTiles; ++i) {
    UNROLL
    for (int j = 0; j < 2; ++j) {
      float sum = total[i][j];
      UNROLL
      for (int mask = 4; mask < simt::kWarpSize; mask *= 2) sum += simt::shfl_xor(sum, mask);
      if (lane < 4) s.total[warp][8 * i + lane * 2 + j] = sum;
    }
  }
  simt::sync_block();
  UNROLL
  for (int i = 0; i < kTiles; ++i) {
    UNROLL
    for (int j = 0; j < 2; ++j) {
      const int column = 8 * i + lane % 4 * 2 + j, row = column / u.heads;
      if (row >= rows) continue;
      float* part = part_of(p, u.row + row, u.first + column % u.heads, u.split);
      if (warp == 0 && lane < 4) {
        part[0] = most[i][j];
        part[1] = s.total[0][column] + s.total[1][column] + s.total[2][column] + s.total[3][column];
      }
      UNROLL
      for (int slab = 0; slab < kSlabs; ++slab) {
        const int d = (slab * kMmaWarps + warp) * 16 + lane / 4;
        if (d >= kWidth) continue;
        part[kPartHead + d] = sums[slab][i][j];
        part[kPartHead + d + 8] = sums[slab][i][2 + j];
      }
    }
  }
}

}  // namespace gemma_ext::depth_batching::cuda
