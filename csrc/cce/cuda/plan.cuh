// SPDX-License-Identifier: Apache-2.0
// What the backward computes, drawn from the forward's masses before anything is recomputed (sampling.h).
// Counts stay on the device: the host launches for as many chunks as the worst case would need, and those
// without tiles leave at once.
#pragma once

#include <math.h>

#include <algorithm>

#include "head.cuh"

namespace gemma_ext::cce::cuda {

// G[n, v] = (p (a + q (s - mean)) + class_coef w_v - b 1{v = label}) ds/da; at_label is p a - b there.
struct Coefficients {
  float lse, lse_low, a, at_label, mean, q, class_coef, scale;
};

constexpr int kPlanThreads = 256;
constexpr int kWordRows = 32, kWordTiles = 32;

// dE is summed a slice of its columns at a time where few strips are kept: every strip writes its part, and
// every row adds up its own. Otherwise blocks of 128 rows multiply all tiles of which one of them kept a
// strip.
constexpr int kSlice = 256;

// A tile of which a block of 128 rows kept strips.
constexpr int kBlockWords = kBlockRows / kWordRows;
struct BlockTile {
  int tile;
  uint32_t keep[kBlockWords];
  int slot[kBlockWords];  // the one before the first kept row of each word
};

// How many strips are at hand at a time. A tile has at most N, so chunks of tiles whose first strip lies in
// the same `stride` of all strips hold at most N more.
struct Capacity {
  int64_t dense_tiles;     // of a chunk without a limit on what it keeps
  int64_t sparse, stride;  // strips of a sparse chunk and of its share; 0: never sparse
  int dense_chunks, sparse_chunks;

  // Of a head [N, V]; strip and part: bytes of a strip and of its part of dE.
  Capacity(int64_t N, int64_t tiles, int64_t strip_bytes, int64_t strip, int64_t part,
           bool need_de) {
    const int64_t rows = std::max<int64_t>(N, 1), all = N * tiles;
    dense_tiles = std::clamp<int64_t>(strip_bytes / strip / rows, 1, tiles);
    dense_chunks = static_cast<int>(ceil_div(tiles, dense_tiles));
    sparse = std::min(strip_bytes / (strip + part), all);
    if (!need_de || sparse < 2 * rows) sparse = 0;
    stride = sparse == all ? all : sparse - rows;
    const int64_t most = static_cast<int64_t>(kListedShare * static_cast<double>(all));
    sparse_chunks = sparse > 0 ? static_cast<int>(std::max<int64_t>(1, ceil_div(most, stride))) : 0;
  }
  HOST_DEVICE bool fits(int64_t kept) const { return sparse > 0 && kept <= stride * sparse_chunks; }
};

struct Plan {
  Rows rows;
  int tiles, words, tile_words, chunks;
  Capacity capacity;
  Coefficients* row;       // [N]
  float* unit;             // [2] power of two near the largest scale; mean scale
  uint32_t* keep;          // [tiles, words] bit per row
  uint32_t* keep_row;      // [32 words, tile_words] the same, bit per tile
  int* before;             // [tiles, words] kept rows of the tile in earlier words
  int* count;              // [tiles]
  int64_t* begin;          // [tiles] first slot, of all chunks
  int* task;               // [tiles] first task of 128 slots, of all chunks
  int* chunk_tile;         // [chunks + 1] first tile of each chunk
  int64_t* chunk_begin;    // [chunks + 1] its first slot
  int* chunk_task;         // [chunks + 1] its first task
  int* listed;             // [1] 0: every strip of every row, by kernels that need no lists
  int* sparse;             // [1] dE by slices
  int* list;               // [capacity] compact row of each slot of the chunk at hand
  int* list_row;           // [capacity] its row of e
  float* list_weight;      // [capacity]
  void* strips;            // [capacity, kTile] gradients of the chunk, in the head's dtype
  void* parts;             // [sparse capacity, kSlice] of dE, in the head's dtype
  BlockTile* block_tiles;  // [row blocks, tiles] of the chunk; where lists may hold everything
  int* block_tile_count;   // [row blocks]

