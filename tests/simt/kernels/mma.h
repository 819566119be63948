// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/simt/simt.h"

template <class T>
struct MmaParams {
  const T* a;  // [16, 16] row-major
  const T* b;  // [16, 8] row-major
  float* c;    // [16, 8] row-major, added to
};

// Indices as in the PTX ISA, "Matrix Fragments for mma.m16n8k16".
template <class T>
DEVICE void mma(const MmaParams<T>& p) {
  const int group = simt::lane_idx() >> 2, in_group = simt::lane_idx() % 4;
  uint32_t a[4], b[2];
  float c[4];
  for (int i = 0; i < 8; i += 2) {
    const int row = (i < 2 || (4 <= i && i < 6)) ? group : group + 8;
    const int column = i < 4 ? in_group * 2 + (i & 1) : in_group * 2 + (i & 1) + 8;
    a[i / 2] = *reinterpret_cast<const uint32_t*>(p.a + 16 * row + column);
  }
  for (int i = 0; i < 4; i += 2) {
    const int row = i < 2 ? in_group * 2 : in_group * 2 + 8;
    b[i / 2] = p.b[8 * row + group].bits | static_cast<uint32_t>(p.b[8 * (row + 1) + group].bits)
                                               << 16;
  }
  for (int i = 0; i < 4; ++i) {
    c[i] = p.c[8 * (i < 2 ? group : group + 8) + in_group * 2 + (i & 1)];
  }
  simt::mma_m16n8k16<T>(c, a, b);
  for (int i = 0; i < 4; ++i) {
    p.c[8 * (i < 2 ? group : group + 8) + in_group * 2 + (i & 1)] = c[i];
  }
}
KERNEL void mma_bf16_kernel(MmaParams<simt::bf16> p) { mma(p); }
KERNEL void mma_f16_kernel(MmaParams<simt::f16> p) { mma(p); }

struct MatrixParams {
  const uint16_t* in;  // [32, 8]: four 8x8 matrices
  uint32_t* out;       // [2, 7, 32]: registers of x1, x2, x4; plain, then transposed
};

KERNEL void ldmatrix_kernel(MatrixParams p) {
  uint16_t* s_rows = simt::shared<uint16_t>();
  const int lane = simt::lane_idx();
  for (int i = 0; i < 8; ++i) s_rows[8 * lane + i] = p.in[8 * lane + i];
  simt::sync_warp();
  const uint16_t* row = s_rows + 8 * lane;
  uint32_t r[14][1], r2[2][2], r4[2][4];
  simt::ldmatrix(r[0], row);
  simt::ldmatrix(r2[0], row);
  simt::ldmatrix(r4[0], row);
  simt::ldmatrix_trans(r[7], row);
  simt::ldmatrix_trans(r2[1], row);
  simt::ldmatrix_trans(r4[1], row);
  for (int t = 0; t < 2; ++t) {
    for (int i = 0; i < 2; ++i) r[7 * t + 1 + i][0] = r2[t][i];
    for (int i = 0; i < 4; ++i) r[7 * t + 3 + i][0] = r4[t][i];
  }
  for (int i = 0; i < 14; ++i) p.out[32 * i + lane] = r[i][0];
}

KERNEL void ldmatrix_misaligned_kernel(MatrixParams p) {
  uint32_t r[1];
  simt::ldmatrix(r, simt::shared<uint8_t>() + 16 * simt::lane_idx() + 8);
  p.out[simt::lane_idx()] = r[0];
}

struct CopyParams {
  const float* in;  // [32, 4]
  float* out;       // [32, 4]
};

// Lane l copies l % 5 of four floats; the others must come out as zero.
KERNEL void zero_fill_kernel(CopyParams p) {
  float* s_line = simt::shared<float>() + 4 * simt::lane_idx();
  simt::cp_async(s_line, p.in + 4 * simt::lane_idx(), 4 * (simt::lane_idx() % 5));
  simt::cp_async_commit();
  simt::cp_async_wait<0>();
  for (int i = 0; i < 4; ++i) p.out[4 * simt::lane_idx() + i] = s_line[i];
}

struct GemmParams {
  const simt::bf16* a;  // [32, depth] row-major
  const simt::bf16* b;  // [depth, 16] row-major
  float* c;             // [32, 16] row-major
  int depth;            // multiple of 16
};

enum class Mistake { kNone, kNoWait, kNoBarrierAfterWait, kNoBarrierBeforeReuse };

// c = a @ b with two warps, one row block of 16 each, and two stages of k = 16 filled by cp.async.
template <Mistake kMistake>
DEVICE void gemm(const GemmParams& p) {
  constexpr int kA = 32 * 16, kStage = kA + 16 * 16;
  simt::bf16* s = simt::shared<simt::bf16>();
  const int t = simt::thread_idx(), lane = simt::lane_idx(), steps = p.depth / 16;
  const auto fill = [&](int step) {
    simt::bf16* s_a = s + (step % 2) * kStage;
    simt::bf16* s_b = s_a + kA;
    simt::cp_async(s_a + 8 * t, p.a + (t / 2) * p.depth + 16 * step + 8 * (t % 2));
    if (t < 32) simt::cp_async(s_b + 8 * t, p.b + (16 * step + t / 2) * 16 + 8 * (t % 2));
    simt::cp_async_commit();
  };
  float c[2][4] = {};
  fill(0);
  for (int step = 0; step < steps; ++step) {
    if (step + 1 < steps) {
      fill(step + 1);
      if (kMistake != Mistake::kNoWait) simt::cp_async_wait<1>();
    } else {
      simt::cp_async_wait<0>();
    }
    if (kMistake != Mistake::kNoBarrierAfterWait) simt::sync_block();
    const simt::bf16* s_a = s + (step % 2) * kStage;
    const simt::bf16* s_b = s_a + kA;
    uint32_t a[4], b[4];
    simt::ldmatrix(a, s_a + (16 * simt::warp_idx() + lane % 16) * 16 + 8 * (lane / 16));
    simt::ldmatrix_trans(b, s_b + (lane % 16) * 16 + 8 * (lane / 16));
    const uint32_t left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
    simt::mma_m16n8k16<simt::bf16>(c[0], a, left);
    simt::mma_m16n8k16<simt::bf16>(c[1], a, right);
    if (kMistake != Mistake::kNoBarrierBeforeReuse) simt::sync_block();
  }
  for (int j = 0; j < 2; ++j) {
    for (int i = 0; i < 4; ++i) {
      const int row = 16 * simt::warp_idx() + lane / 4 + 8 * (i / 2);
      p.c[16 * row + 8 * j + 2 * (lane % 4) + i % 2] = c[j][i];
    }
  }
}
KERNEL void gemm_kernel(GemmParams p) { gemm<Mistake::kNone>(p); }
KERNEL void gemm_without_wait_kernel(GemmParams p) { gemm<Mistake::kNoWait>(p); }
KERNEL void gemm_without_barrier_kernel(GemmParams p) { gemm<Mistake::kNoBarrierAfterWait>(p); }
KERNEL void gemm_with_early_reuse_kernel(GemmParams p) { gemm<Mistake::kNoBarrierBeforeReuse>(p); }
