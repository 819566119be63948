// SPDX-License-Identifier: Apache-2.0
// Matrix products of a 128 x 128 tile by mma.sync, from sm_80 on:  acc[m, n] += sum_k a[m, k] b[n, k]
// 256 threads: 2 x 4 warps of 64 x 32; k in steps of 32 through cp.async stages in shared memory; fp32
// accumulators stay in registers. float operands are split into two bf16 halves (hi hi + hi lo + lo hi:
// 2^-16 of |a| |b|, at a third of the rate).
//
//   mma::Tile<simt::bf16> tile;
//   tile.clear();
//   tile.template multiply<Major::kK, Major::kMn>(depth, a, b, simt::shared<simt::bf16>());
//
// A loader gives the address of 16 bytes, or null for zeros: a(m, k) with k a multiple of kChunk where k
// is contiguous (Major::kK), m a multiple of kChunk where m is (Major::kMn).
#pragma once

#include <type_traits>

#include "../simt/simt.h"

namespace gemma_ext::mma {

using simt::Major;

constexpr int kSide = 128;  // rows and columns of a tile
constexpr int kThreads = 256;
constexpr int kDepth = 32;  // k per stage
constexpr int kInstruction = 16;

template <class T>
class Tile {
 public:
  static constexpr int kChunk = 16 / sizeof(T);
  static constexpr int kStages = sizeof(T) == 2 ? 4 : 2;  // 64 KiB: every card has more
  static constexpr int kOperand = kSide * kDepth;         // elements
  static constexpr int kSharedBytes = kStages * 2 * kOperand * static_cast<int>(sizeof(T));
  static constexpr bool kSplit = std::is_same_v<T, float>;

  float acc[4][4][4];  // [m / 16][n / 8][fragment]

  DEVICE void clear() {
    UNROLL
    for (int e = 0; e < 64; ++e) flat(e) = 0.0f;
  }

  // Element e of 64: row_of(e / 16, e / 2 % 2), column_of(e / 4 % 4, e % 2).
  DEVICE float& flat(int e) { return acc[e / 16][e / 4 % 4][e % 4]; }
  // The thread's eight rows by eight columns.
  DEVICE float& at(int r, int i) { return acc[r / 2][i / 2][r % 2 * 2 + i % 2]; }
  DEVICE static int row(int r) { return row_of(r / 2, r % 2); }
  DEVICE static int column(int i) { return column_of(i / 2, i % 2); }

  DEVICE static int row_of(int block, int half) {
    return simt::warp_idx() / 4 * 64 + block * 16 + half * 8 + simt::lane_idx() / 4;
  }
  DEVICE static int column_of(int block, int odd) {
    return simt::warp_idx() % 4 * 32 + block * 8 + simt::lane_idx() % 4 * 2 + odd;
  }

  // f(row, column, value&) for every element of the thread.
  template <class F>
  DEVICE void each(F f) {
    UNROLL
    for (int e = 0; e < 64; ++e) {
      f(row_of(e / 16, e / 2 % 2), column_of(e / 4 % 4, e % 2), flat(e));
    }
  }

  // All threads of the block; on return the shared memory is free again.
  template <Major kA, Major kB, class A, class B>
  DEVICE void multiply(int depth, const A& a, const B& b, T* s_stages) {
    const int steps = (depth + kDepth - 1) / kDepth;
    const auto fill = [&](int step) {
      if (step < steps) {
        T* s_a = s_stages + step % kStages * 2 * kOperand;
        load<kA>(s_a, step * kDepth, a);
        load<kB>(s_a + kOperand, step * kDepth, b);
      }
      simt::cp_async_commit();
    };
    UNROLL
    for (int step = 0; step < kStages - 1; ++step) fill(step);
    for (int step = 0; step < steps; ++step) {
      simt::cp_async_wait<kStages - 2>();
      simt::sync_block();  // step has landed for all, and step - 1 has been read by all
      fill(step + kStages - 1);
      const T* s_a = s_stages + step % kStages * 2 * kOperand;
      NO_UNROLL  // two instructions' fragments at once spill
          for (int k = 0; k < kDepth; k += kInstruction) product<kA, kB>(s_a, s_a + kOperand, k);
    }
    simt::cp_async_wait<0>();
    simt::sync_block();
  }

 private:
  // A line is what is contiguous: kDepth of k, or kSide of m. Chunks are exchanged inside a line so that
  // the eight lines of an 8 x 8 matrix, or the four lines that half a warp reads, lie in distinct banks.
  template <Major kMajor>
  DEVICE static int place(int line, int chunk) {
    if constexpr (kMajor == Major::kK) {
      const int turn = kSplit ? 2 * (line % 4) : line / 2 % 4;
      return line * kDepth + (chunk ^ turn) * kChunk;
    } else {
      const int turn = kSplit ? 2 * (line / 2 % 4) : line % 8;
      return line * kSide + (chunk ^ turn) * kChunk;
    }
  }

