// SPDX-License-Identifier: Apache-2.0
// Products of features with a few rows:  acc[f, m] += sum_k a[f, k] b[m, k]
// The weight is the left operand of mma.sync, so that few rows fill up to 8 columns and not to 16 or 128. The chain of
// an output is that of mma::Tile with the same operands, k by k: a row's bits do not depend on which tile it is in.
//
// A warp owns 16 features and all rows; a stage is 128 bytes of k of every feature and row.
#pragma once

#include "common/cuda/tile_mma.h"
#include "launches.h"

namespace gemma_ext::depth_batching::cuda {

// Two neighbours as the high and the low bf16 halves of both.
DEVICE void split(float x, float y, uint32_t& high, uint32_t& low) {
  const simt::bf16 x_high = simt::from_float<simt::bf16>(x);
  const simt::bf16 y_high = simt::from_float<simt::bf16>(y);
  high = x_high.bits | static_cast<uint32_t>(y_high.bits) << 16;
  low = simt::pack<simt::bf16>(x - simt::to_float(x_high), y - simt::to_float(y_high));
}

// The sums of a warp's 16 features with all rows.
template <int kRows>
class Fragments {
 public:
  DEVICE void clear() {
    UNROLL
    for (int j = 0; j < kRows / 8; ++j) {
      UNROLL
      for (int e = 0; e < 4; ++e) acc_[j][e] = 0.0f;
    }
  }

  // f(feature, row, value&) for every element of the thread.
  template <class F>
  DEVICE void each(F f) {
    const int lane = simt::lane_idx(), first = simt::warp_idx() * 16 + lane / 4;
    UNROLL
    for (int j = 0; j < kRows / 8; ++j) {
      UNROLL
      for (int e = 0; e < 4; ++e) f(first + e / 2 * 8, j * 8 + lane % 4 * 2 + e % 2, acc_[j][e]);
    }
  }

 protected:
  float acc_[kRows / 8][4];
};

// load(step, stage) of every step, kStages - 1 ahead of use(stage); all threads of the block. On return the shared
// memory is free again.
template <int kStages, class Load, class Use>
DEVICE void staged(int steps, const Load& load, const Use& use) {
  const auto fill = [&](int step) {
    if (step < steps) load(step, step % kStages);
    simt::cp_async_commit();
  };
  UNROLL
  for (int step = 0; step < kStages - 1; ++step) fill(step);
  for (int step = 0; step < steps; ++step) {
    simt::cp_async_wait<kStages - 2>();
    simt::sync_block();  // step has landed for all, and step - 1 has been read by all
    fill(step + kStages - 1);
    use(step % kStages);
  }
  simt::cp_async_wait<0>();
  simt::sync_block();
}

template <class T, int kF, int kR>
class FeatureTile : public Fragments<kR> {
 public:
  using Type = T;
  using Left = T;  // of the features
  static constexpr int kFeatures = kF, kRows = kR;
  static constexpr int kThreads = kFeatures / 16 * simt::kWarpSize;
  static constexpr int kChunk = 16 / sizeof(T), kLine = 8;  // chunks of a line
  static constexpr int kDepth = kLine * kChunk;
  static constexpr int kStages = 4, kStage = (kFeatures + kRows) * kDepth;  // elements
  static constexpr int kSharedBytes = kStages * kStage * static_cast<int>(sizeof(T));
  static constexpr int kBlocks = sizeof(T) == 2 ? 2 : 1;  // of a multiprocessor
  static_assert(kRows % 16 == 0 && kSharedBytes >= kFeatures * kRows * 4);

  // Loaders as those of mma::Tile; all threads of the block, see `staged`.
  template <class A, class B>
  DEVICE void multiply(int depth, const A& a, const B& b, T* s_stages) {
    staged<kStages>((depth + kDepth - 1) / kDepth,
                    [&](int step, int stage) {
                      T* s_a = s_stages + stage * kStage;
                      load<kFeatures>(s_a, step * kDepth, a);
                      load<kRows>(s_a + kFeatures * kDepth, step * kDepth, b);
                    },
                    [&](int stage) {
                      const T* s_a = s_stages + stage * kStage;
                      NO_UNROLL
                      for (int k = 0; k < kDepth; k += mma::kInstruction)
                        product(s_a, s_a + kFeatures * kDepth, k);
                    });
  }

 private:
  static constexpr bool kSplit = std::is_same_v<T, float>;

  // The eight lines of an 8 x 8 matrix lie in distinct banks.
  DEVICE static int place(int line, int chunk) {
    return line * kDepth + (chunk ^ (line % kLine)) * kChunk;
  }

  template <int kLines, class Loader>
  DEVICE static void load(T* s_operand, int k0, const Loader& from) {
    UNROLL
    for (int i = 0; i < kLines * kLine; i += kThreads) {
      const int at = i + simt::thread_idx(), line = at / kLine, chunk = at % kLine;
      if (kLines * kLine % kThreads && at >= kLines * kLine) break;
      const T* source = from(line, k0 + chunk * kChunk);
      simt::cp_async(s_operand + place(line, chunk), source, source ? 16 : 0);
    }
  }

