// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/simt/simt.h"

using simt::Major;

struct ProductParams {
  simt::TensorMap a;  // 128B swizzle, box 64 x 64
  simt::TensorMap b;  // 128B swizzle, box 64 x kN (K-major) or 64 x 64 (MN-major)
  float* c;           // [64, kN] row-major
  int steps;          // of 64 along k
};

template <int kN>
constexpr int kStageBytes = 64 * 128 + kN * 128;

enum class Fault { kNone, kNoFence, kNoWait, kEarlyRelease };

// c = a @ b: warpgroup 0 loads into two stages, warpgroup 1 multiplies and releases a stage when the
// next one's products are under way.
template <class T, int kN, Major kA, Major kB, Fault kFault = Fault::kNone>
DEVICE void product(const ProductParams& p) {
  uint8_t* s = simt::shared<uint8_t>();
  simt::Mbarrier* s_full = simt::shared<simt::Mbarrier>(2 * kStageBytes<kN>);
  simt::Mbarrier* s_empty = s_full + 2;
  if (simt::thread_idx() == 0) {
    for (int i = 0; i < 2; ++i) {
      simt::mbarrier_init(s_full + i, 1);
      simt::mbarrier_init(s_empty + i, 128);
    }
    simt::fence_mbarrier_init();
  }
  simt::sync_block();
  if (simt::warp_idx() < 4) {
    simt::setmaxnreg_dec<40>();
    if (simt::thread_idx() != 0) return;
    for (int i = 0; i < p.steps; ++i) {
      uint8_t* s_a = s + (i % 2) * kStageBytes<kN>;
      uint8_t* s_b = s_a + 64 * 128;
      simt::Mbarrier* full = s_full + i % 2;
      simt::mbarrier_wait(s_empty + i % 2, (i / 2) % 2 ^ 1);
      simt::mbarrier_arrive_expect_tx(full, kStageBytes<kN>);
      if (kA == Major::kK) {
        simt::tma_load(s_a, p.a, full, 64 * i, 0);
      } else {
        simt::tma_load(s_a, p.a, full, 0, 64 * i);
      }
      if (kB == Major::kK) {
        simt::tma_load(s_b, p.b, full, 64 * i, 0);
      } else {
        for (int n = 0; n < kN; n += 64) simt::tma_load(s_b + n * 128, p.b, full, n, 64 * i);
      }
    }
    return;
  }
  simt::setmaxnreg_inc<232>();
  float d[kN / 2];
  for (int i = 0; i < p.steps; ++i) {
    const uint8_t* s_a = s + (i % 2) * kStageBytes<kN>;
    // MN-major: atoms of 64 elements are 64 rows of k apart; one step of 16 k is 16 rows of 128 bytes
    const uint64_t a = simt::wgmma_descriptor(s_a, 8192, 1024);
    const uint64_t b = simt::wgmma_descriptor(s_a + 64 * 128, 8192, 1024);
    simt::mbarrier_wait(s_full + i % 2, (i / 2) % 2);
    if (kFault != Fault::kNoFence) simt::wgmma_fence();
    UNROLL
    for (int k = 0; k < 4; ++k) {
      const int step_a = kA == Major::kK ? 32 : 2048, step_b = kB == Major::kK ? 32 : 2048;
      simt::wgmma<T, kN, kA, kB>(d, a + k * step_a / 16, b + k * step_b / 16, i > 0 || k > 0);
    }
    simt::wgmma_commit();
    if (kFault == Fault::kEarlyRelease) {
      simt::mbarrier_arrive(s_empty + i % 2);
    } else if (i > 0) {
      simt::wgmma_wait<1>();
      simt::mbarrier_arrive(s_empty + (i - 1) % 2);
    }
  }
  if (kFault != Fault::kNoWait) simt::wgmma_wait<0>();
  const int lane = simt::lane_idx(), warp = simt::warp_idx() - 4;
  UNROLL
  for (int i = 0; i < kN / 2; ++i) {
    const int row = 16 * warp + lane / 4 + 8 * ((i / 2) % 2), column = 8 * (i / 4) + lane % 4 * 2;
    p.c[row * kN + column + i % 2] = d[i];
  }
}

#define PRODUCT(name, type, n, a, b)                                     \
  KERNEL_BOUNDS(256, 1) void name(const GRID_CONSTANT ProductParams p) { \
    product<simt::type, n, Major::a, Major::b>(p);                       \
  }
PRODUCT(product_64_kernel, bf16, 64, kK, kK)
PRODUCT(product_128_kernel, bf16, 128, kK, kK)
PRODUCT(product_192_kernel, bf16, 192, kK, kK)
PRODUCT(product_256_kernel, bf16, 256, kK, kK)
PRODUCT(product_f16_kernel, f16, 128, kK, kK)
PRODUCT(product_a_mn_kernel, bf16, 64, kMn, kK)
PRODUCT(product_b_mn_kernel, bf16, 192, kK, kMn)
PRODUCT(product_mn_kernel, f16, 128, kMn, kMn)

// ptxas warns of some of these mistakes, with code that is slow but right
#if !defined(__CUDACC__)
template <Fault kFault>
KERNEL void faulty_product_kernel(ProductParams p) {
  product<simt::bf16, 64, Major::kK, Major::kK, kFault>(p);
}
#endif

struct StoreParams {
  const uint32_t* in;  // [4, 32]: registers of x4
  uint16_t* out;       // [2, 32, 8]: four matrices; plain, then transposed
};

KERNEL void stmatrix_kernel(StoreParams p) {
  uint16_t* s = simt::shared<uint16_t>();
  const int lane = simt::lane_idx();
  uint32_t r[4];
  for (int i = 0; i < 4; ++i) r[i] = p.in[32 * i + lane];
  simt::stmatrix(s + 8 * lane, r);
  simt::stmatrix_trans(s + 256 + 8 * lane, r);
  simt::sync_warp();
  for (int i = lane; i < 512; i += 32) p.out[i] = s[i];
}
