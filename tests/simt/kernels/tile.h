// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/cuda/tile_mma.h"

using simt::Major;

template <class T>
struct TileParams {
  const T* a;  // [m, k] (kK) or [k, m] (kMn), rows padded to a multiple of a chunk with zeros
  const T* b;  // [n, k] or [k, n], likewise
  float* c;    // [m, n]
  int m, n, k, a_stride, b_stride;
};

template <class T, Major kMajor>
DEVICE const T* chunk_of(const T* x, int stride, int lines, int length, int line, int at) {
  return line < lines && at < length ? x + static_cast<int64_t>(line) * stride + at : nullptr;
}

template <class T, Major kA, Major kB>
KERNEL_BOUNDS(gemma_ext::mma::kThreads, sizeof(T) == 2 ? 2 : 1)
void tile_kernel(TileParams<T> p) {
  const auto load = [&](auto major, const T* x, int stride, int count, int mn, int k) {
    constexpr Major kMajor = decltype(major)::value;
    return kMajor == Major::kK ? chunk_of<T, kMajor>(x, stride, count, p.k, mn, k)
                               : chunk_of<T, kMajor>(x, stride, p.k, count, k, mn);
  };
  const auto a = [&](int m, int k) {
    return load(std::integral_constant<Major, kA>(), p.a, p.a_stride, p.m, m, k);
  };
  const auto b = [&](int n, int k) {
    return load(std::integral_constant<Major, kB>(), p.b, p.b_stride, p.n, n, k);
  };
  gemma_ext::mma::Tile<T> tile;
  tile.clear();
  for (int twice = 0; twice < 2; ++twice) {  // reuses the shared memory, adds to the accumulators
    tile.template multiply<kA, kB>(p.k, a, b, simt::shared<T>());
  }
  tile.each([&](int row, int column, float x) {
    if (row < p.m && column < p.n) p.c[row * p.n + column] = x;
  });
}

#define TILE_KERNELS(T)                                                       \
  template KERNEL void tile_kernel<T, Major::kK, Major::kK>(TileParams<T>);   \
  template KERNEL void tile_kernel<T, Major::kMn, Major::kK>(TileParams<T>);  \
  template KERNEL void tile_kernel<T, Major::kMn, Major::kMn>(TileParams<T>); \
  template KERNEL void tile_kernel<T, Major::kK, Major::kMn>(TileParams<T>);
#if defined(__CUDACC__)
TILE_KERNELS(simt::bf16)
TILE_KERNELS(simt::f16)
TILE_KERNELS(float)
#endif
#undef TILE_KERNELS