  // dense_bytes: of the kernels that need no lists of everything, 0 where there are none.
  Plan(Arena& memory, const Head& h, int64_t strip_bytes, bool need_de, int64_t dense_bytes)
      : rows(memory, h),
        tiles(static_cast<int>(tiles_of(h.V))),
        words(static_cast<int>(ceil_div(h.N, kWordRows))),
        tile_words(static_cast<int>(ceil_div(tiles, kWordTiles))),
        capacity(h.N, tiles, strip_bytes, kTile * size_of(h.dtype), kSlice * size_of(h.dtype),
                 need_de) {
    const int64_t strip = kTile * size_of(h.dtype), part = kSlice * size_of(h.dtype);
    const int64_t dense = dense_bytes ? 0 : capacity.dense_tiles * h.N;
    const int64_t sparse_slots = capacity.sparse;
    const int64_t slots = std::max(dense, sparse_slots);
    chunks = std::max(capacity.dense_chunks, capacity.sparse_chunks);
    row = memory.take<Coefficients>(h.N);
    unit = memory.take<float>(2);
    keep = memory.take<uint32_t>(int64_t{tiles} * words);
    keep_row = memory.take<uint32_t>(int64_t{words} * kWordRows * tile_words);
    before = memory.take<int>(int64_t{tiles} * words);
    count = memory.take<int>(tiles);
    begin = memory.take<int64_t>(tiles);
    task = memory.take<int>(tiles);
    chunk_tile = memory.take<int>(chunks + 1);
    chunk_begin = memory.take<int64_t>(chunks + 1);
    chunk_task = memory.take<int>(chunks + 1);
    listed = memory.take<int>(1);
    sparse = memory.take<int>(1);
    list = memory.take<int>(slots);
    list_row = memory.take<int>(slots);
    list_weight = memory.take<float>(slots);
    char* both =
        memory.take<char>(std::max({dense * strip, sparse_slots * (strip + part), dense_bytes}));
    strips = both;
    parts = both + sparse_slots * strip;
    const int64_t blocks = need_de && !dense_bytes ? ceil_div(h.N, kBlockRows) : 0;
    block_tiles = memory.take<BlockTile>(blocks * tiles);
    block_tile_count = memory.take<int>(blocks);
  }

  DEVICE int first_slot(int chunk, int64_t tile) const {
    return static_cast<int>(begin[tile] - chunk_begin[chunk]);
  }
  DEVICE int tasks(int chunk) const { return chunk_task[chunk + 1] - chunk_task[chunk]; }
};

struct CoefficientParams {
  Rows rows;
  Coefficients* row;
  float* unit;
  Upstream up;
  const float* lse2_coef;  // [N] or null: d_lse = 2 lse2_coef lse
};

KERNEL void coefficients_kernel(CoefficientParams p) {
  const int64_t r = int64_t{simt::block_idx()} * kPlanThreads + simt::thread_idx();
  if (r >= *p.rows.count) return;
  const int from = p.rows.row[r];
  Coefficients c{};
  c.lse = p.up.lse[from];
  c.lse_low = p.up.lse_low[from];
  const float d_nll = p.up.d_nll[from], b = p.rows.label[r] < 0 ? 0.0f : d_nll;
  c.a = d_nll + (p.lse2_coef ? 2.0f * p.lse2_coef[from] * c.lse : p.up.d_lse[from]);
  if (p.up.d_mean) {
    c.mean = p.up.mean[from];
    c.q = p.up.d_mean[from];
    c.a += c.q;
  }
  if (p.up.d_class) c.class_coef = p.up.d_class[from];
  // of p near 1, p - 1 would lose what nll still knows
  c.at_label = c.a * expm1f(-p.up.nll[from]) + (c.a - b);
  c.scale = p.up.scale ? p.up.scale[from]
                       : fmaxf(fmaxf(fabsf(c.a), fabsf(b)), fmaxf(fabsf(c.q), fabsf(c.class_coef)));
  if (isnan(c.a) || isnan(d_nll)) c.scale = kInfinity;
  p.row[r] = c;
}

// One block.
KERNEL void unit_kernel(CoefficientParams p) {
  double* s_sum = simt::shared<double>();
  float* s_max = simt::shared<float>(kPlanThreads * sizeof(double));
  int* s_rows = simt::shared<int>(kPlanThreads * (sizeof(double) + sizeof(float)));
  const int t = simt::thread_idx(), count = *p.rows.count;
  double sum = 0;
  float largest = 0.0f;
  int rows = 0;  // those without a gradient do not count
  for (int r = t; r < count; r += kPlanThreads) {
    const float scale = p.row[r].scale;
    sum += scale;
    rows += scale != 0.0f;
    largest = fmaxf(largest, scale < kInfinity ? scale : 0.0f);
  }
  s_sum[t] = sum;
  s_max[t] = largest;
  s_rows[t] = rows;
  simt::sync_block();
  if (t != 0) return;
  for (int i = 1; i < kPlanThreads; ++i) {
    sum += s_sum[i];
    largest = fmaxf(largest, s_max[i]);
    rows += s_rows[i];
  }
  // within what 1 / unit can say
  const int exponent = largest > 0x1p-100f ? ilogbf(largest) : largest > 0.0f ? -100 : 0;
  p.unit[0] = ldexpf(1.0f, exponent < 100 ? exponent : 100);
  p.unit[1] = rows > 0 ? static_cast<float>(sum / rows) : 0.0f;
}

constexpr int kUnitSharedBytes = kPlanThreads * 16;

inline void add_coefficients(Launches& launches, int64_t N, const CoefficientParams& p) {
  launches.add(coefficients_kernel, ceil_div(N, kPlanThreads), kPlanThreads, 0, p);
  launches.add(unit_kernel, 1, kPlanThreads, kUnitSharedBytes, p);
}

struct PlanParams {
  Head head;
  Plan plan;
  bool exact_elsewhere;  // a call that keeps everything has kernels of its own: no chunk has tiles
  const void* masses;    // of the type that kernels are made for: bf16 in the lean form
  bool has_reach;        // a second plane of masses
  const double* summary;
  int64_t seed;
  int chunk;
};

DEVICE float tau_drawn(const PlanParams& p) {
  return p.summary ? static_cast<float>(p.summary[2]) : 0.0f;
}

// A row's strips: u of tile t, and whether it holds the label.
template <class M>
struct RowShare {
  const M *mass, *reach;  // of the row, a tile per `stride`
  int64_t stride;
  float a, q, threshold;
  int label_tile;

