// SPDX-License-Identifier: Apache-2.0
// What runs inside one task: the table of the kernels that every instruction set has, and the plain
// structs they take.
#pragma once

#include "../../common/cpu/matrix.h"
#include "../../common/cpu/scratch.h"
#include "../divergence.h"

namespace gemma_ext::cce {

using gemma_ext::cpu::Matrix;
using gemma_ext::cpu::Scratch;

// Columns of D that one backward task owns; 4 slices of 32, and 2304 = 18 * 128.
constexpr int kColumns = 128;

// Tiles of one forward task: they share the loads of e, and 2 x 256 x 2304 x 2 B of packed C per
// worker are still small beside what 5 % of any logits worth cutting would take.
constexpr int64_t kForwardTiles = 2;

struct Problem {
  Matrix e;                   // [*, D]; rows named by `rows`
  Matrix c;                   // [V, D]
  const float* bias;          // [V] or null
  const int64_t* rows;        // [n] row of e of each valid token
  const int64_t* label;       // [n] its label, -1 where it has none in this vocabulary
  const float* class_weight;  // [V] or null: asks for the weighted logit sum
  int64_t n, V, D, tiles;
  LogitMap map;
  bool want_mean, want_argmax;
};

// Per strip, tile-major: [tiles, n]. Sums are relative to the strip's own maximum; all but class_sum and
// total are without the label's column.
struct StripStats {
  float* max;        // max s
  float* sum;        // sum exp(s - max)
  float* slope;      // sum exp(s - max) T ds/da, or null
  float* square;     // sum exp(2 (s - max)), or null
  float* weighted;   // sum exp(s - max) s, if want_mean
  float* class_sum;  // sum class_weight s, if class_weight
  int64_t* argmax;   // vocabulary id of the maximum, lowest on ties, if want_argmax
  float* target;     // [n] s at the label
  float* total;      // sum s with the label's column, or null
};

// G[n, v] = (w p (a + q (s - mean)) + class_coef w_v - b 1{v = label}) ds/da,  p = exp(s - lse - lse_low),
// with w the weight of the strip's draw; at_label is p a - b there.
struct RowCoefficients {
  const float *lse, *lse_low;
  const float* mean;  // null unless q
  const float *a, *at_label;
  const float* q;           // null: no gradient of the entropy
  const float* class_coef;  // null: no gradient of the weighted logit sum
};

struct GradTask {
  const Problem* problem;
  RowCoefficients coef;
  const int32_t* list;   // rows of the kept strips, tile by tile, ascending; null: every row
  const float* weight;   // of each entry of the list
  const int64_t* begin;  // [tiles + 1] into list
  int64_t slot0;         // list index of the first strip of this batch
  void* strips;          // [batch strips, kTile] gradients in the strip type
  void* dc;              // [V, D] contiguous in c.dtype, or null
  float* dc_sum;         // [V, D] fp32 running sum over row chunks, or null
  bool dc_accumulate;    // add to dc_sum (or to a float dc)
  float* dbias;          // [V] fp32, or null
};

// Two heads over the same rows and labels.
struct ProblemPair {
  const Problem *student, *teacher;
  Kind kind;
  float beta;
};

// Per strip, tile-major: [tiles, n]; the sums without the label's column.
struct PairStats {
  float *max, *sum, *teacher_max, *teacher_sum;  // as StripStats
  // Forward KL: sum exp(t') (t' - s'), of reverse KL with s and t exchanged, s' = s - max s, t' = t - max t.
  float* cross;
  // For the filter, or null. Forward KL: sum exp(2 s'), exp(s' + t'), exp(2 t').
  // Reverse KL, x = s' - t': sum exp(s') x^2, exp(2 s'), exp(2 s') x, exp(2 s') x^2.
  float* moment[4];
  float *target, *teacher_target;  // [n] s and t at the label
};

// Of JSD and TVD, once lse is known, per strip and with every column.
struct MeanStats {
  const float *lse, *lse_low, *teacher_lse, *teacher_low;  // [n]
  float *value, *mean;                                     // the divergence's share; sum q h
  float* moment[4];  // or null: sum q h^2, q^2, q^2 h, q^2 h^2
};

struct PairCoefficients {
  const float *lse, *lse_low, *teacher_lse, *teacher_low, *mean;  // [n]
  const float *a, *at_label, *d;                                  // [n]
};

struct Kernels {
  void (*forward_tiles)(const Problem&, const StripStats&, int64_t tile0, int64_t tile1,
                        int64_t row0, int64_t row1, Scratch&);
  void (*grad_tile)(const GradTask&, int64_t tile, Scratch&);
  // de [n, kColumns] += G C of the tiles
  void (*grad_columns)(const GradTask&, int64_t tile0, int64_t tile1, int64_t column, float* de,
                       Scratch&);
  void (*fused_tiles)(const Problem&, const StripStats&, void* strips, int64_t tile0, int64_t tile1,
                      Scratch&);
  void (*fused_grad_tile)(const GradTask&, const StripStats&, int64_t tile, Scratch&);
  void (*pair_tile)(const ProblemPair&, const PairStats&, int64_t tile, int64_t row0, int64_t row1,
                    Scratch&);
  void (*mean_tile)(const ProblemPair&, const MeanStats&, int64_t tile, int64_t row0, int64_t row1,
                    Scratch&);
  // coef of the task is not looked at
  void (*pair_grad_tile)(const GradTask&, const ProblemPair&, const PairCoefficients&, int64_t tile,
                         Scratch&);
};

// Gradient strips are kept in bfloat16 where the inputs are: one more rounding of 2^-9, half the
// memory.
constexpr DType strip_type(DType storage) {
  return storage == DType::kBFloat16 ? DType::kBFloat16 : DType::kFloat32;
}

constexpr int64_t padded(int64_t d) { return ceil_div(d, kColumns) * kColumns; }

// Of the chosen instruction set.
const Kernels& kernels();

}  // namespace gemma_ext::cce
