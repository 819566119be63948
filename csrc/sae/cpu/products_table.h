// SPDX-License-Identifier: Apache-2.0
// What runs inside one task: the table of the product kernels that every instruction set has.
#pragma once

#include "../../common/cpu/scratch.h"
#include "../steer.h"

namespace gemma_ext::sae {

using gemma_ext::cpu::Scratch;

// Parts of a Scratch.
enum ProductSlot { kSum, kRow, kOther, kOrder };

// A token's entries sorted by feature lie side by side; of a feature those of earlier tokens come first.
struct Entry {
  int32_t at, token;
};

// Sums over the tokens of some features: sum_n c_n g_n with c = v scale, and dots <g_n, W> scale.
struct Segments {
  const List* list;
  Table weight;        // [F, D], or null: neither dots nor a projection
  Table grad;          // [N, D]
  const float* scale;  // [N], or null
  int64_t D;
  bool unit_norm;
  float* dots;  // [entries], or null
  DType type;   // of sums
  void* sums;   // rows of D
};

// Columns of d_bias that one task sums: a row's share is four cache lines or more.
constexpr int64_t kColumns = 128;

struct ProductKernels {
  // rows first .. last
  void (*decode)(const Decode&, int64_t first, int64_t last, Scratch&);
  void (*dots)(const DecodeBackward&, int64_t first, int64_t last, Scratch&);
  // columns of d_bias
  void (*column_sums)(const DecodeBackward&, int64_t first, int64_t last);
  // one feature's entries: its sum to `row`, or to `partial` [padded D] where that is not null
  void (*segment)(const Segments&, int64_t feature, const Entry*, int64_t count, void* row,
                  float* partial, Scratch&);
  // the sum of `parts` partial sums, of which the first becomes it, to `row`
  void (*join)(const Segments&, int64_t feature, float* partial, int64_t parts, void* row,
               Scratch&);
  void (*nested)(const Nested&, int64_t first, int64_t last, Scratch&);
  // rows first .. last: suffix sums s [last - first, levels, D padded], and what depends on a token alone
  void (*nested_rows)(const NestedBackward&, int64_t first, int64_t last, float* s, Scratch&);
  // sum [D padded] += v s of entries of one feature
  void (*nested_segment)(const float* const* s, const float* v, int64_t count, int64_t D,
                         float* sum);
  // sum [D padded], projected where `segments` asks, to `row`
  void (*finish)(const Segments&, int64_t feature, float* sum, void* row, Scratch&);
  bool (*fires)(const Steer&, int64_t request, int64_t token, Scratch&);
  void (*steer)(const Steer&, int64_t request, int64_t token, bool open, Scratch&);
};

// Of the chosen instruction set.
const ProductKernels& product_kernels();

// Whole vectors of every instruction set are read and written.
constexpr int64_t kPad = 16;
constexpr int64_t padded_width(int64_t D) { return (D + kPad - 1) / kPad * kPad; }

}  // namespace gemma_ext::sae
