// SPDX-License-Identifier: Apache-2.0
// Matrix products of 128 x 256 tiles by wgmma, sm_90a:  acc[m, n] = sum_k a[m, k] b[n, k], both K-major.
// A block is a producer warpgroup, whose elected thread issues TMA loads into a ring of stages, and two
// consumer warpgroups of 64 rows each, which keep their 64 x 256 fp32 accumulators in registers. The two
// blocks of a cluster work on the same b: each loads half of it for both.
//
//   wgmma::Tiles<T> tiles;                       // all threads
//   if (tiles.is_producer()) {
//     tiles.take_producer_registers();
//     ... one thread: tiles.produce(a_map, b_map, row, column, steps); ...
//   } else {
//     tiles.take_consumer_registers();
//     ... tiles.consume(acc, steps); ...
//   }
//   tiles.finish();                              // all threads
//
// Producer and consumers must go through the same sequence of products.
#pragma once

#include "simt/simt.h"

namespace gemma_ext::wgmma {

constexpr int kRows = 128, kColumns = 256;
constexpr int kDepth = 64;  // one swizzle atom of 128 bytes
constexpr int kStages = 4;
constexpr int kCluster = 2;
constexpr int kThreads = 384;
constexpr int kConsumers = 2, kWarpsPerGroup = 4;
constexpr int kSkew = 2, kSkewBarrier = 1;
constexpr int kLine = 128;  // bytes of a row in shared memory
constexpr int kBytesA = kRows * kLine, kBytesB = kColumns * kLine;
constexpr int kStageBytes = kBytesA + kBytesB;
constexpr int kSharedBytes = kStages * (kStageBytes + 2 * 8);
// 40 + 2 x 232 registers per thread column, of 512
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
constexpr int kAtomRows = 8 * kLine;  // between groups of 8 rows

// Boxes of both operands: 64 elements of k, 128 rows.
template <class T>
simt::Status make_map(simt::TensorMap* map, const void* rows, int64_t count, int64_t width,
                      int64_t stride) {
  return simt::make_tensor_map<T, 2>(map, static_cast<const T*>(rows), {width, count},
                                     {stride * static_cast<int64_t>(sizeof(T))}, {kDepth, kRows},
                                     simt::Swizzle::k128B);
}

#if defined(SIMT_HOPPER)
template <class T>
class Tiles {
 public:
  static_assert(sizeof(T) == 2);

  DEVICE Tiles()
      : full_(simt::shared<simt::Mbarrier>(kStages * kStageBytes)), empty_(full_ + kStages) {
    if (simt::thread_idx() == 0) {
      for (int i = 0; i < kStages; ++i) {
        simt::mbarrier_init(full_ + i, 1);
        simt::mbarrier_init(empty_ + i, kCluster * kConsumers * kWarpsPerGroup);
      }
      simt::fence_mbarrier_init();
    }
    simt::cluster_sync();
  }

  DEVICE static bool is_producer() { return simt::warp_idx() < kWarpsPerGroup; }
  // First in each role's branch: ptxas ignores them where the roles meet again.
  DEVICE static void take_producer_registers() { simt::setmaxnreg_dec<kProducerRegisters>(); }
  DEVICE static void take_consumer_registers() { simt::setmaxnreg_inc<kConsumerRegisters>(); }
  // Of the 64 rows of the calling consumer: register i of acc is row_of(i / 2 % 2),
  // column_of(i / 4, i % 2).
  DEVICE static int row_of(int half) {
    return (simt::warp_idx() - kWarpsPerGroup) * 16 + half * 8 + simt::lane_idx() / 4;
  }
  DEVICE static int column_of(int block, int odd) {
    return block * 8 + simt::lane_idx() % 4 * 2 + odd;
  }

  // One thread. Rows row..row + 127 of a for this block, columns column..column + 255 of b for both.
  DEVICE void produce(const simt::TensorMap& a, const simt::TensorMap& b, int row, int column,
                      int steps) {
    constexpr uint16_t kBoth = 3;
    const int rank = simt::cluster_rank();
    for (int k = 0; k < steps; ++k) {
      uint8_t* s_a = simt::shared<uint8_t>(stage_ * kStageBytes);
      uint8_t* s_b = s_a + kBytesA + rank * (kBytesB / kCluster);
      simt::mbarrier_wait(empty_ + stage_, phase_ ^ 1);  // released by the consumers of both blocks
      simt::mbarrier_arrive_expect_tx(full_ + stage_, kStageBytes);  // the peer's half is in it
      simt::tma_load(s_a, a, full_ + stage_, k * kDepth, row);
      simt::tma_load_multicast(s_b, b, full_ + stage_, kBoth, k * kDepth,
                               column + rank * (kColumns / kCluster));
      advance();
    }
  }

  // All threads of a consumer warpgroup. The second starts kSkew steps after the first, so that each
  // one's epilogue runs under the other's products.
  DEVICE void consume(float (&acc)[kColumns / 2], int steps) {
    const int group = simt::warp_idx() / kWarpsPerGroup - 1;
    const bool skewed = steps > kStages;  // else the first could come round again before the second
    int previous = -1;
    if (skewed && group == 1) simt::barrier_sync(kSkewBarrier, kConsumers * 128);
    for (int k = 0; k < steps; ++k) {
      if (skewed && group == 0 && k == kSkew) {
        simt::barrier_arrive(kSkewBarrier, kConsumers * 128);
      }
      const uint8_t* s_a = simt::shared<uint8_t>(stage_ * kStageBytes);
      const uint64_t a = simt::wgmma_descriptor(s_a + group * 64 * kLine, 0, kAtomRows);
      const uint64_t b = simt::wgmma_descriptor(s_a + kBytesA, 0, kAtomRows);
      simt::mbarrier_wait(full_ + stage_, phase_);
      simt::wgmma_fence();
      UNROLL
      for (int i = 0; i < kDepth / 16; ++i) {
        simt::wgmma<T, kColumns>(acc, a + i * 2, b + i * 2, k > 0 || i > 0);  // 32 bytes further
      }
      simt::wgmma_commit();
      if (previous >= 0) {  // one step's products stay in flight
        simt::wgmma_wait<1>();
        release(previous);
      }
      previous = stage_;
      advance();
    }
    simt::wgmma_wait<0>();
    if (previous >= 0) release(previous);
  }

  // No block may leave while its peer still writes to its memory or arrives at its barriers.
  DEVICE static void finish() {
    simt::sync_warp();
    simt::cluster_sync();
  }

 private:
  DEVICE void advance() {
    stage_ = stage_ + 1 == kStages ? 0 : stage_ + 1;
    phase_ ^= stage_ == 0;
  }
  DEVICE void release(int stage) {
    if (simt::lane_idx() < kCluster) simt::mbarrier_arrive_remote(empty_ + stage, simt::lane_idx());
  }

  simt::Mbarrier *full_, *empty_;
  int stage_ = 0, phase_ = 0;
};
#endif

}  // namespace gemma_ext::wgmma
