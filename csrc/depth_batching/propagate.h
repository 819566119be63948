// SPDX-License-Identifier: Apache-2.0
// K and V of the loops that rows have skipped, from the hidden state that they left with: what an engine takes.
//   K, V of layer s at loop j > the row's  <-  R_pos norm(W_k x), W_v x,  x = norm(h)
// x, and what the products give, are rounded to the type of the pool.
#pragma once

#include "contract.h"
#include "linear.h"

namespace gemma_ext::depth_batching {

constexpr int kMostLayers = 32;  // of a call

struct DeeperLayer {
  const void* norm;     // [D], or [loops, D]
  int64_t norm_stride;  // from loop to loop; 0: one for all
  DType norm_type;
  Projection k, v;          // [heads * width, D]; a and b of every loop
  const int32_t* depth_of;  // [loops]
  const int32_t* rope_of;   // [loops], or null: setting 0
  Norm k_norm;
};

struct Propagate {
  const void* h;  // [n, D] in the type of the pool, rows h_stride elements apart
  int64_t h_stride, D;
  DeeperLayer layers[kMostLayers];
  int count;
  Pool pool;
  Places places;      // loop: the last that a row ran
  const float* rope;  // as RopeWrite has it
  int64_t settings, positions, half;
  float eps;  // of every norm
  bool plus_one;
  uint8_t* marks;  // [pages, 16], raised to loops; or null
};

// How many inputs, and results, a layer has for its loops: one for all, or one for each that can be skipped.
inline int64_t inputs_of(const DeeperLayer& layer, int64_t loops) {
  return layer.norm_stride ? loops - 1 : 1;
}
inline int64_t results_of(const DeeperLayer& layer, int64_t loops) {
  return layer.norm_stride || layer.k.rank || layer.v.rank ? loops - 1 : 1;
}

// A projection as loop j alone has it.
inline Projection at_loop(Projection p, int64_t j, DType type) {
  if (!p.rank) return p;
  const int64_t size = size_of(type);
  p.a = static_cast<const char*>(p.a) + j * p.rank * p.a_stride * size;
  p.b = static_cast<const char*>(p.b) + j * p.features * p.b_stride * size;
  return p;
}

// The write of a layer's K and V, but for their rows and loops.
inline RopeWrite write_of(const Propagate& c) {
  RopeWrite w{};
  w.pool = c.pool;
  w.places = c.places;
  w.rope = c.rope;
  w.settings = c.settings;
  w.positions = c.positions;
  w.half = c.half;
  w.eps = c.eps;
  w.plus_one = c.plus_one;
  w.marks = c.marks;
  return w;
}

}  // namespace gemma_ext::depth_batching
