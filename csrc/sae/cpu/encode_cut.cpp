// SPDX-License-Identifier: Apache-2.0
#include "encode_cut.h"

#include <algorithm>

namespace gemma_ext::sae {

Cut cut_after(std::vector<uint32_t>& orders, int64_t k) {
  constexpr int kDigit = 11;  // sign, exponent and two bits first
  for (const int shift : {21, 10, 0}) {
    int64_t counts[1 << kDigit] = {};
    uint32_t digit = 0;
    const auto digit_of = [&](uint32_t x) {
      return x >> shift & ((1u << (shift ? kDigit : 10)) - 1);
    };
    for (const uint32_t x : orders) {
      ++counts[digit_of(x)];
      digit = std::max(digit, digit_of(x));
    }
    for (; counts[digit] < k; --digit) k -= counts[digit];
    orders.erase(std::remove_if(orders.begin(), orders.end(),
                                [&](uint32_t x) { return digit_of(x) != digit; }),
                 orders.end());
  }
  return {orders.front(), k};
}

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