  DEVICE RowShare(const PlanParams& p, float tau, int64_t r)
      : mass(static_cast<const M*>(p.masses) + r), stride(p.head.N) {
    const Plan& plan = p.plan;
    const Coefficients& c = plan.row[r];
    reach = p.has_reach ? mass + plan.tiles * stride : nullptr;
    a = fabsf(c.a);
    q = p.has_reach ? fabsf(c.q) : 0.0f;
    threshold = tau * fminf(c.scale, plan.unit[1]);
    const int label = plan.rows.label[r];
    label_tile = label >= 0 ? label / kTile : -1;
  }
  DEVICE float operator()(int tile) const {
    const float x = a * widen(mass[tile * stride]);
    return (reach ? fmaf(q, widen(reach[tile * stride]), x) : x) / threshold;
  }
};

constexpr int kSampleWarps = 16;
constexpr int kSampleThreads = kSampleWarps * simt::kWarpSize;

// A word of 32 rows, one per lane; each warp has a run of tiles.
template <class M>
KERNEL void sample_kernel(PlanParams p) {
  uint32_t (*s_step)[simt::kWarpSize] = simt::shared<uint32_t[simt::kWarpSize]>();
  const Plan& plan = p.plan;
  const float tau = tau_drawn(p);
  if (p.exact_elsewhere && tau == 0.0f) return;
  const int word = simt::block_idx(), lane = simt::lane_idx(), warp = simt::warp_idx();
  const int64_t r = int64_t{word} * kWordRows + lane;
  const bool alive = r < *plan.rows.count && !(plan.row[r].scale == 0.0f);
  const int run = (plan.tile_words + kSampleWarps - 1) / kSampleWarps * kWordTiles;
  const int first = warp * run, last = lesser(plan.tiles, first + run);
  if (tau == 0.0f) {
    const uint32_t all = simt::ballot(alive);
    for (int t = first; t < last; ++t) {
      if (lane == 0) plan.keep[int64_t{t} * plan.words + word] = all;
      if (t % kWordTiles == 0)
        plan.keep_row[r * plan.tile_words + t / kWordTiles] = alive ? ~0u : 0u;
    }
    return;
  }
  const RowShare<M> share(p, tau, alive ? r : 0);
  uint32_t phase = 0;
  UNROLL_BY(4)
  for (int t = first; t < last; ++t) {
    const float u = share(t);
    phase += t == share.label_tile ? 0u : phase_step(u);
  }
  s_step[warp][lane] = phase;
  simt::sync_block();
  const Coefficients& c = plan.row[alive ? r : 0];
  phase = first_phase(plan.rows.row[alive ? r : 0], simt::bits_of(c.lse), p.seed);
  for (int w = 0; w < warp; ++w) phase += s_step[w][lane];
  uint32_t mine = 0;
  UNROLL_BY(4)
  for (int t = first; t < last; ++t) {
    const float u = share(t);
    bool kept = t == share.label_tile || is_certain(u);
    if (!kept) {
      const uint32_t step = phase_step(u);
      phase += step;
      kept = is_drawn(phase, step);
    }
    const uint32_t bits = simt::ballot(kept && alive);
    if (lane == 0) plan.keep[int64_t{t} * plan.words + word] = bits;
    mine |= static_cast<uint32_t>(kept && alive) << t % kWordTiles;
    if ((t + 1) % kWordTiles == 0 || t + 1 == last) {
      plan.keep_row[r * plan.tile_words + t / kWordTiles] = mine;
      mine = 0;
    }
  }
}

// One warp per tile: places of the kept rows.
KERNEL void count_kernel(PlanParams p) {
  const Plan& plan = p.plan;
  if (p.exact_elsewhere && tau_drawn(p) == 0.0f) return;
  const int64_t tile = simt::block_idx();
  const int lane = simt::lane_idx();
  int total = 0;
  for (int first = 0; first < plan.words; first += simt::kWarpSize) {
    const int word = first + lane;
    const int64_t at = tile * plan.words + word;
    const int mine = word < plan.words ? simt::popcount(plan.keep[at]) : 0;
    int sum = mine;
    UNROLL
    for (int delta = 1; delta < simt::kWarpSize; delta *= 2) {
      const int other = simt::shfl_up(sum, delta);
      if (lane >= delta) sum += other;
    }
    if (word < plan.words) plan.before[at] = total + sum - mine;
    total += simt::shfl(sum, simt::kWarpSize - 1);
  }
  if (lane == 0) plan.count[tile] = total;
}

constexpr int kChunkThreads = 1024;

struct ChunkShared {
  int64_t slots[kChunkThreads];
  int tasks[kChunkThreads];
};

// One block: every tile's chunk and its place there.
KERNEL void chunk_kernel(PlanParams p) {
  ChunkShared& s = *simt::shared<ChunkShared>();
  const Plan& plan = p.plan;
  const Capacity& capacity = plan.capacity;
  const int t = simt::thread_idx();
  const bool all = tau_drawn(p) == 0.0f;
  int64_t slots = 0;
  int tasks = 0;
  for (int first = 0; first < plan.tiles && !(all && p.exact_elsewhere); first += kChunkThreads) {
    const int tile = first + t;
    const int count = tile < plan.tiles ? plan.count[tile] : 0;
    const int mine = (count + kBlockRows - 1) / kBlockRows;
    s.slots[t] = count;
    s.tasks[t] = mine;
    simt::sync_block();
    for (int step = 1; step < kChunkThreads; step *= 2) {
      const int64_t other_slots = t >= step ? s.slots[t - step] : 0;
      const int other_tasks = t >= step ? s.tasks[t - step] : 0;
      simt::sync_block();
      s.slots[t] += other_slots;
      s.tasks[t] += other_tasks;
      simt::sync_block();
    }
    if (tile < plan.tiles) {
      plan.begin[tile] = slots + s.slots[t] - count;
      plan.task[tile] = tasks + s.tasks[t] - mine;
    }
    slots += s.slots[kChunkThreads - 1];
    tasks += s.tasks[kChunkThreads - 1];
    simt::sync_block();
  }
  const bool sparse =
      capacity.fits(slots) && static_cast<double>(slots) <=
                                  kListedShare * *plan.rows.count * static_cast<double>(plan.tiles);
  const bool listed = !p.exact_elsewhere || (!all && sparse);
  if (t == 0) {
    *plan.sparse = sparse;
    *plan.listed = listed;
  }
  const auto chunk_of = [&](int tile) {
    if (tile < 0) return -1;
    if (tile == plan.tiles || !listed) return plan.chunks;
    if (!sparse) return static_cast<int>(tile / capacity.dense_tiles);
    // what is empty behind a full last chunk belongs to it
    return lesser(static_cast<int>(plan.begin[tile] / capacity.stride), capacity.sparse_chunks - 1);
  };
  simt::sync_block();
  // a tile opens its own chunk and the empty ones before it
  for (int tile = t; tile <= plan.tiles; tile += kChunkThreads) {
    const bool end = tile == plan.tiles;
    for (int chunk = chunk_of(tile - 1) + 1; chunk <= chunk_of(tile); ++chunk) {
      plan.chunk_tile[chunk] = tile;
      plan.chunk_begin[chunk] = end || !listed ? slots : plan.begin[tile];
      plan.chunk_task[chunk] = end || !listed ? tasks : plan.task[tile];
    }
  }
}

// A block per tile of the chunk.
template <class M>
KERNEL void list_kernel(PlanParams p) {
  const Plan& plan = p.plan;
  const int tile = plan.chunk_tile[p.chunk] + simt::block_idx();
  if (tile >= plan.chunk_tile[p.chunk + 1]) return;
  const float tau = tau_drawn(p);
  for (int word = simt::thread_idx(); word < plan.words; word += kPlanThreads) {
    const int64_t at = int64_t{tile} * plan.words + word;
    int slot = plan.first_slot(p.chunk, tile) + plan.before[at];
    const uint32_t bits = plan.keep[at];
    for (int i = 0; i < kWordRows; ++i) {
      if (!(bits >> i & 1)) continue;
      const int r = word * kWordRows + i;
      float weight = 1.0f;
      if (tau != 0.0f) {
        const RowShare<M> share(p, tau, r);
        if (tile != share.label_tile) weight = draw_weight(phase_step(share(tile)));
      }
      plan.list[slot] = r;
      plan.list_row[slot] = plan.rows.row[r];
      plan.list_weight[slot++] = weight;
    }
  }
}

}  // namespace gemma_ext::cce::cuda
