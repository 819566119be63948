// SPDX-License-Identifier: Apache-2.0
#include "encode_spans.h"

namespace gemma_ext::sae {

Spans::Spans(int64_t total) : total_(total), counts_(kCount) {}

void Spans::add(float score) {
  if (score == score) counts_[bits_of(score) >> kShift].fetch_add(1, std::memory_order_relaxed);
}

float Spans::limit() const {
  int64_t above = 0;
  for (int i = kCount - 1; i > 0; --i) {
    above += counts_[i].load(std::memory_order_relaxed);
    if (above >= total_) return float_of((uint32_t(i) << kShift) - 1);
  }
  return 0;
}

}  // namespace gemma_ext::sae
