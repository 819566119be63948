// SPDX-License-Identifier: Apache-2.0
// Histograms of magnitudes, for a radix select.
#pragma once

#include "lanes.h"

namespace gemma_ext::souping::GEMMA_EXT_ISA {
namespace {

template <class Use>
void keys_of_run(const Survey& call, const Run& run, Scratch& s, Use use) {
  const Table& t = call.table;
  const int streams = call.variance ? 1 : t.models;
  alignas(64) uint32_t keys[kStep];
  in_steps(run, [&](int64_t at, int n) {
    const Inputs in(t, run.part, at, n, true, s);
    for (int m = 0; m < streams; ++m) {
      keys_of(in, t.models, call.variance, m, n, keys);
      use(m, keys, n);
    }
  });
}

// By turns into kCopies histograms: the same bin twice in a row would wait for its own store.
void coarse(const Survey& call, const Run& run, uint32_t* counts, int64_t* zeros, Scratch& s) {
  const int64_t bins = int64_t(call.variance ? 1 : call.table.models) * kCoarse;
  alignas(64) uint16_t index[kStep];
  keys_of_run(call, run, s, [&](int m, const uint32_t* keys, int n) {
    uint32_t* mine = counts + int64_t(m) * kCoarse;
    int none = 0, bad = 0;
    for (int i = 0; i < n; ++i) {
      index[i] = uint16_t(keys[i] >> 16);
      none += keys[i] == 0;
      bad += keys[i] == kNoKey;
    }
    zeros[m] += none;
    if (bad) {
      for (int i = 0; i < n; ++i)
        if (keys[i] != kNoKey) ++mine[index[i]];
      return;
    }
    int i = 0;
    for (; i + kCopies <= n; i += kCopies) {
      uint64_t four;
      memcpy(&four, index + i, sizeof(four));
      ++mine[four & 0xffff];
      ++mine[bins + (four >> 16 & 0xffff)];
      ++mine[2 * bins + (four >> 32 & 0xffff)];
      ++mine[3 * bins + (four >> 48)];
    }
    for (; i < n; ++i) ++mine[index[i]];
  });
  for (int64_t b = 0; b < bins; ++b)
    counts[b] += counts[bins + b] + counts[2 * bins + b] + counts[3 * bins + b];
}

void fine(const Survey& call, const Run& run, uint32_t* counts, Scratch& s) {
  const int64_t streams = call.variance ? 1 : call.table.models;
  const int64_t* prefix = call.prefix + call.group[run.part] * streams * call.cuts;
  keys_of_run(call, run, s, [&](int m, const uint32_t* keys, int n) {
    for (int c = 0; c < call.cuts; ++c) {
      const uint32_t bin = uint32_t(prefix[m * call.cuts + c]);
      uint32_t* low = counts + (int64_t(m) * call.cuts + c) * kFine;
      for (int i = 0; i < n; i += kLanes) {  // most vectors have none
        bool any = false;
        for (int k = i; k < i + kLanes; ++k) any |= keys[k] >> 16 == bin;
        if (!any) continue;
        for (int k = i; k < least(i + kLanes, n); ++k)
          if (keys[k] >> 16 == bin) ++low[keys[k] & 0xffff];
      }
    }
  });
}

}  // namespace
}  // namespace gemma_ext::souping::GEMMA_EXT_ISA
