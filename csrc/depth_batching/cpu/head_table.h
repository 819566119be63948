// SPDX-License-Identifier: Apache-2.0
// What of the head and of gates runs inside one task: the table that every instruction set has.
#pragma once

#include "../head.h"
#include "linear_table.h"

namespace gemma_ext::depth_batching {

// Tokens of a tile, which has sums of its own.
constexpr int64_t kTile = 256;

struct Candidate {
  float value;
  int32_t id;
};

// The best `wanted` of a row so far, among up to 2 wanted; what is not above `limit` is none of them.
struct BestList {
  Candidate* at;
  int64_t count, wanted;
  float limit;
  bool full;
};

// Leaves the best `wanted`, in no order.
void keep_best(BestList&) noexcept;

// Of one row and the tiles of one task, whose tokens come in ascending order.
struct Best {
  float value, second, score;  // score of the sample
  int32_t id, sample;          // -1: none yet
};

// Per tile and row, [tiles, n]: max s, sum exp(s - max), sum exp(s - max) (max - s), sum exp((s - max) / T).
struct TileSums {
  float *max, *sum, *below, *tempered;
};

struct HeadTask {
  const HeadExit* call;
  Packed x;
  TileSums sums;
  Best* best;       // [n]
  BestList* lists;  // [n], or null
};

struct ScreenTask {
  const Shortlist* call;
  Packed x;            // floats
  const float* norms;  // [n] of x, from above
  TileSums sums;       // of the upper bounds; `below` is sum exp(lower bound - max)
  BestList* lists;     // [n], by the upper bound of a
};

struct HeadKernels {
  int64_t (*packed_size)(DType);
  // x of a row as products with `type` take it; its norm where asked for
  void (*pack)(const Head&, int64_t row, const Packed&, Scratch&);
  float (*pack_wide)(const Head&, int64_t row, const Packed&, Scratch&);
  void (*tile)(const HeadTask&, int64_t tile, Scratch&);
  void (*noise)(const Noise&, int64_t row);
  void (*gate)(const Gate&, int64_t row);
  void (*screen)(const ScreenTask&, int64_t tile, Scratch&);
  // s of some tokens of a row, and a
  void (*exact)(const Head&, const Packed& x, int64_t row, const Candidate* ids, int64_t count,
                float* a, float* s);
  float (*capped)(const Head&, float a);
};

}  // namespace gemma_ext::depth_batching
