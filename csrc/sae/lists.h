// SPDX-License-Identifier: Apache-2.0
// Products of short lists with dictionaries: what the binding hands to either engine.
//   decode   out[n] = bias + sum_j v_nj W[i_nj]
//   dots     d[n, j] = <g[n], W[i_nj]>
//   scatter  S[f] = sum over the entries of f of v_nj g[n],  s[f] = sum of their v_nj
// Entries are added in the order of the list, those of a feature by token; all results are the same bits in
// every run.
#pragma once

#include <stdint.h>

#include "../common/dtype.h"

namespace gemma_ext::sae {

// Entries of a feature that are added one after another; sums of so many are added in their order.
constexpr int64_t kRun = 256;

// Rows of D elements that lie side by side.
struct Rows {
  const void* data;
  int64_t stride;  // elements between rows
  DType dtype;
};

struct List {
  const float* values;     // [E]
  const int32_t* indices;  // [E], in [0, F)
  const int64_t* offsets;  // [N + 1], entries behind the last are nobody's; or null: K of each row
  int64_t N, K, E, F;      // padded: E = N K
};

// With a target, residual = target - decode instead of out, and its squared norm.
struct Decode {
  List codes;
  Rows weight;        // [F, D]
  const float* bias;  // [D] or null
  Rows target;        // [N, D], data null: none
  void* out;          // [N, D] in the dtype of the weight
  float* squared;     // [N], with a target
  int64_t D;
};

// Gradients of sum_n <out[n], grad[n]>; null where not wanted.
struct DecodeBackward {
  List codes;
  Rows weight, grad;
  float* values;   // [E] dots; 0 behind the last offset
  void* weights;   // [F, D] in the dtype of the weight
  bool unit_norm;  // weights without what is parallel to the rows of the weight
  int64_t D;
};

struct Scatter {
  List codes;
  Rows rows;    // [N, D]
  float* sums;  // [F, D]
  float* mass;  // [F] column sums of the codes
  int64_t D;
};

}  // namespace gemma_ext::sae
