// SPDX-License-Identifier: Apache-2.0
// The head's launches: norms of rows, tiles, rows; with candidates a part of the vocabulary at a time, whose logits
// stay in L2.
#include "candidates.cuh"
#include "rows.cuh"

namespace gemma_ext::depth_batching::cuda {
namespace {

// Logits of a part: 16 MiB.
constexpr int64_t kPartBytes = int64_t{16} << 20;

struct HeadMemory {
  void* x;
  int64_t x_stride, part_tiles;
  TilePart* parts;
  float *logits, *values[2];
  int32_t* ids[2];

  HeadMemory(Arena& memory, const HeadExit& call) {
    const Head& head = call.head;
    const int64_t word = 16 / size_of(head.type), tiles = ceil_div(head.V, kHeadTile);
    x_stride = head.norm_weight ? ceil_div(head.D, word) * word : head.h_stride;
    x = memory.take<uint8_t>(head.norm_weight ? head.n * x_stride * size_of(head.type) : 0);
    parts = memory.take<TilePart>(tiles * head.n);
    part_tiles = tiles;
    const bool lists = call.candidates > 0;
    if (lists) {
      const int64_t most = kPartBytes / (kHeadTile * 4 * (head.n > 0 ? head.n : 1));
      part_tiles = most < 1 ? 1 : most < tiles ? most : tiles;
    }
    logits = memory.take<float>(lists ? head.n * part_tiles * kHeadTile : 0);
    for (int i = 0; i < 2; ++i) {
      values[i] = memory.take<float>(lists ? head.n * kMostCandidates : 0);
      ids[i] = memory.take<int32_t>(lists ? head.n * kMostCandidates : 0);
    }
  }
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

struct HeadNormParams {
  Head head;
  void* x;  // [n, x_stride] in the type of weight
  int64_t x_stride;
};

KERNEL_BOUNDS(kRowNormThreads, 4) void depth_head_norm_kernel(HeadNormParams p) {
  const Head& head = p.head;
  const int64_t row = simt::block_idx(), from = row * head.h_stride;
  const float inverse =
      inverse_rms(head.h, head.h_type, from, head.D, head.norm.eps, simt::shared<float>());
  for (int64_t i = simt::thread_idx(); i < p.x_stride; i += kRowNormThreads) {
    const float y = i < head.D
                        ? normed(element(head.h, head.h_type, from + i), inverse,
                                 element(head.norm_weight, head.norm_type, i), head.norm.plus_one)
                        : 0.0f;
    set_element(p.x, head.type, row * p.x_stride + i, y);
  }
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
  const HeadMemory m(arena, call);
  const Head& head = call.head;
  const int64_t tiles = ceil_div(head.V, kHeadTile);
  if (head.n == 0) return launches.status();
  if (head.norm_weight)
    launches.add(depth_head_norm_kernel, head.n, kRowNormThreads, kRowNormShared,
                 {head, m.x, m.x_stride});
  HeadParams p{call, head.norm_weight ? m.x : head.h,     m.x_stride, m.parts, 0,
               0,    call.candidates ? m.logits : nullptr};
  const int wanted = static_cast<int>(call.candidates);
  int kept = 0, now = 0;
  for (int64_t tile = 0; tile < tiles; tile += m.part_tiles) {
    p.first_tile = tile;
    p.tiles = tiles - tile < m.part_tiles ? tiles - tile : m.part_tiles;
    by_dtype(head.type, [&](auto like) { add_tiles<decltype(like)>(launches, p); });
    if (!wanted) continue;
    const int64_t id0 = tile * kHeadTile, width = p.tiles * kHeadTile;
    const int count = static_cast<int>(head.V - id0 < width ? head.V - id0 : width);
    const int then = kept + count < wanted ? kept + count : wanted;
    launches.add(depth_select_kernel, head.n, kSelectThreads, sizeof(SelectShared),
                 {m.logits, width, id0, count, kept, then, m.values[now], m.ids[now],
                  m.values[1 - now], m.ids[1 - now]});
    kept = then;
    now = 1 - now;
  }
  launches.add(depth_head_row_kernel, ceil_div(head.n, kRowWarps), kRowThreads, 0, p);
  if (wanted)
    launches.add(depth_sort_kernel, head.n, kSelectThreads, kSortShared,
                 {m.values[now], m.ids[now], wanted, call.values, call.indices});
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
