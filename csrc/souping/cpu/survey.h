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

// The keys that are wanted, side by side; returns how many. `to` holds kLanes more.
template <class Wanted>
int gather(const uint32_t* keys, int n, Wanted wanted, uint32_t* to) {
  int found = 0, i = 0;
#if defined(__AVX512F__)
  for (; i + kLanes <= n; i += kLanes) {
    const Vu key = *reinterpret_cast<const VuLoose*>(keys + i);
    const __mmask16 mine = _mm512_movepi32_mask((__m512i)wanted(key));
    _mm512_storeu_si512(to + found, _mm512_maskz_compress_epi32(mine, (__m512i)key));
    found += __builtin_popcount(mine);
  }
#endif
  for (; i < n; ++i) {
    to[found] = keys[i];
    found += wanted(keys[i]) != 0;
  }
  return found;
}

// Bins in turn into kCopies counters side by side: the same one again would wait for its own store.
constexpr int kCopies = 4;

void coarse(const Survey& call, const Run& run, uint32_t* counts, int64_t* zeros, Scratch& s) {
  const int streams = call.variance ? 1 : call.table.models;
  uint32_t* copies = scratch<uint32_t>(s, kOther, int64_t(streams) * kCoarse * kCopies);
  for (int m = 0; m < streams; ++m) {
    const Window w = window_of(call, run.part, m);
    const int64_t first = w.below < 0 ? 0 : w.below, bins = w.above + 1 - first;
    uint32_t* mine = counts + 2 * m * int64_t(kCoarse) + first;
    memset(mine, 0, bins * sizeof(uint32_t));
    memset(mine + kCoarse, 0, bins * sizeof(uint32_t));
    memset(copies + (int64_t(m) * kCoarse + first) * kCopies, 0, bins * kCopies * sizeof(uint32_t));
  }
  alignas(64) uint32_t inside[kStep + kLanes], low[kStep + kLanes];
  keys_of_run(call, run, s, [&](int m, const uint32_t* keys, int n) {
    const Window w = window_of(call, run.part, m);
    const uint32_t floor = uint32_t(w.below + 1) << 16, ceiling = uint32_t(w.above) << 16;
    uint32_t* mine = copies + int64_t(m) * kCoarse * kCopies;
    uint32_t *ends = counts + 2 * m * int64_t(kCoarse), *odd = ends + kCoarse;
    const int found =
        gather(keys, n, [&](auto key) { return key - floor < ceiling - floor; }, inside);
    int none = 0, bad = 0, above = 0;
    for (int i = 0; i < n; ++i) {
      none += keys[i] == 0;
      bad += keys[i] == kNoKey;
      above += keys[i] >= ceiling;
    }
    zeros[m] += none;
    ends[w.above] += above - bad;
    if (w.below >= 0) ends[w.below] += n - found - above;
    int k = 0;
    for (; k + kCopies <= found; k += kCopies)
      for (int c = 0; c < kCopies; ++c) ++mine[(inside[k + c] >> 16) * kCopies + c];
    for (; k < found; ++k) ++mine[(inside[k] >> 16) * kCopies];
    if (!call.odd) return;
    const int others = gather(inside, found, [](auto key) { return (key & 0xffff) != 0; }, low);
    for (k = 0; k < others; ++k) ++odd[low[k] >> 16];
  });
  for (int m = 0; m < streams; ++m) {
    const Window w = window_of(call, run.part, m);
    const uint32_t* mine = copies + int64_t(m) * kCoarse * kCopies;
    uint32_t* total = counts + 2 * m * int64_t(kCoarse);
    for (int64_t b = w.below + 1; b < w.above; ++b)
      for (int c = 0; c < kCopies; ++c) total[b] += mine[b * kCopies + c];
  }
}

void fine(const Survey& call, const Run& run, uint32_t* counts, Scratch& s) {
  const int64_t streams = call.variance ? 1 : call.table.models;
  const int64_t* prefix = call.prefix + call.group[run.part] * streams * call.cuts;
  alignas(64) uint32_t low[kStep + kLanes];
  keys_of_run(call, run, s, [&](int m, const uint32_t* keys, int n) {
    for (int c = 0; c < call.cuts; ++c) {
      uint32_t* mine = counts + (int64_t(m) * call.cuts + c) * kFine;
      const uint32_t bin = uint32_t(prefix[m * call.cuts + c]);
      const int found = gather(keys, n, [&](auto key) { return key >> 16 == bin; }, low);
      for (int k = 0; k < found; ++k) ++mine[low[k] & 0xffff];
    }
  });
}

}  // namespace
}  // namespace gemma_ext::souping::GEMMA_EXT_ISA
