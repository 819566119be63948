// SPDX-License-Identifier: Apache-2.0
// Sums in float64 in the order of contract.h: two warps to a block of positions, a thread to a strand.
#pragma once

#include "mask.cuh"

namespace gemma_ext::souping::cuda {

constexpr int kSumThreads = kStrands;
static_assert(kSumThreads == 2 * simt::kWarpSize);

// x_m - base; without a base x_m.
DEVICE double delta_at(const Chunk& k, int m, int64_t position, double base) {
  const double x = element(k.source(m), position);
  return k.based ? x - base : x;
}

DEVICE double shfl_down(double x, int lanes) {
  const Word bits = static_cast<Word>(__builtin_bit_cast(uint64_t, x));
  const unsigned low = simt::shfl_down(static_cast<unsigned>(bits), lanes);
  const unsigned high = simt::shfl_down(static_cast<unsigned>(bits >> 32), lanes);
  return __builtin_bit_cast(double, uint64_t{high} << 32 | low);
}

// The sum of 64 strands, of which a warp's lanes have one each of the lower and the upper half; to lane 0.
DEVICE double fold(double lower, double upper) {
  double sum = lower + upper;
  UNROLL
  for (int half = simt::kWarpSize / 2; half > 0; half /= 2) sum = sum + shfl_down(sum, half);
  return sum;
}

// The same of a block with a strand to each thread; to thread 0. `upper` is 32 doubles of shared memory; two barriers.
DEVICE double fold_block(double strand, double* upper) {
  simt::sync_block();
  if (simt::warp_idx() == 1) upper[simt::lane_idx()] = strand;
  simt::sync_block();
  return simt::warp_idx() == 0 ? fold(strand, upper[simt::lane_idx()]) : 0;
}

// strands += delta_i delta_j for i <= j of a thread's positions before `end`, from its first on.
template <int kM>
struct GramStrand {
  static constexpr int kSums = kM * (kM + 1) / 2;
  double sum[kSums];

  DEVICE void add(const Chunk& k, int64_t first, int64_t end) {
    UNROLL_BY(4)
    for (int64_t at = first; at < end; at += kStrands) {
      const double base = k.based ? element(k.base(), at) : 0;
      double d[kM];
      UNROLL
      for (int m = 0; m < kM; ++m) d[m] = m < k.models ? delta_at(k, m, at, base) : 0;
      UNROLL
      for (int i = 0, q = 0; i < kM; ++i) {
        UNROLL
        for (int j = i; j < kM; ++j, ++q) sum[q] = sum[q] + d[i] * d[j];
      }
    }
  }
};

// One pair, of any number of models.
DEVICE double pair_strand(const Chunk& k, int i, int j, int64_t first, int64_t end, double sum) {
  UNROLL_BY(4)
  for (int64_t at = first; at < end; at += kStrands) {
    const double base = k.based ? element(k.base(), at) : 0;
    sum = sum + delta_at(k, i, at, base) * delta_at(k, j, at, base);
  }
  return sum;
}

// f(q, i, j) for the pairs of `models`, q as in the sums of all; kM bounds them and unrolls.
template <int kM, class F>
DEVICE void each_pair(int models, F f) {
  if constexpr (kM > 0) {
    UNROLL
    for (int i = 0, own = 0; i < kM; ++i) {
      UNROLL
      for (int j = i; j < kM; ++j, ++own)
        if (j < models) f(i * models - i * (i - 1) / 2 + j - i, own, i, j);
    }
  } else {
    int q = 0;
    for (int i = 0; i < models; ++i)
      for (int j = i; j < models; ++j, ++q) f(q, 0, i, j);
  }
}

}  // namespace gemma_ext::souping::cuda
