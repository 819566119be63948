// SPDX-License-Identifier: Apache-2.0
// Matrix products of 128 x 256 tiles by wgmma, sm_90a:  acc[m, n] = sum_k a[m, k] b[n, k]
// A block is a producer warpgroup, whose elected thread issues TMA loads into a ring of stages, and two
// consumer warpgroups of 64 rows each, which keep their 64 x 256 fp32 accumulators in registers. The two
// blocks of a cluster work on the same b: each loads half of it for both.
//
//   wgmma::run<T, Major::kK, Major::kK>(a_map, b_map, items, steps,
//       [&](int item, int step) -> wgmma::Place { ... },
//       [&](int item, float (&acc)[128]) { ... });
//
// The clusters of the grid take turns over the items; all threads call. A Place says where the 64 k of a
// step begin in either operand, and its first m or n. A grid has at most as many blocks as the device has
// multiprocessors.
#pragma once

#include "launches.h"

namespace gemma_ext::wgmma {

constexpr int kRows = 128, kColumns = 256;
constexpr int kDepth = 64;
constexpr int kAtom = 64;  // elements of 128 bytes, what is swizzled together
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
constexpr int kEightLines = 8 * kLine;
constexpr int kBox = kDepth * kLine;  // of an operand along m or n

using simt::Major;

// Of a matrix whose rows are lines of one operand: boxes of 64 elements by 128 rows where k lies along the
// rows, by 64 rows where m or n does.
template <class T, Major kMajor>
simt::Status make_map(simt::TensorMap* map, const void* rows, int64_t count, int64_t width,
                      int64_t stride) {
  return simt::make_tensor_map<T, 2>(
      map, static_cast<const T*>(rows), {width, count}, {stride * static_cast<int64_t>(sizeof(T))},
      {kAtom, kMajor == Major::kK ? kRows : kDepth}, simt::Swizzle::k128B);
}

// A persistent grid for at most `items`; a device that runs sm_90a has at least one cluster. `more_shared` bytes lie
// behind those of the tiles.
template <class Params>
void add_wgmma(gemma_ext::cuda::Launches& launches, void (*kernel)(Params), int64_t items,
               const std::type_identity_t<Params>& params, int more_shared = 0) {
  const int64_t most = simt::device().multiprocessors / kCluster;
  launches.add_clusters(kernel, items < most ? items : most, kCluster, kThreads,
                        kSharedBytes + more_shared, params);
}

struct Place {
  int a_k, a_m, b_k, b_n;
};

// Register i of a consumer's acc is row_of(i / 2 % 2) of 128, column_of(i / 4, i % 2) of 256.
DEVICE int row_of(int half) {
  return (simt::warp_idx() - kWarpsPerGroup) * 16 + half * 8 + simt::lane_idx() / 4;
}
DEVICE int column_of(int block, int odd) { return block * 8 + simt::lane_idx() % 4 * 2 + odd; }
// The 64 elements of row_of(half): their register and their column.
constexpr int kRowElements = kColumns / 4;
HOST_DEVICE constexpr int element(int half, int i) { return i / 2 * 4 + half * 2 + i % 2; }
DEVICE int column(int i) { return column_of(i / 2, i % 2); }

#if defined(SIMT_HOPPER)
template <class T, Major kA, Major kB>
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

  // One thread. b_n..b_n + 255 for both blocks of the cluster, of which each loads half.
  template <class At>
  DEVICE void produce(const simt::TensorMap& a, const simt::TensorMap& b, int steps, const At& at) {
    constexpr uint16_t kBoth = 3;
    constexpr int kHalf = kColumns / kCluster;
    const int rank = simt::cluster_rank();
    for (int k = 0; k < steps; ++k) {
      const Place place = at(k);
      const int b_n = place.b_n + rank * kHalf;
      uint8_t* s_a = simt::shared<uint8_t>(stage_ * kStageBytes);
      uint8_t* s_b = s_a + kBytesA + rank * (kBytesB / kCluster);
      simt::Mbarrier* full = full_ + stage_;
      simt::mbarrier_wait(empty_ + stage_, phase_ ^ 1);  // released by the consumers of both blocks
      simt::mbarrier_arrive_expect_tx(full, kStageBytes);  // the peer's half is in it
      if constexpr (kA == Major::kK) {
        simt::tma_load(s_a, a, full, place.a_k, place.a_m);
      } else {
        UNROLL
        for (int m = 0; m < kRows; m += kAtom) {
          simt::tma_load(s_a + m * kLine, a, full, place.a_m + m, place.a_k);
        }
      }
      if constexpr (kB == Major::kK) {
        simt::tma_load_multicast(s_b, b, full, kBoth, place.b_k, b_n);
      } else {
        UNROLL
        for (int n = 0; n < kHalf; n += kAtom) {
          simt::tma_load_multicast(s_b + n * kLine, b, full, kBoth, b_n + n, place.b_k);
        }
      }
      advance();
    }
  }

  // All threads of a consumer warpgroup; steps > 0. The second starts kSkew steps after the first, so that each
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
      const uint64_t a = simt::wgmma_descriptor(s_a + group * kAtom * kLine, kBox, kEightLines);
      const uint64_t b = simt::wgmma_descriptor(s_a + kBytesA, kBox, kEightLines);
      simt::mbarrier_wait(full_ + stage_, phase_);
      simt::wgmma_fence();
      UNROLL
      for (int i = 0; i < kDepth / 16; ++i) {
        simt::wgmma<T, kColumns, kA, kB>(acc, a + i * kStepOf<kA>, b + i * kStepOf<kB>,
                                         k > 0 || i > 0);
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
    release(previous);
  }

  // No block may leave while its peer still writes to its memory or arrives at its barriers.
  DEVICE static void finish() {
    simt::sync_warp();
    simt::cluster_sync();
  }

 private:
  // From 16 k to the next 16, in units of a descriptor's address: 32 bytes of a line, or 16 lines.
  template <Major kMajor>
  static constexpr int kStepOf = (kMajor == Major::kK ? 32 : 16 * kLine) / 16;

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

template <class T, Major kA, Major kB, class At, class Epilogue>
DEVICE void run(const simt::TensorMap& a, const simt::TensorMap& b, int items, int steps,
                const At& at, const Epilogue& epilogue) {
  Tiles<T, kA, kB> tiles;
  const int first = simt::block_idx() / kCluster, stride = simt::grid_dim() / kCluster;
  // ptxas ignores setmaxnreg where the roles meet again
  if (tiles.is_producer()) {
    simt::setmaxnreg_dec<kProducerRegisters>();
    if (simt::warp_idx() == 0 && simt::elect_one()) {
      for (int item = first; item < items; item += stride) {
        tiles.produce(a, b, steps, [&](int k) { return at(item, k); });
      }
    }
  } else {
    simt::setmaxnreg_inc<kConsumerRegisters>();
    float acc[kColumns / 2];
    for (int item = first; item < items; item += stride) {
      tiles.consume(acc, steps);
      epilogue(item, acc);
    }
  }
  tiles.finish();
}
#endif

}  // namespace gemma_ext::wgmma
