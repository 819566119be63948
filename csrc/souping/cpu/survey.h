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
    for (int i = 0; i < n; i += kLanes)
      put_halves(index + i, *reinterpret_cast<const VuLoose*>(keys + i) >> 16);
    for (int i = 0; i < n; ++i) none += keys[i] == 0;
    for (int i = 0; i < n; ++i) bad |= keys[i] == kNoKey;
    zeros[m] += none;
    if (bad) {
      for (int i = 0; i < n; ++i)
        if (keys[i] != kNoKey) ++mine[index[i]];
      return;
    }
    uint32_t* second = mine + bins;
    int i = 0;
    for (; i + kCopies <= n; i += kCopies) {
      ++mine[index[i]];
      ++second[index[i + 1]];
    }
    for (; i < n; ++i) ++mine[index[i]];
  });
  for (int64_t b = 0; b < bins; ++b) counts[b] += counts[bins + b];
}

// The lower halves of the keys of one bin, side by side; returns how many there are.
inline int gather_low(const uint32_t* keys, int n, uint32_t bin, uint32_t* low) {
  int found = 0, i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= n; i += 16) {
    const __m512i key = _mm512_loadu_si512(keys + i);
    const __mmask16 mine =
        _mm512_cmpeq_epi32_mask((__m512i)((Vu)key >> 16), _mm512_set1_epi32(int(bin)));
    _mm512_storeu_si512(low + found, _mm512_maskz_compress_epi32(mine, key));
    found += __builtin_popcount(mine);
  }
#endif
  for (; i < n; ++i) {
    low[found] = keys[i];
    found += keys[i] >> 16 == bin;
  }
  for (int k = 0; k < found; ++k) low[k] &= 0xffff;
  return found;
}

void fine(const Survey& call, const Run& run, uint32_t* counts, Scratch& s) {
  const int64_t streams = call.variance ? 1 : call.table.models;
  const int64_t* prefix = call.prefix + call.group[run.part] * streams * call.cuts;
  alignas(64) uint32_t low[kStep + kLanes];
  keys_of_run(call, run, s, [&](int m, const uint32_t* keys, int n) {
    for (int c = 0; c < call.cuts; ++c) {
      uint32_t* mine = counts + (int64_t(m) * call.cuts + c) * kFine;
      const int found = gather_low(keys, n, uint32_t(prefix[m * call.cuts + c]), low);
      for (int k = 0; k < found; ++k) ++mine[low[k]];
    }
  });
}

}  // namespace
}  // namespace gemma_ext::souping::GEMMA_EXT_ISA