  DEVICE static void split_at(const T* s, int line, int k, uint32_t& high, uint32_t& low) {
    const float* pair = s + place(line, k / kChunk) + k % kChunk;
    split(pair[0], pair[1], high, low);
  }

  DEVICE void product(const T* s_a, const T* s_b, int k) {
    const int lane = simt::lane_idx(), f0 = simt::warp_idx() * 16;
    if constexpr (!kSplit) {
      uint32_t a[4];
      simt::ldmatrix(a, s_a + place(f0 + lane % 16, k / kChunk + lane / 16));
      UNROLL
      for (int j = 0; j < kRows / 16; ++j) {
        uint32_t b[4];
        simt::ldmatrix(b,
                       s_b + place(j * 16 + lane / 16 * 8 + lane % 8, k / kChunk + lane / 8 % 2));
        const uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
        simt::mma_m16n8k16<T>(acc_[2 * j], a, first);
        simt::mma_m16n8k16<T>(acc_[2 * j + 1], a, second);
      }
    } else {
      const int line = lane / 4, pair = lane % 4 * 2;
      uint32_t high[4], low[4];
      UNROLL
      for (int r = 0; r < 4; ++r)
        split_at(s_a, f0 + r % 2 * 8 + line, k + r / 2 * 8 + pair, high[r], low[r]);
      UNROLL
      for (int j = 0; j < kRows / 8; ++j) {
        uint32_t b_high[2], b_low[2];
        UNROLL
        for (int r = 0; r < 2; ++r)
          split_at(s_b, j * 8 + line, k + r * 8 + pair, b_high[r], b_low[r]);
        simt::mma_m16n8k16<simt::bf16>(acc_[j], low, b_high);
        simt::mma_m16n8k16<simt::bf16>(acc_[j], high, b_low);
        simt::mma_m16n8k16<simt::bf16>(acc_[j], high, b_high);
      }
    }
  }

  using Fragments<kR>::acc_;
};

// The same of many rows.
template <class T>
class WideTile {
 public:
  using Type = T;
  using Left = T;
  static constexpr int kFeatures = mma::kSide, kRows = mma::kSide, kThreads = mma::kThreads;
  static constexpr int kChunk = mma::Tile<T>::kChunk;
  static constexpr int kSharedBytes = mma::Tile<T>::kSharedBytes;
  static constexpr int kBlocks = sizeof(T) == 2 ? 2 : 1;
  static_assert(kSharedBytes >= kFeatures * kRows * 4);

  DEVICE void clear() { tile_.clear(); }
  template <class F>
  DEVICE void each(F f) {
    tile_.each(f);
  }
  template <class A, class B>
  DEVICE void multiply(int depth, const A& a, const B& b, T* s_stages) {
    tile_.template multiply<simt::Major::kK, simt::Major::kK>(depth, a, b, s_stages);
  }

 private:
  mma::Tile<T> tile_;
};

// Where the lines of both operands begin, null for zeros, behind the stages of a tile: addresses that are computed once
// leave the registers to the sums.
template <class Tile>
struct Lines {
  using T = typename Tile::Type;
  using Left = typename Tile::Left;
  static constexpr int kCount = Tile::kFeatures + Tile::kRows;
  static constexpr int kSharedBytes = Tile::kSharedBytes + kCount * 8;

  // All threads of the block; a(line) of a feature, b(line) of a row.
  template <class A, class B>
  DEVICE static void multiply(Tile& tile, int depth, const A& a, const B& b) {
    const Left** s_a = simt::shared<const Left*>(Tile::kSharedBytes);
    const T** s_b = simt::shared<const T*>(Tile::kSharedBytes + Tile::kFeatures * 8);
    for (int i = simt::thread_idx(); i < kCount; i += Tile::kThreads) {
      if (i < Tile::kFeatures)
        s_a[i] = a(i);
      else
        s_b[i - Tile::kFeatures] = b(i - Tile::kFeatures);
    }
    simt::sync_block();
    const auto at = [depth](const auto* line, int k) {
      return line && k < depth ? line + k : nullptr;
    };
    tile.multiply(
        depth, [&](int line, int k) { return at(s_a[line], k); },
        [&](int line, int k) { return at(s_b[line], k); }, simt::shared<T>());
  }
};

// f(tile) with the tile for n rows; `features` of a narrow weight, whose blocks would be too few for the device.
template <class T, class F>
void by_rows(int64_t n, int64_t features, F f) {
  const bool narrow = ceil_div(features, 128) * 2 < simt::device().multiprocessors;
  if (n > 64) return f(std::type_identity<WideTile<T>>{});
  if (n > 16) {
    if (narrow) return f(std::type_identity<FeatureTile<T, 32, 64>>{});
    return f(std::type_identity<FeatureTile<T, 128, 64>>{});
  }
  if (narrow) return f(std::type_identity<FeatureTile<T, 32, 16>>{});
  return f(std::type_identity<FeatureTile<T, 128, 16>>{});
}

}  // namespace gemma_ext::depth_batching::cuda
