// SPDX-License-Identifier: Apache-2.0
// The shortlist's launches: rows, bounds and the best of them a part of the vocabulary at a time, logits, verdicts.
#include "shortlist.cuh"

#include "best_lists.h"
#include "head_rows.h"

namespace gemma_ext::depth_batching::cuda {
namespace {

struct ShortlistMemory {
  HeadRows rows;
  float* lengths;
  BoundPart* parts;
  int64_t listed;
  BestLists best;
  float* upper;
  int32_t* ids;
  float* logits;

  ShortlistMemory(Arena& memory, const Shortlist& call)
      : rows(memory, call.head),
        lengths(memory.take<float>(call.head.n)),
        parts(memory.take<BoundPart>(ceil_div(call.head.V, kHeadTile) * call.head.n)),
        listed(call.candidates < call.head.V ? call.candidates + 1 : call.candidates),
        best(memory, call.head, listed),
        upper(memory.take<float>(call.head.n * listed)),
        ids(memory.take<int32_t>(call.head.n * listed)),
        logits(memory.take<float>(call.head.n * call.candidates)) {}
};

template <class T>
void add_screen(Launches& launches, const ScreenParams& p) {
  const int64_t n = p.call.head.n;
  const auto add = [&](auto of) {
    using Tile = typename decltype(of)::type;
    launches.add(depth_screen_kernel<Tile>, p.tiles * ceil_div(n, Tile::kRows), Tile::kThreads,
                 Lines<Tile>::kSharedBytes, p);
  };
  if (n > 16) return add(std::type_identity<CodeTile<T, 64>>{});
  add(std::type_identity<CodeTile<T, 16>>{});
}

template <class T>
void add_exact(Launches& launches, const ExactParams& p) {
  using Tile = FeatureTile<T, 64, 16>;
  launches.add(depth_exact_kernel<Tile>, p.head.n * ceil_div(p.count, Tile::kFeatures),
               Tile::kThreads, Lines<Tile>::kSharedBytes, p);
}

}  // namespace

int64_t workspace(const Shortlist& call) {
  Arena memory(nullptr);
  ShortlistMemory all(memory, call);
  return memory.bytes();
}

Status run(const Shortlist& call, void* memory, Stream stream) {
  Launches launches(stream);
  Arena arena(memory);
  ShortlistMemory m(arena, call);
  const Head& head = call.head;
  const int64_t tiles = ceil_div(head.V, kHeadTile);
  if (head.n == 0) return launches.status();
  m.rows.add(launches, m.lengths);
  ScreenParams p{call,
                 m.rows.x,
                 m.rows.stride,
                 m.lengths,
                 127.0f * sqrtf(static_cast<float>(head.D)),
                 slip_of(head.type, head.D),
                 m.parts,
                 0,
                 0,
                 m.best.logits};
  for (int64_t tile = 0; tile < tiles; tile += m.best.part_tiles) {
    p.first_tile = tile;
    p.tiles = tiles - tile < m.best.part_tiles ? tiles - tile : m.best.part_tiles;
    by_dtype(head.type, [&](auto like) { add_screen<decltype(like)>(launches, p); });
    m.best.add(launches, tile, p.tiles);
  }
  m.best.sort(launches, m.upper, m.ids);
  const ExactParams exact{head,     m.rows.x,        m.rows.stride, m.ids,
                          m.listed, call.candidates, m.logits};
  by_dtype(head.type, [&](auto like) { add_exact<decltype(like)>(launches, exact); });
  launches.add(depth_verdict_kernel, head.n, kVerdictThreads, sizeof(VerdictShared),
               {call, m.parts, m.upper, m.ids, m.listed, m.logits});
  return launches.status();
}

}  // namespace gemma_ext::depth_batching::cuda
