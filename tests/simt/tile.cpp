// SPDX-License-Identifier: Apache-2.0
#include "kernels/tile.h"

#include <cmath>

#include "check.h"

namespace {

template <class T>
float widen(T x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else {
    return simt::to_float(x);
  }
}

// Exact in 16 bits; float values need both bf16 halves.
template <class T>
T value(int i) {
  if constexpr (std::is_same_v<T, float>) {
    return check::small_value(i) + check::small_value(i + 31) / 512.0f;
  } else {
    return simt::from_float<T>(check::small_value(i));
  }
}

template <class T, Major kA, Major kB>
void matches(int m, int n, int k) {
  const int chunk = 16 / sizeof(T);
  const auto padded = [&](int x) { return (x + chunk - 1) / chunk * chunk; };
  const int a_stride = padded(kA == Major::kK ? k : m), b_stride = padded(kB == Major::kK ? k : n);
  std::vector<T> a(a_stride * (kA == Major::kK ? m : k)), b(b_stride * (kB == Major::kK ? n : k));
  const auto a_at = [&](int i, int j) -> T& {
    return a[kA == Major::kK ? i * a_stride + j : j * a_stride + i];
  };
  const auto b_at = [&](int i, int j) -> T& {
    return b[kB == Major::kK ? i * b_stride + j : j * b_stride + i];
  };
  for (int j = 0; j < k; ++j) {
    for (int i = 0; i < m; ++i) a_at(i, j) = value<T>(i * k + j);
    for (int i = 0; i < n; ++i) b_at(i, j) = value<T>(7 * (i * k + j) + 3);
  }
  std::vector<float> c(m * n, -1.0f);
  simt::launch(tile_kernel<T, kA, kB>, 1, gemma_ext::mma::kThreads,
               gemma_ext::mma::Tile<T>::kSharedBytes, nullptr,
               {a.data(), b.data(), c.data(), m, n, k, a_stride, b_stride});
  for (int i = 0; i < m; ++i) {
    for (int j = 0; j < n; ++j) {
      double sum = 0, size = 0;
      for (int d = 0; d < k; ++d) {
        const double x = 2.0 * widen(a_at(i, d)) * widen(b_at(j, d));
        sum += x;
        size += std::fabs(x);
      }
      const double bound = std::is_same_v<T, float> ? size * 0x1p-15 : 0;
      EXPECT(std::fabs(c[i * n + j] - sum) <= bound);
    }
  }
}

template <class T>
void all_majors() {
  matches<T, Major::kK, Major::kK>(128, 128, 200);
  matches<T, Major::kMn, Major::kK>(99, 128, 40);
  matches<T, Major::kMn, Major::kMn>(128, 72, 33);
  matches<T, Major::kK, Major::kMn>(1, 127, 16);
}

}  // namespace

CASE(tile_bf16) { all_majors<simt::bf16>(); }
CASE(tile_f16) { all_majors<simt::f16>(); }
CASE(tile_float) { all_majors<float>(); }
CASE(tile_of_nothing) { matches<simt::bf16, Major::kK, Major::kK>(3, 5, 0); }
