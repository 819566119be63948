// SPDX-License-Identifier: Apache-2.0
// The same by wgmma: tiles of 128 x 256, of which a warp holds 16 rows.
#pragma once

#include "common/cuda/tile_wgmma.h"
#include "sae/cuda/products.cuh"

namespace gemma_ext::sae::cuda {

inline bool by_wgmma(const Encoder& e) {
  return e.dtype != DType::kFloat32 && e.D > 0 && simt::device().hopper;
}

template <class Params>
struct TmaParams {
  Params params;
  simt::TensorMap x, weight;
};

#if defined(SIMT_HOPPER)
template <class T, class Params, class Visitor>
DEVICE void encode_by_wgmma(const TmaParams<Params>& p) {
  constexpr simt::Major kK = simt::Major::kK;
  constexpr int kPairRows = wgmma::kCluster * wgmma::kRows;
  const EncodeParams& q = p.params.encode;
  const int steps = static_cast<int>((q.encoder.D + wgmma::kDepth - 1) / wgmma::kDepth);
  const int pairs = static_cast<int>((q.encoder.N + kPairRows - 1) / kPairRows);
  const auto place = [&](int item) {
    Raster at = raster<kRasterRows / wgmma::kCluster>(item, pairs, q.tiles);
    at.row_block = at.row_block * kPairRows + simt::cluster_rank() * wgmma::kRows;
    at.tile = (q.first_tile + at.tile) * wgmma::kColumns;
    return at;
  };
  wgmma::run<T, kK, kK>(
      p.x, p.weight, pairs * q.tiles, steps,
      [&](int item, int step) -> wgmma::Place {
        const Raster at = place(item);
        const int k = step * wgmma::kDepth;
        return {k, at.row_block, k, at.tile};
      },
      [&](int item, float (&acc)[wgmma::kColumns / 2]) {
        const Raster at = place(item);
        Visitor visitor(p.params, at.row_block, at.tile, simt::shared<uint8_t>(wgmma::kSharedBytes),
                        simt::warp_idx() - wgmma::kWarpsPerGroup);
        const typename Visitor::Row rows[2] = {{visitor, wgmma::row_of(0)},
                                               {visitor, wgmma::row_of(1)}};
        UNROLL
        for (int g = 0; g < wgmma::kRowElements / kEight; ++g) {
          const int local = wgmma::column(g * kEight);
          const typename Visitor::Eight eight(visitor, {at.tile + local, local});
          UNROLL
          for (int half = 0; half < 2; ++half) {
            float x[kEight];
            UNROLL
            for (int i = 0; i < kEight; ++i) x[i] = acc[wgmma::element(half, g * kEight + i)];
            visitor.visit(eight, rows[half], x);
          }
        }
        visitor.end();
      });
}
#endif

}  // namespace gemma_ext::sae::cuda
