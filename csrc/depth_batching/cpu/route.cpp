// SPDX-License-Identifier: Apache-2.0
// Rows by the loop they run next; K and V of skipped loops.
#include <string.h>

#include <vector>

#include "engine.h"

namespace gemma_ext::depth_batching::cpu {

void run(const Compact& c, Workers&) {
  std::vector<int32_t> next(c.loops + 3);
  for (int64_t i = 0; i < c.n; ++i) ++next[kind_of(c, i) + 1];
  for (int32_t kind = 0; kind < c.loops + 2; ++kind) next[kind + 1] += next[kind];
  memcpy(c.seg_offsets, next.data(), (c.loops + 1) * sizeof(int32_t));
  c.counts[0] = next[c.loops];
  c.counts[1] = next[c.loops + 1] - next[c.loops];
  c.counts[2] = next[c.loops + 2] - next[c.loops + 1];
  for (int64_t i = 0; i < c.n; ++i) {
    const int kind = kind_of(c, i);
    const int32_t to = next[kind]++;
    c.order[to] = int32_t(i);
    c.next_loop[to] = kind < c.loops ? kind : -1;
  }
}

void run(const Copy& c, Workers& workers) {
  const Places& p = c.places;
  const int64_t bytes = c.pool.width * size_of(c.pool.type);
  char* pool = static_cast<char*>(c.pool.data);
  workers.run(p.n, [&](int64_t i, Scratch&) {
    if (p.req[i] < 0) return;
    const int32_t page = p.block_tables[p.req[i] * p.max_pages + p.pos[i] / kPage];
    const int32_t offset = p.pos[i] % kPage;
    for (int64_t layer = 0; layer < c.layers; ++layer) {
      const int32_t* depths = c.depths + layer * p.loops;
      for (int j = p.loop[i] + 1; j < p.loops; ++j) {
        if (!is_copied(depths, p.loop[i], j)) continue;
        for (int64_t run = 0; run < 2 * c.pool.heads; ++run) {
          const auto at = [&](int32_t depth) {
            const int64_t page_begin = page_at(c.pool, depth, page, 0, run);
            return pool + page_begin * size_of(c.pool.type) + offset * bytes;
          };
          memcpy(at(depths[j]), at(depths[p.loop[i]]), bytes);
        }
      }
    }
    uint8_t* mark = c.marks ? c.marks + page * int64_t{kPage} + offset : nullptr;
    if (mark && *mark < p.loops) *mark = uint8_t(p.loops);
  });
}

}  // namespace gemma_ext::depth_batching::cpu
