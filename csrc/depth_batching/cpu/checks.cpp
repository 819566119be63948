// SPDX-License-Identifier: Apache-2.0
// Numbers of a call that would lead out of its tensors.
#include "engine.h"
#include "propagate_engine.h"

namespace gemma_ext::depth_batching::cpu {
namespace {

Wrong outside(const char* what, int64_t at, int64_t value, int64_t begin, int64_t end) {
  return value < begin || value >= end ? Wrong{what, at, value, begin, end} : Wrong{};
}

// Request, position and loop of row i.
Wrong wrong_place(const Places& p, int64_t i) {
  Wrong wrong = outside("row_req", i, p.req[i], -1, p.requests);
  if (wrong.what || p.req[i] < 0) return wrong;
  wrong = outside("row_pos", i, p.pos[i], 0, p.max_pages * kPage);
  return wrong.what ? wrong : outside("row_loop", i, p.loop[i], 0, p.loops);
}

// Pages of the positions first .. pos of row i.
Wrong wrong_page(const Places& p, const Pool& pool, int64_t i, int32_t first) {
  for (int64_t page = first / kPage; page <= p.pos[i] / kPage; ++page) {
    const int64_t at = p.req[i] * p.max_pages + page;
    const Wrong wrong = outside("block_tables", at, p.block_tables[at], 0, pool.pages);
    if (wrong.what) return wrong;
  }
  return {};
}

Wrong wrong_list(const char* what, const int32_t* list, int64_t count, int64_t end) {
  for (int64_t i = 0; list && i < count; ++i) {
    const Wrong wrong = outside(what, i, list[i], 0, end);
    if (wrong.what) return wrong;
  }
  return {};
}

// first(i): the first position that row i reads or writes.
template <class First>
Wrong wrong_rows(const Places& p, const Pool& pool, const First& first) {
  for (int64_t i = 0; i < p.n; ++i) {
    Wrong wrong = wrong_place(p, i);
    if (!wrong.what && p.req[i] >= 0) wrong = wrong_page(p, pool, i, first(i));
    if (wrong.what) return wrong;
  }
  return {};
}

Wrong wrong_layer(const RopeWrite& c, const int32_t* depth_of, const int32_t* rope_of) {
  const Wrong wrong = wrong_list("depth_of", depth_of, c.places.loops, c.pool.depths);
  if (wrong.what || !c.rope) return wrong;
  return wrong_list("rope_of", rope_of, c.places.loops, c.settings);
}

Wrong wrong_write(const RopeWrite& c) {
  Wrong wrong = wrong_rows(c.places, c.pool, [&](int64_t i) { return c.places.pos[i]; });
  for (int64_t i = 0; !wrong.what && c.rope && i < c.places.n; ++i)
    if (c.places.req[i] >= 0)
      wrong = outside("row_pos of rope", i, c.places.pos[i], 0, c.positions);
  return wrong;
}

}  // namespace

Wrong find_wrong(const Compact&) { return {}; }

Wrong find_wrong(const RopeWrite& c) {
  const Wrong wrong = wrong_layer(c, c.depth_of, c.rope_of);
  return wrong.what ? wrong : wrong_write(c);
}

Wrong find_wrong(const Propagate& c) {
  const RopeWrite write = write_of(c);
  Wrong wrong;
  for (int at = 0; !wrong.what && at < c.count; ++at)
    wrong = wrong_layer(write, c.layers[at].depth_of, c.layers[at].rope_of);
  return wrong.what ? wrong : wrong_write(write);
}

Wrong find_wrong(const Attention& a) {
  const Wrong wrong = wrong_list("depth_of", a.depth_of, a.places.loops, a.pool.depths);
  return wrong.what ? wrong
                    : wrong_rows(a.places, a.pool, [&](int64_t i) { return first_token(a, i); });
}

Wrong find_wrong(const Copy& c) {
  const Wrong wrong = wrong_list("depths", c.depths, c.layers * c.places.loops, c.pool.depths);
  return wrong.what ? wrong
                    : wrong_rows(c.places, c.pool, [&](int64_t i) { return c.places.pos[i]; });
}

}  // namespace gemma_ext::depth_batching::cpu
