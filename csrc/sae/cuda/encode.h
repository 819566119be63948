// SPDX-License-Identifier: Apache-2.0
// Launches of an encoder's products with what is done to them: by wgmma where the card has it, else by mma.sync.
#pragma once

#include "sm90/products.cuh"

namespace gemma_ext::sae::cuda {

template <class T, class Params, class Visitor>
KERNEL_BOUNDS(mma::kThreads, sizeof(T) == 2 ? 2 : 1)
void encode_kernel(Params p) {
  encode_by_mma<T, Params, Visitor>(p);
}

template <class T, class Params, class Visitor>
KERNEL_BOUNDS(wgmma::kThreads, 1)
void encode_wgmma_kernel(const GRID_CONSTANT TmaParams<Params> p) {
#if defined(SIMT_HOPPER)
  encode_by_wgmma<T, Params, Visitor>(p);
#endif
}

// Columns of a tile of the engine that an encoder gets.
inline int tile_columns(const Encoder& e) { return by_wgmma(e) ? wgmma::kColumns : mma::kSide; }
// A multiple of both.
constexpr int kTileColumns = wgmma::kColumns;

// Features from..to - 1; both multiples of kTileColumns, or `to` is F. kShared: bytes that Visitor wants, at most
// those of the stages of mma.sync.
template <class Visitor, int kShared, class Params>
void add_encode(Launches& launches, Params p, const Encoder& e, int64_t from, int64_t to) {
  if (from >= to || e.N == 0) return;
  const int columns = tile_columns(e);
  p.encode = {e, static_cast<int>(from / columns), static_cast<int>(ceil_div(to - from, columns)),
              static_cast<int>(ceil_div(e.N, kBlockRows))};
  by_dtype(e.dtype, [&](auto type) {
    using T = decltype(type);
    static_assert(kShared <= mma::Tile<T>::kSharedBytes);
    if constexpr (!std::is_same_v<T, float>) {
      if (by_wgmma(e)) {
        constexpr simt::Major kK = simt::Major::kK;
        TmaParams<Params> tma{p, {}, {}};
        launches.check(wgmma::make_map<T, kK>(&tma.x, e.x, e.N, e.D, e.x_stride));
        launches.check(wgmma::make_map<T, kK>(&tma.weight, e.weight, e.F, e.D, e.weight_stride));
        const int64_t pairs = ceil_div(e.N, wgmma::kCluster * wgmma::kRows);
        return wgmma::add_wgmma(launches, encode_wgmma_kernel<T, Params, Visitor>,
                                pairs * p.encode.tiles, tma, kShared);
      }
    }
    launches.add(encode_kernel<T, Params, Visitor>, int64_t{p.encode.row_blocks} * p.encode.tiles,
                 mma::kThreads, mma::Tile<T>::kSharedBytes, p);
  });
}

}  // namespace gemma_ext::sae::cuda