  template <Major kMajor, class Loader>
  DEVICE static void load(T* s_operand, int k0, const Loader& from) {
    constexpr int kLine = (kMajor == Major::kK ? kDepth : kSide) / kChunk;
    UNROLL
    for (int i = 0; i < kOperand / kChunk / kThreads; ++i) {
      const int at = i * kThreads + simt::thread_idx(), line = at / kLine, chunk = at % kLine;
      const T* source =
          kMajor == Major::kK ? from(line, k0 + chunk * kChunk) : from(chunk * kChunk, k0 + line);
      simt::cp_async(s_operand + place<kMajor>(line, chunk), source, source ? 16 : 0);
    }
  }

  // Fragments of 16 rows of a, and of 16 rows (two instructions' worth) of b.
  template <Major kMajor>
  DEVICE static void fragment_a(uint32_t (&r)[4], const T* s_a, int m, int k) {
    const int lane = simt::lane_idx();
    if constexpr (kMajor == Major::kK) {
      simt::ldmatrix(r, s_a + place<kMajor>(m + lane % 16, k / kChunk + lane / 16));
    } else {
      simt::ldmatrix_trans(
          r, s_a + place<kMajor>(k + lane / 16 * 8 + lane % 8, m / kChunk + lane / 8 % 2));
    }
  }
  template <Major kMajor>
  DEVICE static void fragment_b(uint32_t (&r)[4], const T* s_b, int n, int k) {
    const int lane = simt::lane_idx();
    if constexpr (kMajor == Major::kK) {
      simt::ldmatrix(r,
                     s_b + place<kMajor>(n + lane / 16 * 8 + lane % 8, k / kChunk + lane / 8 % 2));
    } else {
      simt::ldmatrix_trans(
          r, s_b + place<kMajor>(k + lane / 8 % 2 * 8 + lane % 8, n / kChunk + lane / 16));
    }
  }

  // Two neighbours along k of line `mn`, as the high and the low bf16 halves of both.
  template <Major kMajor>
  DEVICE static void split(const T* s, int mn, int k, uint32_t& high, uint32_t& low) {
    float x, y;
    if constexpr (kMajor == Major::kK) {
      const float* pair = s + place<kMajor>(mn, k / kChunk) + k % kChunk;
      x = pair[0];
      y = pair[1];
    } else {
      x = s[place<kMajor>(k, mn / kChunk) + mn % kChunk];
      y = s[place<kMajor>(k + 1, mn / kChunk) + mn % kChunk];
    }
    const simt::bf16 x_high = simt::from_float<simt::bf16>(x);
    const simt::bf16 y_high = simt::from_float<simt::bf16>(y);
    high = x_high.bits | static_cast<uint32_t>(y_high.bits) << 16;
    low = simt::pack<simt::bf16>(x - simt::to_float(x_high), y - simt::to_float(y_high));
  }

  template <Major kA, Major kB>
  DEVICE void product(const T* s_a, const T* s_b, int k) {
    const int m0 = simt::warp_idx() / 4 * 64, n0 = simt::warp_idx() % 4 * 32;
    if constexpr (!kSplit) {
      uint32_t b[2][4];
      UNROLL
      for (int j = 0; j < 2; ++j) fragment_b<kB>(b[j], s_b, n0 + 16 * j, k);
      UNROLL
      for (int i = 0; i < 4; ++i) {
        uint32_t a[4];
        fragment_a<kA>(a, s_a, m0 + 16 * i, k);
        UNROLL
        for (int j = 0; j < 4; ++j) {
          const uint32_t right[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
          simt::mma_m16n8k16<T>(acc[i][j], a, right);
        }
      }
    } else {
      const int line = simt::lane_idx() / 4, pair = simt::lane_idx() % 4 * 2;
      uint32_t b_high[4][2], b_low[4][2];
      UNROLL
      for (int j = 0; j < 8; ++j) {
        split<kB>(s_b, n0 + j / 2 * 8 + line, k + j % 2 * 8 + pair, b_high[j / 2][j % 2],
                  b_low[j / 2][j % 2]);
      }
      UNROLL
      for (int i = 0; i < 4; ++i) {
        uint32_t high[4], low[4];
        UNROLL
        for (int r = 0; r < 4; ++r) {
          split<kA>(s_a, m0 + i * 16 + r % 2 * 8 + line, k + r / 2 * 8 + pair, high[r], low[r]);
        }
        UNROLL
        for (int j = 0; j < 4; ++j) {
          simt::mma_m16n8k16<simt::bf16>(acc[i][j], low, b_high[j]);
          simt::mma_m16n8k16<simt::bf16>(acc[i][j], high, b_low[j]);
          simt::mma_m16n8k16<simt::bf16>(acc[i][j], high, b_high[j]);
        }
      }
    }
  }
};

}  // namespace gemma_ext::mma
