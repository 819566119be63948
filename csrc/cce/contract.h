// SPDX-License-Identifier: Apache-2.0
// What the binding hands to either engine: plain structs of pointers, shapes beside them. All results are
// the same bits in every run.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "../common/dtype.h"
#include "sampling.h"

namespace gemma_ext::cce {

// A strip is one row against one tile of kTile vocabulary positions: the unit that is kept or dropped.
// 256 also is the depth of every cached block of the CPU's matrix products: 14 x 256 x 4 B of A beside
// 256 x 32 x 2 B of B stay in a 32 KiB L1.
constexpr int kTile = 256;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t tiles_of(int64_t vocab) { return ceil_div(vocab, kTile); }

// a = scale * e.c + bias;  s = cap tanh(a / cap) / T  or  a / T;  ds/da = (1 - (sT/cap)^2) / T.
struct LogitMap {
  float scale;
  float inv_cap;     // 0: no cap
  float cap_over_t;  // cap / T
  float t_over_cap;  // T / cap, or 0 without a cap, so that ds/da needs no branch
  float inv_t;
};

// softcap 0: none.
inline LogitMap logit_map(double softcap, double logit_scale, double temperature) {
  LogitMap map{};
  map.scale = float(logit_scale);
  map.inv_t = float(1.0 / temperature);
  if (softcap > 0) {
    map.inv_cap = float(1.0 / softcap);
    map.cap_over_t = float(softcap / temperature);
    map.t_over_cap = float(temperature / softcap);
  }
  return map;
}

// An engine says which strides it takes.
struct Head {
  const void *e, *c;       // [N, D], [V, D]
  int e_stride, c_stride;  // elements between rows
  int e_step, c_step;      // elements between columns
  DType dtype;
  const void* targets;  // [N]
  int64_t target_stride;
  bool wide_targets;          // int64, else int32
  const float* bias;          // [V] or null
  const float* class_weight;  // [V] or null
  int64_t N, V, D;            // N, V < 2^31
  LogitMap map;
  int64_t ignore_index;
  bool allow_missing;  // a label outside [0, V) has no target here
};

// [N] each, at the rows of e; null where not wanted, but for nll, lse and lse_low. Zero (argmax: -1) in ignored rows.
struct RowOutputs {
  float *nll, *lse, *lse_low, *mean, *class_sum;  // lse + lse_low to twice the bits
  int64_t* argmax;
  float *log_squares, *average;  // log sum p^2 and sum s / V: both or neither
};

struct Forward {
  Head head;
  RowOutputs out;
  // What the filter draws by, or null: of compact rows, zero behind the last, [1 or, with out.mean, 2;
  // tiles, N] float32 or, lean, bfloat16: sum p T ds/da of the strip, without the label, and the same times
  // max(1, |max s - mean|).
  void* masses;
  double* summary;  // [3]: share of strips kept, predicted relative standard error of dE, tau
  double eps;       // tau, kAutoEps: choose; looked at with masses only, else summary is 1, 0, 0
  bool lean;        // less memory before less time, of an engine that can
};

// [N] each, at the rows of e.
struct Upstream {
  const float *nll, *lse, *lse_low, *mean;  // of the forward; mean only with d_mean
  const float *d_nll, *d_lse;
  const float *d_mean, *d_class;  // or null
  // Size of the row's gradient that its masses are weighed against, or null: the largest of its own.
  const float* scale;
};

// Null where not wanted.
struct Gradients {
  void *de, *dc;  // contiguous [N, D] and [V, D] in the head's dtype
  float* dbias;   // [V]
};

struct Backward {
  Head head;
  Upstream up;
  const void* masses;     // of the forward
  const double* summary;  // of the forward; null keeps every strip
  int64_t seed;           // of the draw
  Gradients out;
  bool lean;  // as the forward was
};

// loss = sum_n nll_coef nll + lse2_coef lse^2 with its gradients, every strip kept.
struct Fused {
  Head head;
  const float *nll_coef, *lse2_coef;  // [N]
  float *loss, *nll, *lse;            // [1], [N], [N]
  Gradients out;
  bool lean;
};

// x *= factor; where that is 1, x is not touched.
struct Scale {
  void* x;
  DType dtype;
  int64_t count;
  const float* factor;  // [1]
};

}  // namespace gemma_ext::cce
