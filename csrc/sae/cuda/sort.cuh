// SPDX-License-Identifier: Apache-2.0
// Entries of a list by feature, those of a feature in the order of the list: a stable radix sort, least digit
// first. Integers throughout, and every place follows from counts: the same on every run.
#pragma once

#include "lists.cuh"

namespace gemma_ext::sae::cuda {

constexpr int kDigitBits = 8, kDigits = 1 << kDigitBits;
constexpr int kSortRounds = 16;  // of a warp, 32 neighbours each
constexpr int kSortItems = kThreads * kSortRounds;

struct Keys {
  uint32_t* key;
  int* id;
};

struct SortParams {
  Keys from, to;
  int* counts;  // [kDigits, blocks], then those of earlier blocks
  int* totals;  // [kDigits]
  int64_t count;
  int shift;
};

struct SortMemory {
  Keys keys[2];
  int *counts, *totals;
  int64_t count, blocks;
  int passes;

  // `count` keys below 2^bits.
  SortMemory(Arena& memory, int64_t count, int bits)
      : count(count),
        blocks(ceil_div(count, kSortItems)),
        passes(static_cast<int>(most(ceil_div(bits, kDigitBits), 1))) {
    for (Keys& k : keys) k = {memory.take<uint32_t>(count), memory.take<int>(count)};
    counts = memory.take<int>(kDigits * blocks);
    totals = memory.take<int>(kDigits);
  }
  // Where the first pass reads, and where the last one has written.
  const Keys& first() const { return keys[0]; }
  const Keys& sorted() const { return keys[passes % 2]; }
};

inline int bits_of(int64_t most) {
  int bits = 0;
  while (most >> bits) ++bits;
  return bits;
}

// By the low bits of the keys, all of those that SortMemory was made for.
void add_sort(Launches&, const SortMemory&);

}  // namespace gemma_ext::sae::cuda
