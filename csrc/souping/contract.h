// SPDX-License-Identifier: Apache-2.0
// What the binding hands to either engine: plain structs of pointers, shapes beside them. Both give the same
// bits, however tensors are cut into parts (element.h has the arithmetic of one element).
//
// Tables, and numbers of parts, lie on the host; tensors, cuts, histograms and states where it computes.
// T parts, M models, G groups, R rows of the last dimension in all parts.
#pragma once

#include <stdint.h>

#include "../common/dtype.h"

namespace gemma_ext::souping {

constexpr int kMaxModels = 64;

// A magnitude is 31 bits: COARSE counts the upper 15, FINE the lower 16 of those in one coarse bin.
constexpr int kCoarse = 1 << 15, kFine = 1 << 16;

// Sums in float64 have one order whatever the cutting. A block is kBlock positions of a tensor (position 0
// begins one). Strand s of a block adds its positions s, s + kStrands, .. one by one; halves of the strands
// are added until one is left; blocks are added one by one into a span of kSpan positions, spans into the total.
// State of one sum: the strands of the open block, the open span, the total.
constexpr int64_t kBlock = 4096, kStrands = 64, kSpan = 64 * kBlock;
constexpr int64_t kState = kStrands + 2;
// A part that begins at a multiple of kBlock first closes the open block, at a multiple of kSpan then the open
// span too; one that ends in the middle leaves them open. What is closed is 0 afterwards.

// Contiguous.
struct Array {
  const void* data;  // null: there is none
  DType type;
};

struct Part {
  int64_t numel;
  int64_t offset;  // position in the whole tensor of the first element
  int64_t width;   // of the last dimension, 1 at least
  int64_t row;     // rows in the parts before this one
  uint64_t key;    // of the tensor's random numbers
};

struct Table {
  int64_t parts;          // T
  int models;             // M
  int extras;             // X, further inputs of each part
  const Part* part;       // [T]
  const Array* source;    // [T, M]
  const Array* base;      // [T]
  const Array* extra;     // [T, X]
  const Array* out;       // [T], may be a base or a source of its part; data is written
  const uint32_t* model;  // [T, M], what a source counts as in random numbers
};

enum class Rounding : int { kNearest, kStochastic };

// Results are computed in float32, or in float64 where a call is wide or they are stored as float32.

// out = base + scale sum_m w_m (x_m - base), or sum_m w_m x_m.
struct Soup {
  Table table;
  const double* weights;  // [T, M], or by_row [R, M]
  const double* scale;    // [T], or by_row [R]
  bool by_row, wide;
  Rounding rounding;
};

inline bool is_wide(bool asked, const Array& out) { return asked || out.type == DType::kFloat32; }

// The largest magnitudes: keys above bits, and of those equal to it the next `ties` by position. Streams are the
// M models, or one for the variance.
struct Cut {
  const int32_t* bits;  // [G, streams], null: no cut
  int64_t* ties;        // [G, streams], counted down
  int64_t groups;       // 1, then parts come in order and share it, or T
  bool variance;
};

// Places drop .. drop + keep of a row from the largest down, of those each with a probability that rises by
// `spread` from `low`.
struct RowChoice {
  int64_t drop, keep;
  float low, spread;
  bool draw;
};

// Which elements of a delta count.
struct Mask {
  Cut keep, drop;
  const double* density;  // [T, M] or null
  const RowChoice* rows;  // [M], or null: the above
  bool by_value;          // probabilities by magnitude, not by place
  bool rescale;           // survivors are divided by their probability
};

enum class Election : int { kNone, kSum, kCount };
enum class Combine : int { kSum, kMean, kWeightedMean, kMax };

struct Rule {
  Election election;
  bool weighted;
  int zero;  // 1, -1 or 0
  Combine combine;
};

struct Merge {
  Table table;
  Rule rule;
  Mask mask;
  const double* weights;  // [T, M]
  const double* divide;   // [T, M]
  const double* alone;    // [T, M] or null
  const double* scale;    // [T]
  bool wide;
  Rounding rounding;
};

// coarse, zeros and odd += or, where fine is given, fine += of the keys whose upper bits are in prefix.
struct Survey {
  Table table;
  const int64_t* group;  // [T]
  bool variance;         // one stream
  int cuts;              // C
  int64_t* coarse;       // [G, streams, kCoarse]
  int64_t* zeros;        // [G, streams], keys of exactly 0
  int64_t* odd;  // [G, streams, kCoarse] or null: of coarse, those whose lower bits are not all 0
  const int64_t* window;  // [G, streams, 2] or null
  const int64_t* prefix;  // [G, streams, C] or null
  int64_t* fine;          // [G, streams, C, kFine] or null
};

// Bins that are told apart: those between the two numbers of a window. What lies outside counts as its nearer end,
// and odd leaves the ends out. The widest has no outside.
struct Window {
  int64_t below, above;
};
constexpr Window kWidest = {-1, kCoarse - 1};

// kGram: for i <= j, row by row, delta_i delta_j: Q = M (M + 1) / 2. kNorms: for each model |delta|, delta^2, and
// both of what `mask` leaves: Q = 4 M; top is |delta| and masked |delta|; NaN counts as 0. kDots: delta_m extra_0: Q = M.
enum class Sum : int { kGram, kNorms, kDots };

struct Sums {
  Table table;
  Sum sum;
  const int64_t* group;  // [T]
  Mask mask;
  double* state;  // [G, Q, kState]
  double* top;    // [G, M, 2] with kNorms
};

// Every row a Gram matrix, its strands and blocks counted from the row's first element.
struct GramRows {
  Table table;
  double* out;  // [R, M, M]
};

// kOverlaps: elements where mask_m stands alone, and with others: [T, M, 2]. kBalance: elected signs, a sum of 0 as
// 0, added up: [T].
enum class Count : int { kOverlaps, kBalance };

struct Counts {
  Table table;
  Count count;
  Rule rule;
  Mask mask;
  const double* weights;  // [T, M]
  const double* divide;   // [T, M]
  int64_t* out;           // zero before
};

// Element rules with numbers of their own, [T, columns]:
//   kConsensus  lambda [M], scale; votes, task (-1: votes decide)
//   kFisher     weight [M], floor [M], add; extras: F [M]
//   kNearswap   t
//   kMutate     rate, sigma
//   kPick, kPickMagnitude   weight [M]
//   kBlend      weight [M], alpha
enum class Element : int { kConsensus, kFisher, kNearswap, kMutate, kPick, kPickMagnitude, kBlend };

struct Apply {
  Table table;
  Element element;
  const double* numbers;  // [T, columns]
  int columns, votes, task;
  Rounding rounding;
};

// v = c0 v + c1 (best - x) + c2 (group_best - x) - c3 (group_worst - x);  x += step v.
// source: x, best, group_best, group_worst; out: x; velocity is read and written.
struct Swarm {
  Table table;
  const Array* velocity;  // [T]
  const double* numbers;  // [T, 5]: c, step
  Rounding rounding;      // of x; v to nearest
};

// out[v] = mean over 0 <= rows[v, m] < limit[m] of source[m][rows[v, m]]; zeros where there is none.
struct GatherRows {
  const Array* source;   // [M], rows of `width`, contiguous
  const int64_t* rows;   // [count, M]
  const int64_t* limit;  // [M], rows of each source
  Array out;             // [count, width]
  int models;
  int64_t count, width;
};

}  // namespace gemma_ext::souping
