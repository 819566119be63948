// SPDX-License-Identifier: Apache-2.0
// Where the entries of a list lie.
#pragma once

#include "words.cuh"

namespace gemma_ext::sae::cuda {

constexpr float kNan = __builtin_nanf("");

struct Span {
  int64_t begin, end;
};

// Of token n.
DEVICE Span entries_of(const List& list, int64_t n) {
  if (list.offsets) return {list.offsets[n], list.offsets[n + 1]};
  return {n * list.K, n * list.K + (list.counts ? list.counts[n] : list.K)};
}

// What lies between its entries and those of token n + 1; n = N - 1: to the end.
DEVICE Span gap_behind(const List& list, int64_t n) {
  if (list.offsets) return {list.offsets[n + 1], n + 1 < list.N ? list.offsets[n + 1] : list.entries};
  return {entries_of(list, n).end, (n + 1) * list.K};
}

// The token of entry e, and whether e belongs to it or to nobody.
DEVICE bool token_of(const List& list, int64_t e, int64_t& n) {
  if (!list.offsets) {
    n = e / list.K;
    return !list.counts || e - n * list.K < list.counts[n];
  }
  int64_t low = 0, high = list.N + 1;  // the last offset that is not above e
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (list.offsets[middle] <= e ? low : high) = middle;
  }
  n = low;
  return low < list.N;
}

DEVICE bool is_feature(const List& list, int index) {
  return static_cast<uint32_t>(index) < static_cast<uint32_t>(list.F);
}

}  // namespace gemma_ext::sae::cuda
