// SPDX-License-Identifier: Apache-2.0
// What an engine takes to multiply sparse codes with dense rows: plain structs of pointers, with their shapes.
//   decode   out_n = b + sum_j v_nj W_{i_nj}         N tokens, D width, F features
//   dots     <g_n, W_{i_nj}>                         of every entry
//   scatter  sum_n f_ni g_n                          of every feature
// Memory is where the engine computes; outputs are contiguous. Sums are float, in an order that the lists fix:
// over a token's entries that of the list, over a feature's entries that of the tokens (within one token that of
// its list). Nothing depends on the number of threads or the order of blocks. A value of 0 adds nothing.
//
// Indices lie in [0, F), and offsets ascend from 0 to `entries` at most, counts lie in [0, K]: the CPU's binding
// refuses others. On a card, where nobody waits to look, an entry with another index makes its token's row NaN, and
// takes part in no sum over tokens.
#pragma once

#include <stdint.h>

#include "../common/dtype.h"

namespace gemma_ext::sae {

// Entries of token n: offsets[n] .. offsets[n + 1], or without offsets n K .. n K + counts[n], K without counts.
// Those between and behind belong to nobody: their gradients are 0.
struct List {
  const float* values;     // [entries]
  const int32_t* indices;  // [entries]
  const int64_t* offsets;  // [N + 1], or null
  const int64_t* counts;   // [N], or null
  int64_t N, K, entries, F;
};

// Rows of D elements one behind the other.
struct Table {
  const void* data;  // null: none
  int64_t stride;    // of rows, in elements
  DType type;
};

// out = x^ = bias + sum v W; with a target its residual target - x^, and the residual's square before rounding.
struct Decode {
  List list;
  Table weight;       // [F, D]
  const float* bias;  // [D], or null: 0
  Table target;       // [N, D], or null
  int64_t D;
  void* out;       // [N, D] in the type of weight
  float* squared;  // [N], with target
};

// Of G_n = scale_n grad_n: dots <G_n, W_i>, sum_n v_ni G_n and sum_n G_n; what is null is not wanted.
struct DecodeBackward {
  List list;           // values are read for d_weight only
  Table weight;        // [F, D]
  Table grad;          // [N, D]
  const float* scale;  // [N], or null: 1
  int64_t D;
  bool
      unit_norm;  // d_weight_i -= <d_weight_i, W_i> W_i / |W_i|^2, before rounding; nothing where W_i is 0
  bool
      rows_only;  // d_weight has rows of touched features only: memory comes by Allocate of the call
  float* d_values;   // [entries]
  void* d_weight;    // [F, D] in the type of weight, 0 for features in no list
  float* d_bias;     // [D]
  bool want_weight;  // also where the memory comes later
};

// Features in a list, ascending, and their rows of d_weight.
struct TouchedRows {
  int64_t* features;  // [T]
  void* d_weight;     // [T, D]
};

// f^T g and f^T 1.
struct Scatter {
  List list;
  Table rows;  // [N, D]; D may be 0
  int64_t D;
  float* sums;    // [F, D]
  float* totals;  // [F]
};

// squared[n, m] = |b + sum_{j: level_nj <= m} v_nj W_j - x_n|^2, m < levels. With widths the level of an entry is the
// first m with index < widths[m], none from the last on; without it is the entry's place in its token's list. Within a
// token entries are added by level, then in the order of the list.
struct Nested {
  List list;  // without widths: [N, K], levels = K
  Table weight;
  const float* bias;  // [D], or null
  Table target;       // [N, D]
  int64_t D, levels;
  const int64_t* widths;  // [levels] ascending, in the host's memory; or null
  float* squared;         // [N, levels]
};

// With r_m = x^_m - x: s_j = sum_{m >= j} 2 d_squared_m r_m; an entry of level j has d_value <s_j, W_i> and adds
// v s_j to d_weight_i; d_bias = sum_n s_0, d_target = -s_0.
struct NestedBackward {
  Nested nested;           // squared is not looked at
  const float* d_squared;  // [N, levels]
  bool unit_norm;
  float* d_values;  // [entries], or null
  void* d_weight;   // [F, D] in the type of weight, or null
  float* d_bias;    // [D], or null
  void* d_target;   // [N, D] in the type of target, or null
};

}  // namespace gemma_ext::sae
