// SPDX-License-Identifier: Apache-2.0
// The head's launches: norms of rows, tiles, rows; with candidates a part of the vocabulary at a time, whose logits
// stay in L2.
#include "best_lists.h"
#include "head.cuh"
#include "head_rows.h"

namespace gemma_ext::depth_batching::cuda {
namespace {

struct HeadMemory {
  HeadRows rows;
  TilePart* parts;
  BestLists best;

  HeadMemory(Arena& memory, const HeadExit& call)
      : rows(memory, call.head),
        parts(memory.take<TilePart>(ceil_div(call.head.V, kHeadTile) * call.head.n)),
        best(memory, call.head, call.candidates) {}
};

template <class T>
void add_tiles(Launches& launches, const HeadParams& p) {
  const int64_t n = p.call.head.n;
  const auto add = [&](auto of) {
    using Tile = typename decltype(of)::type;
    launches.add(depth_head_kernel<Tile>, p.tiles * ceil_div(n, Tile::kRows), Tile::kThreads,
                 Lines<Tile>::kSharedBytes, p);
  };
  if (n > 64) return add(std::type_identity<WideTile<T>>{});
  if (n > 16) return add(std::type_identity<FeatureTile<T, kHeadTile, 64>>{});
  add(std::type_identity<FeatureTile<T, kHeadTile, 16>>{});
}

constexpr int kNoiseThreads = 128;

KERNEL_BOUNDS(kNoiseThreads, 8) void depth_noise_kernel(Noise c) {
  const int64_t i = int64_t{simt::block_idx()} * kNoiseThreads + simt::thread_idx();
  if (i >= c.n * c.C) return;
  const uint32_t id = static_cast<uint32_t>(c.ids[i]);
  uint32_t words[4];
  noise_words(noise_key(c.keys + 3 * (i / c.C)), id / 4, words);
  const uint32_t low = id % 2 ? words[1] : words[0], high = id % 2 ? words[3] : words[2];
  c.out[i] = gumbel_of(id % 4 < 2 ? low : high);
}

}  // namespace

int64_t workspace(const HeadExit& call) {
  Arena memory(nullptr);
  HeadMemory all(memory, call);
  return memory.bytes();
}

Status run(const HeadExit& call, void* memory, Stream stream) {
  Launches launches(stream);
  Arena arena(memory);
  HeadMemory m(arena, call);
  const Head& head = call.head;
  const int64_t tiles = ceil_div(head.V, kHeadTile);
  if (head.n == 0) return launches.status();
  m.rows.add(launches);
  HeadParams p{call, m.rows.x, m.rows.stride, m.parts, 0, 0, m.best.logits};
  for (int64_t tile = 0; tile < tiles; tile += m.best.part_tiles) {
    p.first_tile = tile;
    p.tiles = tiles - tile < m.best.part_tiles ? tiles - tile : m.best.part_tiles;
    by_dtype(head.type, [&](auto like) { add_tiles<decltype(like)>(launches, p); });
    m.best.add(launches, tile, p.tiles);
  }
  launches.add(depth_head_row_kernel, ceil_div(head.n, kRowWarps), kRowThreads, 0, p);
  m.best.sort(launches, call.values, call.indices);
  return launches.status();
}

int64_t workspace(const Noise&) { return 0; }

Status run(const Noise& call, void*, Stream stream) {
  Launches launches(stream);
  launches.add(depth_noise_kernel, ceil_div(call.n * call.C, kNoiseThreads), kNoiseThreads, 0,
               call);
  return launches.status();
}

}  // namespace gemma_ext::depth_batching::cuda
