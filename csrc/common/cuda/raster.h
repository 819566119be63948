// SPDX-License-Identifier: Apache-2.0
// The order in which blocks take the tiles of a product.
#pragma once

#include "launches.h"

namespace gemma_ext::cuda {

// They walk the columns inside groups of 16 row blocks (2048 rows, 9 MB at a width of 2304 in bf16), which stay in
// L2 while the other operand passes once per group.
constexpr int kRasterRows = 16;

struct Raster {
  int row_block, tile;
};
template <int kGroup>
DEVICE Raster raster(int item, int row_blocks, int tiles) {
  const int group = item / (kGroup * tiles), in_group = item - group * kGroup * tiles;
  const int width = lesser(kGroup, row_blocks - group * kGroup);
  return {group * kGroup + in_group % width, in_group / width};
}

}  // namespace gemma_ext::cuda
