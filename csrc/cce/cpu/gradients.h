// SPDX-License-Identifier: Apache-2.0
// Gradients of a head from the strips that are drawn, whatever a strip's gradient is.
#pragma once

#include <functional>

#include "rows.h"

namespace gemma_ext::cce::cpu {

// The strips that are computed, tile by tile, rows ascending, and their weights.
struct Plan {
  std::vector<int64_t> begin;
  std::vector<int32_t> list;
  std::vector<float> weight;
};

struct Draw {
  const float* masses;  // [1 or, with q, 2; tiles, stride]
  int64_t stride;
  float tau;  // 0: every strip of the rows that have a scale
  int64_t seed;
  const float *lse, *scale;  // [n]
  const float *a, *q;        // [n], of the first plane and of the second; q may be null
};

// sampling.h
Plan draw(const Draw&, const Problem&, Workers&);

// Writes a strip's G, its share of dbias, and dC of the tile.
using GradTile = std::function<void(const GradTask&, int64_t tile, Scratch&)>;

// What `task` needs beside the plan is the caller's.
void add_gradients(const Problem&, const Plan&, GradTask task, const Gradients&, const GradTile&,
                   Workers&);

// What is left to compute: nothing where no row is valid. Other rows of dE become zero.
Gradients wanted(const ValidRows&, const Gradients&);

// de [n, kColumns] -> kColumns columns of the result.
void store_columns(const Problem&, const float* de, int64_t column, const Gradients&);

}  // namespace gemma_ext::cce::cpu
