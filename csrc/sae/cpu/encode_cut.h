// SPDX-License-Identifier: Apache-2.0
// Where the best of many scores end.
#pragma once

#include <atomic>
#include <vector>

#include "../contract.h"

namespace gemma_ext::sae {

// The k-th largest order, and how many of the k best have it.
struct Cut {
  uint32_t order;
  int64_t ties;
};

// Of at least k orders, 1 <= k, which are lost.
Cut cut_after(std::vector<uint32_t>& orders, int64_t k);

// How many positive scores of a batch lie in each span of 1/16 of a power of two, as all tasks have counted
// them so far; hence a score that the best of the batch exceed.
class Spans {
 public:
  explicit Spans(int64_t total);
  // A NaN is not counted: the tasks of a row may each have one.
  void add(float score);
  // Below at least `total` of the scores that were added, or 0.
  float limit() const;

 private:
  static constexpr int kCount = 4096, kShift = 19;
  int64_t total_;
  std::vector<std::atomic<int64_t>> counts_;
};

}  // namespace gemma_ext::sae
