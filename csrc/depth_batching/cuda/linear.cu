// SPDX-License-Identifier: Apache-2.0
#include "linear.cuh"

namespace gemma_ext::depth_batching::cuda {
namespace {

// With a null memory only the size is of use.
LinearParams linear_params(const Linear& call, Arena& memory) {
  LinearParams p{};
  p.call = call;
  for (int at = 0; at < call.count; ++at) {
    const int64_t word = 16 / size_of(call.type), rank = call.projections[at].rank;
    p.low_stride[at] = ceil_div(rank, word) * word;
    p.low[at] = memory.take<uint8_t>(call.n * p.low_stride[at] * size_of(call.type));
  }
  return p;
}

// Tiles of every projection's features, or ranks; the number of all.
template <class Count>
int64_t deal_tiles(LinearParams& p, int64_t side, const Count& count) {
  for (int at = 0; at < p.call.count; ++at)
    p.first_tile[at + 1] = p.first_tile[at] + ceil_div(count(at), side);
  for (int at = p.call.count; at < kMostProjections; ++at) p.first_tile[at + 1] = p.first_tile[at];
  return p.first_tile[p.call.count];
}

}  // namespace

int64_t workspace(const Linear& call) {
  Arena memory(nullptr);
  linear_params(call, memory);
  return memory.bytes();
}

Status run(const Linear& call, void* memory, Stream stream) {
  Launches launches(stream);
  Arena arena(memory);
  LinearParams p = linear_params(call, arena);
  const bool gated = call.activation != kNone;
  int64_t ranks = 0;
  for (int at = 0; at < call.count; ++at) ranks += call.projections[at].rank;
  by_dtype(call.type, [&](auto like) {
    using T = decltype(like);
    if (ranks > 0)
      by_rows<T>(call.n, ranks, [&](auto of) {
        using Tile = typename decltype(of)::type;
        const int64_t tiles =
            deal_tiles(p, Tile::kFeatures, [&](int at) { return p.low_stride[at]; });
        launches.add(depth_shrink_kernel<Tile>, tiles * ceil_div(call.n, Tile::kRows),
                     Tile::kThreads, Lines<Tile>::kSharedBytes, p);
      });
    by_rows<T>(call.n, call.y_width * (gated ? 2 : 1), [&](auto of) {
      using Tile = typename decltype(of)::type;
      const int64_t tiles = deal_tiles(p, Tile::kFeatures / (gated ? 2 : 1), [&](int at) {
        return gated && at > 0 ? 0 : call.projections[at].features;
      });
      launches.add(depth_expand_kernel<Tile>, tiles * ceil_div(call.n, Tile::kRows), Tile::kThreads,
                   Lines<Tile>::kSharedBytes, p);
    });
  });
  return launches.status();
}

}  // namespace gemma_ext::depth_batching::cuda
