// SPDX-License-Identifier: Apache-2.0
#include "encode_lists.h"

#include <stdlib.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "encode_cut.h"

namespace gemma_ext::sae {

void shrink(TopLists& lists, int64_t row) {
  TopLists::Entry* entries = lists.entries + row * lists.capacity;
  const int64_t count = lists.count[row];
  if (count < lists.k) return;
  static thread_local std::vector<uint32_t> orders, some;
  orders.resize(count);
  const auto score = [&](const TopLists::Entry& e) {
    return score_of(e.p, e.feature, lists.scale, lists.by_magnitude);
  };
  for (int64_t i = 0; i < count; ++i) orders[i] = order_of(score(entries[i]));
  some = orders;
  Cut cut = cut_after(some, lists.k);
  int64_t kept = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (orders[i] < cut.order) continue;
    if (orders[i] == cut.order) {
      if (cut.ties-- <= 0) continue;
      lists.limit[row] = score(entries[i]);
    }
    entries[kept++] = entries[i];
  }
  lists.count[row] = int32_t(kept);
  lists.closed[row] = std::isnan(lists.limit[row]);
}

Above::Above() = default;
Above::~Above() { free(entries); }

Above::Entry* room(Above& above, int64_t more) noexcept {
  if (above.count + more > above.capacity) {
    above.capacity = std::max(above.count + more, above.capacity * 3 / 2);
    above.entries =
        static_cast<Above::Entry*>(realloc(above.entries, above.capacity * sizeof(Above::Entry)));
    if (!above.entries) abort();
  }
  return above.entries + above.count;
}

void settle(Above& above) noexcept {
  constexpr int64_t kSlack = 1 << 16;
  const auto score = [&](const Above::Entry& e) {
    return score_of(e.p, e.feature, above.scale, false);
  };
  for (; above.settled < above.count; ++above.settled)
    above.spans->add(score(above.entries[above.settled]));
  above.limit = std::max(above.limit, above.spans->limit());
  if (above.count < 2 * above.kept + kSlack) return;
  const auto end = std::remove_if(above.entries, above.entries + above.count,
                                  [&](const Above::Entry& e) { return score(e) <= above.limit; });
  above.count = above.settled = above.kept = end - above.entries;
}

}  // namespace gemma_ext::sae
