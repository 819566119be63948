// SPDX-License-Identifier: Apache-2.0
#include "products_order.h"

#include <algorithm>

namespace gemma_ext::sae::cpu {

ByFeature::ByFeature(const List& l) : first(l.F + 1) {
  for (int64_t n = 0; n < l.N; ++n)
    for (int64_t i = begin_of(l, n); i < end_of(l, n); ++i) ++first[l.indices[i] + 1];
  for (int64_t f = 0; f < l.F; ++f) first[f + 1] += first[f];
  entries.resize(first[l.F]);
  for (int64_t n = 0; n < l.N; ++n)
    for (int64_t i = begin_of(l, n); i < end_of(l, n); ++i)
      entries[first[l.indices[i]]++] = {int32_t(i), int32_t(n)};
  // counting up has moved every start to the start of the next feature
  std::copy_backward(first.begin(), first.end() - 1, first.end());
  first[0] = 0;
}

Spans::Spans(const ByFeature& by) {
  const int64_t features = int64_t(by.first.size()) - 1;
  int64_t start = 0;
  const auto whole = [&](int64_t end) {
    if (end > start)
      spans.push_back({start, end, by.first[start], by.first[end] - by.first[start]});
    start = end;
  };
  for (int64_t f = 0; f < features; ++f) {
    const int64_t count = by.count(f);
    if (count > kPart) {
      whole(f);
      cut.push_back({f, f + 1, parts, (count + kPart - 1) / kPart});
      for (int64_t at = 0; at < count; at += kPart)
        spans.push_back({f, f + 1, by.first[f] + at, std::min(kPart, count - at), parts++});
      start = f + 1;
    } else if (f + 1 - start >= kSpanFeatures ||
               by.first[f + 1] - by.first[start] >= kSpanEntries) {
      whole(f + 1);
    }
  }
  whole(features);
}

}  // namespace gemma_ext::sae::cpu
