// SPDX-License-Identifier: Apache-2.0
#include "kernels/wgmma.h"

#include "check.h"

using check::expect_error;
using check::failures;
using simt::Swizzle;

namespace {

// K-major operands are [64, depth] and [n, depth], MN-major ones [depth, 64] and [depth, n].
template <class T>
bool multiplies(void (*kernel)(ProductParams), int n, Major major_a, Major major_b) {
  const int depth = 136, steps = 3;  // the last step lies mostly outside
  const std::vector<T> a = check::values<T>(64 * depth, 1), b = check::values<T>(n * depth, 2);
  std::vector<float> c(64 * n, -1.0f);
  ProductParams p;
  p.c = c.data();
  p.steps = steps;
  const auto map = [&](simt::TensorMap* to, const T* x, int mn, int box, Major major) {
    if (major == Major::kK) {
      simt::make_tensor_map<T, 2>(to, x, {depth, mn}, {depth * 2}, {64, box}, Swizzle::k128B);
    } else {
      simt::make_tensor_map<T, 2>(to, x, {mn, depth}, {mn * 2}, {64, 64}, Swizzle::k128B);
    }
  };
  map(&p.a, a.data(), 64, 64, major_a);
  map(&p.b, b.data(), n, n, major_b);
  const int shared = 2 * (64 + n) * 128 + 4 * sizeof(simt::Mbarrier);
  simt::launch(kernel, 1, 256, shared, nullptr, p);
  for (int i = 0; i < 64; ++i) {
    for (int j = 0; j < n; ++j) {
      double sum = 0;
      for (int k = 0; k < depth; ++k) {
        const T x = a[major_a == Major::kK ? depth * i + k : 64 * k + i];
        const T y = b[major_b == Major::kK ? depth * j + k : n * k + j];
        sum += static_cast<double>(simt::to_float(x)) * simt::to_float(y);
      }
      if (c[n * i + j] != sum) return false;
    }
  }
  return true;
}

template <Fault kFault>
bool faulty() {
  return multiplies<simt::bf16>(faulty_product_kernel<kFault>, 64, Major::kK, Major::kK);
}

}  // namespace

CASE(wgmma_64) { EXPECT(multiplies<simt::bf16>(product_64_kernel, 64, Major::kK, Major::kK)); }
CASE(wgmma_128) { EXPECT(multiplies<simt::bf16>(product_128_kernel, 128, Major::kK, Major::kK)); }
CASE(wgmma_192) { EXPECT(multiplies<simt::bf16>(product_192_kernel, 192, Major::kK, Major::kK)); }
CASE(wgmma_256) { EXPECT(multiplies<simt::bf16>(product_256_kernel, 256, Major::kK, Major::kK)); }
CASE(wgmma_f16) { EXPECT(multiplies<simt::f16>(product_f16_kernel, 128, Major::kK, Major::kK)); }
CASE(wgmma_a_mn) { EXPECT(multiplies<simt::bf16>(product_a_mn_kernel, 64, Major::kMn, Major::kK)); }
CASE(wgmma_b_mn) {
  EXPECT(multiplies<simt::bf16>(product_b_mn_kernel, 192, Major::kK, Major::kMn));
}
CASE(wgmma_mn) { EXPECT(multiplies<simt::f16>(product_mn_kernel, 128, Major::kMn, Major::kMn)); }

CASE(wgmma_no_fault) { EXPECT(failures(6, faulty<Fault::kNone>) == 0); }
CASE(wgmma_early_release) { EXPECT(failures(6, faulty<Fault::kEarlyRelease>) > 0); }
CASE(wgmma_no_fence) {
  expect_error([] { faulty<Fault::kNoFence>(); }, {"wgmma at wgmma.h", "no wgmma_fence"});
}
CASE(wgmma_no_wait) {
  expect_error([] { faulty<Fault::kNoWait>(); }, {"a wgmma of the warp is in flight"});
}

// The layout of ldmatrix, the other way.
CASE(stmatrix) {
  std::vector<uint32_t> in(128);
  for (int i = 0; i < 128; ++i) in[i] = (2 * i + 1) << 16 | 2 * i;
  std::vector<uint16_t> out(512);
  simt::launch(stmatrix_kernel, 1, 32, 1024, nullptr, {in.data(), out.data()});
  for (int m = 0; m < 4; ++m) {
    for (int t = 0; t < 32; ++t) {
      for (int i = 0; i < 2; ++i) {
        const int r = t / 4, c = 2 * (t % 4) + i, value = 2 * (32 * m + t) + i;
        EXPECT(out[64 * m + 8 * r + c] == value);
        EXPECT(out[256 + 64 * m + 8 * c + r] == value);
      }
    }
  }
}
