// SPDX-License-Identifier: Apache-2.0
#include "kernels/mma.h"

#include "check.h"

using check::expect_error;
using check::failures;

namespace {

template <class T>
void mma_matches(void (*kernel)(MmaParams<T>)) {
  const std::vector<T> a = check::values<T>(16 * 16, 1), b = check::values<T>(16 * 8, 2);
  std::vector<float> c(16 * 8);
  for (size_t i = 0; i < c.size(); ++i) c[i] = 0.5f * i;
  simt::launch(kernel, 1, 32, 0, nullptr, {a.data(), b.data(), c.data()});
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < 8; ++n) {
      double sum = 0.5 * (8 * m + n);
      for (int k = 0; k < 16; ++k) {
        sum += static_cast<double>(simt::to_float(a[16 * m + k])) * simt::to_float(b[8 * k + n]);
      }
      EXPECT(c[8 * m + n] == sum);
    }
  }
}

bool gemm_matches(void (*kernel)(GemmParams)) {
  const int depth = 80;
  const std::vector<simt::bf16> a = check::values<simt::bf16>(32 * depth, 1);
  const std::vector<simt::bf16> b = check::values<simt::bf16>(depth * 16, 2);
  std::vector<float> c(32 * 16);
  simt::launch(kernel, 1, 64, 2 * 768 * 2, nullptr, {a.data(), b.data(), c.data(), depth});
  for (int m = 0; m < 32; ++m) {
    for (int n = 0; n < 16; ++n) {
      double sum = 0;
      for (int k = 0; k < depth; ++k) {
        sum +=
            static_cast<double>(simt::to_float(a[depth * m + k])) * simt::to_float(b[16 * k + n]);
      }
      if (c[16 * m + n] != sum) return false;
    }
  }
  return true;
}

}  // namespace

CASE(mma_bf16) { mma_matches(mma_bf16_kernel); }
CASE(mma_f16) { mma_matches(mma_f16_kernel); }

// "Each thread in a warp loads fragments of a row": thread t holds elements 2 * (t % 4) and the next
// of row t / 4, of matrix i in register i.
CASE(ldmatrix) {
  std::vector<uint16_t> in(32 * 8);
  for (int i = 0; i < 256; ++i) in[i] = static_cast<uint16_t>(0x4000 + i);
  std::vector<uint32_t> out(2 * 7 * 32);
  simt::launch(ldmatrix_kernel, 1, 32, 512, nullptr, {in.data(), out.data()});
  const int matrix[7] = {0, 0, 1, 0, 1, 2, 3};
  for (int i = 0; i < 7; ++i) {
    for (int t = 0; t < 32; ++t) {
      const uint16_t* m = in.data() + 64 * matrix[i];
      const int r = t / 4, c = 2 * (t % 4);
      EXPECT(out[32 * i + t] == (m[8 * r + c] | static_cast<uint32_t>(m[8 * r + c + 1]) << 16));
      EXPECT(out[32 * (7 + i) + t] ==
             (m[8 * c + r] | static_cast<uint32_t>(m[8 * (c + 1) + r]) << 16));
    }
  }
}

CASE(ldmatrix_misaligned) {
  std::vector<uint32_t> out(32);
  expect_error(
      [&] {
        simt::launch(ldmatrix_misaligned_kernel, 1, 32, 1024, nullptr, {nullptr, out.data()});
      },
      {"ldmatrix", "multiple of 16"});
}

CASE(cp_async_zero_fill) {
  std::vector<float> in(128), out(128, -1.0f);
  for (int i = 0; i < 128; ++i) in[i] = i + 1.0f;
  const auto run = [&] {
    simt::launch(zero_fill_kernel, 1, 32, 512, nullptr, {in.data(), out.data()});
    for (int i = 0; i < 128; ++i) EXPECT(out[i] == (i % 4 < (i / 4) % 5 ? in[i] : 0.0f));
    return true;
  };
  EXPECT(failures(3, run) == 0);
}

CASE(gemm) {
  EXPECT(failures(9, [] { return gemm_matches(gemm_kernel); }) == 0);
}
CASE(gemm_without_wait) {
  EXPECT(failures(9, [] { return gemm_matches(gemm_without_wait_kernel); }) > 0);
}
// A third of all schedules find one of these two: half of the two strict kinds, few uniform ones.
CASE(gemm_without_barrier) {
  EXPECT(failures(18, [] { return gemm_matches(gemm_without_barrier_kernel); }) > 0);
}
CASE(gemm_with_early_reuse) {
  EXPECT(failures(18, [] { return gemm_matches(gemm_with_early_reuse_kernel); }) > 0);
}
