// SPDX-License-Identifier: Apache-2.0
// Histograms of magnitudes, for a radix select.
#pragma once

#include "mask.h"

namespace gemma_ext::souping::GEMMA_EXT_ISA {
namespace {

template <class Use>
void keys_of_run(const Survey& call, const Run& run, Scratch& s, Use use) {
  const Table& t = call.table;
  const int streams = call.variance ? 1 : t.models;
  uint32_t* keys = scratch<uint32_t>(s, kWords, kStep + 8);
  in_steps(run, [&](int64_t at, int n) {
    const Deltas<float> d(t, run.part, at, n, s);
    for (int m = 0; m < streams; ++m) {
      keys_of(d, t.models, call.variance, m, n, keys);
      use(m, keys, n);
    }
  });
}

// Two histograms by turns: the same bin twice in a row would wait for its own store.
void coarse(const Survey& call, const Run& run, uint32_t* counts, int64_t* zeros, Scratch& s) {
  const int streams = call.variance ? 1 : call.table.models;
  uint32_t* second = counts + int64_t(streams) * kCoarse;
  keys_of_run(call, run, s, [&](int m, const uint32_t* keys, int n) {
    uint32_t *even = counts + int64_t(m) * kCoarse, *odd = second + int64_t(m) * kCoarse;
    int none = 0, bad = 0;
    for (int i = 0; i < n; ++i) {
      none += keys[i] == 0;
      bad += keys[i] == kNoKey;
    }
    zeros[m] += none;
    if (bad) {
      for (int i = 0; i < n; ++i)
        if (keys[i] != kNoKey) ++even[keys[i] >> 16];
      return;
    }
    int i = 0;
    for (; i + 2 <= n; i += 2) {
      ++even[keys[i] >> 16];
      ++odd[keys[i + 1] >> 16];
    }
    if (i < n) ++even[keys[i] >> 16];
  });
}

void fine(const Survey& call, const Run& run, uint32_t* counts, Scratch& s) {
  const int64_t streams = call.variance ? 1 : call.table.models;
  const int64_t* prefix = call.prefix + call.group[run.part] * streams * call.cuts;
  keys_of_run(call, run, s, [&](int m, const uint32_t* keys, int n) {
    for (int c = 0; c < call.cuts; ++c) {
      const uint32_t bin = uint32_t(prefix[m * call.cuts + c]);
      uint32_t* low = counts + (int64_t(m) * call.cuts + c) * kFine;
      for (int i = 0; i < n; ++i)
        if (keys[i] >> 16 == bin) ++low[keys[i] & 0xffff];
    }
  });
}

}  // namespace
}  // namespace gemma_ext::souping::GEMMA_EXT_ISA
