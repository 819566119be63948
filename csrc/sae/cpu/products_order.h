// SPDX-License-Identifier: Apache-2.0
// Entries by feature: what a sum over tokens visits, in an order that depends on the lists alone.
#pragma once

#include <vector>

#include "products_table.h"

namespace gemma_ext::sae::cpu {

inline int64_t begin_of(const List& l, int64_t n) { return l.offsets ? l.offsets[n] : n * l.K; }
inline int64_t end_of(const List& l, int64_t n) {
  return l.offsets ? l.offsets[n + 1] : n * l.K + (l.counts ? l.counts[n] : l.K);
}
// Whether there are entries of nobody.
inline bool has_gaps(const List& l) { return l.offsets || l.counts; }

// A stable counting sort. Memory: 8 bytes an entry, 8 a feature.
struct ByFeature {
  std::vector<Entry> entries;
  std::vector<int32_t> first;  // [F + 1] into entries

  explicit ByFeature(const List& l);
  int64_t count(int64_t feature) const { return first[feature + 1] - first[feature]; }
};

// Some features' entries, or a part of one feature's.
struct Span {
  int64_t feature, last;  // features feature .. last
  int64_t from, count;    // entries of a part
  int64_t part = -1;      // place of its partial sum, -1 for whole features
};

// What one task sums. A feature with more than kPart entries is cut, so that its sum is the same whether or not others
// help, and so that a latent that fires everywhere is not one thread's work.
constexpr int64_t kPart = 1024, kSpanEntries = 512, kSpanFeatures = 4096;

struct Spans {
  std::vector<Span> spans;
  std::vector<Span> cut;  // feature and its parts: from .. from + count
  int64_t parts = 0;

  explicit Spans(const ByFeature& by);
};

}  // namespace gemma_ext::sae::cpu
