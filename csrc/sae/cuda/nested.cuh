// SPDX-License-Identifier: Apache-2.0
// A token's entries by level.
#pragma once

#include "lists.cuh"

namespace gemma_ext::sae::cuda {

struct Levels {
  int width[kMostWidths];
  int count = 0;  // none
  bool by_place = false;

  Levels() : width{} {}
  explicit Levels(const Nested& call)
      : width{}, count(static_cast<int>(call.levels)), by_place(!call.widths) {
    for (int m = 0; call.widths && m < count; ++m) width[m] = static_cast<int>(call.widths[m]);
  }

  // Of a feature at `place` of its token's list; `count`: none. What names no feature is in the first.
  DEVICE int of(const List& list, int64_t place, int index) const {
    if (by_place) return static_cast<int>(place);
    if (!is_feature(list, index)) return 0;
    int m = 0;
    while (m < count && index >= width[m]) ++m;
    return m;
  }
};

struct LevelShared {
  Staged staged;
  int64_t entry[kStaged];
  int64_t next;
  int count;
};

// Entries of a level from place `from` of the token's on, as many as there is room for, in their order; s.next is
// where to go on. By the whole block, with two barriers.
DEVICE void stage_level(const List& list, const Levels& levels, const Span& span, int level,
                        int64_t from, LevelShared& s) {
  simt::sync_block();
  if (simt::warp_idx() == 0) {
    int64_t at = from;
    int count = 0;
    if (levels.by_place) {
      at = span.begin + level;
      if (simt::lane_idx() == 0 && at < span.end) {
        stage_entry(list, at, 0, s.staged);
        s.entry[0] = at;
      }
      count = at < span.end;
      at = span.end;
    }
    for (; at < span.end && count + simt::kWarpSize <= kStaged; at += simt::kWarpSize) {
      const int64_t e = at + simt::lane_idx();
      const bool mine = e < span.end && levels.of(list, e - span.begin, list.indices[e]) == level;
      const unsigned votes = simt::ballot(mine);
      if (mine) {
        const int i = count + simt::popcount(votes & ((1u << simt::lane_idx()) - 1));
        stage_entry(list, e, i, s.staged);
        s.entry[i] = e;
      }
      count += simt::popcount(votes);
    }
    if (simt::lane_idx() == 0) {
      s.next = at;
      s.count = count;
    }
  }
  simt::sync_block();
}

// f() for every stage of the entries of a level.
template <class F>
DEVICE void each_stage(const List& list, const Levels& levels, const Span& span, int level,
                       LevelShared& s, F f) {
  for (int64_t from = span.begin; from < span.end; from = s.next) {
    stage_level(list, levels, span, level, from, s);
    f();
  }
}

}  // namespace gemma_ext::sae::cuda
