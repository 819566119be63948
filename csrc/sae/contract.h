// SPDX-License-Identifier: Apache-2.0
// What an engine takes to encode: plain structs of pointers, with their shapes. Memory is where the
// engine computes; outputs are contiguous.
//   p[n, f] = x_n . w_f + bias_f                 N tokens, D width, F features; never stored as N x F
//   score   = p scale_f, or |p| scale_f          what is compared; p is what is returned
// Sums of products are float. A larger score goes first, equal ones by the lower token, then by the lower
// feature; -0 equals 0, and NaN is larger than any number.
#pragma once

#include <stdint.h>

#include "../common/dtype.h"

#if defined(__CUDACC__)
#define GEMMA_EXT_SAE_BOTH __host__ __device__
#else
#define GEMMA_EXT_SAE_BOTH
#endif

namespace gemma_ext::sae {

struct Encoder {
  const void *x, *weight;                                // [N, D], [F, D]
  int64_t x_stride, x_step, weight_stride, weight_step;  // of rows and in rows, in elements
  DType dtype;                                           // of both
  const float* bias;                                     // [F], or null: 0
  const float* scale;                                    // [F], or null: 1
  int64_t N, F, D;
};

// A second list: the k best by p scale among the features whose mask is set, in the order of the first;
// behind the last of them value 0 and index 0.
struct Aux {
  const uint8_t* mask;  // [F]; null: no second list
  int64_t k;
  float* values;     // [N, k]
  int32_t* indices;  // [N, k]
};

// The k best of every row, best first.
struct TopK {
  Encoder encoder;
  bool by_magnitude;  // of the first list
  int64_t k;          // 1 <= k <= F
  float* values;      // [N, k]
  int32_t* indices;   // [N, k]
  Aux aux;
};

// The best p of each of `groups` runs of F / groups features.
struct GroupMax {
  Encoder encoder;  // without scale
  int64_t groups;
  float* values;     // [N, groups]
  int32_t* indices;  // [N, groups]
};

// In what follows a row with NaN scores lists the first of them only, so that it stays short.

// The `total` best positive scores of all rows; a row's entries ascend by feature.
struct BatchTopK {
  Encoder encoder;
  int64_t total;        // 0 <= total <= N F
  float* values;        // [total], 0 behind offsets[N]
  int32_t* indices;     // [total], 0 behind offsets[N]
  int64_t* offsets;     // [N + 1]
  float* min_positive;  // [1] smallest chosen positive score, +inf without any
  Aux aux;
};

// Entries with score > limit, or >=; a row's entries ascend by feature.
struct Threshold {
  Encoder encoder;
  const float* limit;  // [F]
  bool inclusive;
  int64_t* counts;  // [N] entries above, whether they found room or not
  // Rows of `capacity`; behind the last entry value 0 and index 0; value NaN and index 0 throughout
  // where a row has more. Or a list of the length that is needed: capacity -1 and these null; the
  // engine then asks for memory once, by the Allocate of its call.
  int64_t capacity;
  float* values;     // [N, capacity]
  int32_t* indices;  // [N, capacity]
  int64_t* offsets;  // [N + 1], where capacity is -1
  Aux aux;
};

struct Entries {
  float* values;     // [nnz]
  int32_t* indices;  // [nnz]
};

// Scores in one order: a < b in ours as unsigned numbers compare. NaN is the largest.
GEMMA_EXT_SAE_BOTH static inline uint32_t order_of(float score) {
  uint32_t bits;
  memcpy(&bits, &score, 4);
  if (!(score == score)) return 0xffffffffu;
  if (score == 0) bits = 0;  // -0
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// The larger is the better entry of a row.
GEMMA_EXT_SAE_BOTH static inline uint64_t rank_of(float score, int32_t feature) {
  return uint64_t(order_of(score)) << 32 | (0xffffffffu - uint32_t(feature));
}

}  // namespace gemma_ext::sae
