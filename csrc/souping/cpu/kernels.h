// SPDX-License-Identifier: Apache-2.0
// What runs inside one task, on one run of elements of one part: the table of the kernels that every
// instruction set has.
#pragma once

#include "../../common/cpu/scratch.h"
#include "../element.h"

namespace gemma_ext::souping {

using gemma_ext::cpu::Scratch;

// Elements begin .. begin + count of a part.
struct Run {
  int64_t part, begin, count;
};

// What a mask leaves of the elements from `begin`: kept [M, stride], null where all are, and the divisors of
// survivors or null.
struct Kept {
  uint8_t* kept;
  float* divide;
  int64_t begin, stride;
};

// Of a cut, [streams, run.count]; elements equal to its threshold in earlier runs and in this one [streams].
struct Marks {
  uint8_t* marks;  // null: no cut
  const int64_t *before, *equal;
};

// Parts of a Scratch; what a mask fills outlives the kernel that filled it.
enum Slot { kInputs, kValues, kWords, kMasks, kResult, kOther, kKept, kDivide };

// Strands [Q, kStrands], open spans [Q], tops [M, 2] of one run, before and after it.
struct Partial {
  double *strands, *span, *top;
};

struct Kernels {
  void (*soup)(const Soup&, const Run&, bool stream, Scratch&);
  // marks [streams, run.count], and equal [streams] += elements equal to the threshold
  void (*mark)(const Table&, const Cut&, const Run&, uint8_t* marks, int64_t* equal, Scratch&);
  void (*mask)(const Table&, const Mask&, const Run&, const Marks& keep, const Marks& drop,
               const Kept&, Scratch&);
  // of whole rows
  void (*mask_rows)(const Table&, const Mask&, const Run&, const Kept&, Scratch&);
  void (*merge)(const Merge&, const Run&, const Kept&, bool stream, Scratch&);
  void (*count)(const Counts&, const Run&, const Kept&, int64_t* out, Scratch&);
  // counts [streams, 2, kCoarse]: coarse and odd, written from the window's first bin to its last; zeros [streams]
  void (*coarse)(const Survey&, const Run&, uint32_t* counts, int64_t* zeros, Scratch&);
  // counts [streams, C, kFine], zero before
  void (*fine)(const Survey&, const Run&, uint32_t* counts, Scratch&);
  // a run inside one span
  void (*sums)(const Table&, Sum, const Run&, const Kept&, const Partial&, Scratch&);
  void (*gram_rows)(const GramRows&, const Run&, Scratch&);
  void (*apply)(const Apply&, const Run&, Scratch&);
  void (*swarm)(const Swarm&, const Run&, Scratch&);
  void (*gather_rows)(const GatherRows&, int64_t first, int64_t last, Scratch&);
};

// Of the chosen instruction set.
const Kernels& kernels();

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

constexpr int64_t streams_of(const Cut& cut, int models) { return cut.variance ? 1 : models; }

static inline Window window_of(const Survey& call, int64_t part, int stream) {
  const int64_t streams = call.variance ? 1 : call.table.models;
  const int64_t at = 2 * (call.group[part] * streams + stream);
  return checked_window(call.window ? call.window + at : nullptr);
}

constexpr int64_t sums_of(Sum sum, int models) {
  return sum == Sum::kGram ? models * (models + 1) / 2 : sum == Sum::kNorms ? 4 * models : models;
}

}  // namespace gemma_ext::souping
