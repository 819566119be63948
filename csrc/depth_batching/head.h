// SPDX-License-Identifier: Apache-2.0
// What serving reads off the head and off gates: what an engine takes.
//   a[n, v] = scale x_n . W_v + bias_v,  s = cap tanh(a / cap) or a, never stored as n x V
//   x = h, or its RMS norm rounded to the type of W
// NaN counts as -inf where logits are compared, and makes the sums NaN.
#pragma once

#include "linear.h"

namespace gemma_ext::depth_batching {

struct Head {
  const void* h;  // [n, D], rows h_stride elements apart
  int64_t h_stride;
  DType h_type;
  const void* norm_weight;  // [D], or null: h is of the type of weight
  DType norm_type;
  NormRule norm;
  const void* weight;  // [V, D], rows w_stride elements apart
  int64_t w_stride;
  DType type;         // of weight
  const float* bias;  // [V] or null
  int64_t n, V, D;    // V < 2^31
  float scale, cap;   // cap 0: none
};

constexpr int kMostCandidates = 1024;
constexpr int kMostShortlist = kMostCandidates - 1;  // and the best of the others
constexpr float kLeastHeat = 1e-6f;  // a row of less takes the best; also 1 / T stays finite

enum ExitMode : int32_t { kNever, kMaxProb, kMargin, kEntropy };

// Null where not wanted.
struct HeadExit {
  Head head;
  ExitMode mode;
  bool strict;               // a score at the threshold stays
  const float* threshold;    // [n]
  const float* temperature;  // [n]; below kLeastHeat the best is the sample
  const int64_t* keys;       // [n, 3], with temperature (noise.h)
  int64_t candidates;        // C <= min(V, kMostCandidates)
  const uint8_t* skip;       // [n] or null: rows whose results nobody reads may be left out
  int32_t* ids;              // [n] lowest id on ties
  float* top;                // [n, 2]
  float *lse, *entropy;      // [n]
  uint8_t* exits;            // [n]
  int32_t* samples;          // [n]
  float* tempered;           // [n] log sum exp(s / T); lse where the best is the sample
  float* values;             // [n, C] descending, equal ones by id
  int32_t* indices;          // [n, C]
};

struct Noise {
  const int32_t* ids;   // [n, C]
  const int64_t* keys;  // [n, 3]
  int64_t n, C;
  float* out;  // [n, C]
};

enum GateMode : int32_t { kGate, kHazard, kCosine, kLatentDiff };

struct Gate {
  GateMode mode;
  bool strict;
  const void *h, *previous;  // [n, D] contiguous; previous of the last two modes
  const void* weight;        // [D], of the first two
  const float* bias;         // [1] or null
  const float* survival;     // [n], of a hazard
  const float* threshold;    // [n]
  const uint8_t* last;       // [n] or null: rows that leave in any case
  DType type;
  int64_t n, D;
  uint8_t* exits;         // [n]
  float *scores, *after;  // [n]; survival after this loop
};

// A head of 8-bit codes, |x . W_v - code_scale_v x . code_v| <= |x| slack_v, that names candidates; their logits are
// those of the head.
struct Shortlist {
  Head head;
  const int8_t* codes;  // [V, D], rows code_stride apart
  int64_t code_stride;
  const float* code_scale;  // [V]
  const float* slack;       // [V]
  int64_t candidates;       // C <= min(V, kMostShortlist)
  int32_t* ids;             // [n] the best of the candidates
  float* top;               // [n, 2] the two best of them; -inf where there is one
  float* rest;              // [n] s of no other token is above; NaN: not known
  float *low, *high;        // [n] bounds of lse - top
};

// Whether a row leaves. The sums are of exp(s - top), p = exp(s - lse).
#if defined(__CUDACC__)
#define GEMMA_EXT_DEPTH_EXIT __host__ __device__
#else
#define GEMMA_EXT_DEPTH_EXIT
#endif
GEMMA_EXT_DEPTH_EXIT static inline bool leaves_above(float score, float threshold, bool strict) {
  return strict ? score > threshold : score >= threshold;
}
GEMMA_EXT_DEPTH_EXIT static inline bool leaves_below(float score, float threshold, bool strict) {
  return strict ? score < threshold : score <= threshold;
}

// T of a row that is sampled, or 0.
GEMMA_EXT_DEPTH_EXIT static inline float heat_of(const HeadExit& call, int64_t row) {
  return call.temperature && call.temperature[row] >= kLeastHeat ? call.temperature[row] : 0.0f;
}

}  // namespace gemma_ext::depth_batching
