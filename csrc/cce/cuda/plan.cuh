// SPDX-License-Identifier: Apache-2.0
// What the backward keeps, decided from the forward's strips before anything is recomputed (the rule:
// docs/kernels/cce.md). Counts stay on the device: the host launches for as many chunks as the worst
// case would need, and those without tiles leave at once.
//   keep(n, j) = exp(max_nj - lse_n) bound_n >= eps ref_n,  or the label's entry is that large
//   mass(n, j) = sum of G over a dropped strip, in units of the largest row coefficient
#pragma once

#include <math.h>

#include <algorithm>

#include "head.cuh"

namespace gemma_ext::cce::cuda {

// G[n, v] = (p (a + q (s - mean)) + class_coef w_v - b 1{v = label}) ds/da
struct Coefficients {
  float lse, a, b, nll, mean, q, class_coef, scale;
};

constexpr int kPlanThreads = 256;
constexpr int kWordRows = 32;

// dE is summed a slice of its columns at a time where few strips are kept: every strip writes its part, and
// every row adds up its own. Otherwise blocks of 128 rows multiply all tiles of which one of them kept a
// strip. At a share of 1/8 nearly all blocks keep nearly all tiles.
constexpr int kSlice = 256;
constexpr int kSparseShare = 8;
constexpr int kSparseChunks = 3;

// A tile of which a block of 128 rows kept strips.
constexpr int kBlockWords = kBlockRows / kWordRows;
struct BlockTile {
  int tile;
  uint32_t keep[kBlockWords];
  int slot[kBlockWords];  // the one before the first kept row of each word
};

// The tiles are worked off in chunks, as many strips at a time as fit; every chunk holds at least one tile.
struct Plan {
  Rows rows;
  int tiles, words, chunks, sparse_chunks;
  int64_t mass_stride, dense_capacity, sparse_capacity;  // in strips; 0: never sparse
  Coefficients* row;                                     // [N]
  float* unit;             // [2] power of two near the largest scale; mean scale
  uint32_t* keep;          // [tiles, words] bit per row
  int* before;             // [tiles, words] kept rows of the tile in earlier words
  int* count;              // [tiles]
  int* begin;              // [tiles] first slot, in its chunk
  int* task;               // [tiles] first task of 128 slots, in its chunk
  int* chunk_tile;         // [chunks + 1] first tile of each chunk
  int* chunk_tasks;        // [chunks]
  int* sparse;             // [1] whether this call is
  int* list;               // [capacity] compact row of each slot of the chunk at hand
  int* list_row;           // [capacity] its row of e
  void* strips;            // [capacity, kTile] gradients of the chunk, in the head's dtype
  float* parts;            // [sparse capacity, kSlice] of dE
  BlockTile* block_tiles;  // [row blocks, tiles] of the chunk
  int* block_tile_count;   // [row blocks]
  void* mass;              // [tiles, mass_stride] in the head's dtype
  float* bias_push;        // [tiles] sum of a tile's masses

  Plan(Arena& memory, const Head& h, int64_t strip_bytes, bool need_de, int64_t least_bytes)
      : rows(memory, h), tiles(static_cast<int>(tiles_of(h.V))) {
    const int64_t strip = kTile * size_of(h.dtype), part = kSlice * sizeof(float);
    const int64_t all = tiles * h.N, most = h.N > 0 ? h.N : 1;
    words = static_cast<int>(ceil_div(h.N, kWordRows));
    mass_stride = ceil_div(h.N, 8) * 8;
    const int64_t wanted = strip_bytes / strip / most;
    const int64_t per_chunk = wanted < 1 ? 1 : wanted < tiles ? wanted : tiles;
    dense_capacity = per_chunk * h.N;
    const int dense_chunks = static_cast<int>(ceil_div(tiles, per_chunk));
    sparse_capacity = strip_bytes / (strip + part);
    if (sparse_capacity > all) sparse_capacity = all;
    if (!need_de || sparse_capacity <= h.N) sparse_capacity = 0;
    sparse_chunks = sparse_capacity > 0 ? kSparseChunks : 0;
    chunks = dense_chunks > sparse_chunks ? dense_chunks : sparse_chunks;
    const int64_t capacity = dense_capacity > sparse_capacity ? dense_capacity : sparse_capacity;
    const int64_t dense = dense_capacity * strip, sparse_bytes = sparse_capacity * (strip + part);
    row = memory.take<Coefficients>(h.N);
    unit = memory.take<float>(2);
    keep = memory.take<uint32_t>(int64_t{tiles} * words);
    before = memory.take<int>(int64_t{tiles} * words);
    count = memory.take<int>(tiles);
    begin = memory.take<int>(tiles);
    task = memory.take<int>(tiles);
    chunk_tile = memory.take<int>(chunks + 1);
    chunk_tasks = memory.take<int>(chunks);
    sparse = memory.take<int>(1);
    list = memory.take<int>(capacity);
    list_row = memory.take<int>(capacity);
    char* both = memory.take<char>(std::max({dense, sparse_bytes, least_bytes}));
    strips = both;
    parts = reinterpret_cast<float*>(both + sparse_capacity * strip);
    const int64_t blocks = need_de ? ceil_div(h.N, kBlockRows) : 0;
    block_tiles = memory.take<BlockTile>(blocks * tiles);
    block_tile_count = memory.take<int>(blocks);
    mass = memory.take<char>(tiles * mass_stride * size_of(h.dtype));
    bias_push = memory.take<float>(tiles);
  }
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
  c.nll = p.up.nll[from];
  c.b = p.up.d_nll[from];
  c.a = c.b + (p.lse2_coef ? 2.0f * p.lse2_coef[from] * c.lse : p.up.d_lse[from]);
  if (p.up.d_mean) {
    c.mean = p.up.mean[from];
    c.q = p.up.d_mean[from];
    c.a += c.q;
  }
  if (p.up.d_class) c.class_coef = p.up.d_class[from];
  const bool nan = isnan(c.a) || isnan(c.b);
  if (p.rows.position[r] < 0) c.b = 0.0f;
  c.scale = fmaxf(fmaxf(fabsf(c.a), fabsf(c.b)), fmaxf(fabsf(c.q), fabsf(c.class_coef)));
  if (nan) c.scale = kInfinity;
  p.row[r] = c;
}

// One block.
KERNEL void unit_kernel(CoefficientParams p) {
  double* s_sum = simt::shared<double>();
  float* s_max = simt::shared<float>(kPlanThreads * sizeof(double));
  const int t = simt::thread_idx(), count = *p.rows.count;
  double sum = 0;
  float largest = 0.0f;
  for (int r = t; r < count; r += kPlanThreads) {
    const float scale = p.row[r].scale;
    sum += scale;
    largest = fmaxf(largest, scale < kInfinity ? scale : 0.0f);
  }
  s_sum[t] = sum;
  s_max[t] = largest;
  simt::sync_block();
  if (t != 0) return;
  for (int i = 1; i < kPlanThreads; ++i) {
    sum += s_sum[i];
    largest = fmaxf(largest, s_max[i]);
  }
  // within what 1 / unit can say
  const int exponent = largest > 0x1p-100f ? ilogbf(largest) : largest > 0.0f ? -100 : 0;
  p.unit[0] = ldexpf(1.0f, exponent < 100 ? exponent : 100);
  p.unit[1] = count > 0 ? static_cast<float>(sum / count) : 0.0f;
}

inline void add_coefficients(Launches& launches, int64_t N, const CoefficientParams& p) {
  launches.add(coefficients_kernel, ceil_div(N, kPlanThreads), kPlanThreads, 0, p);
  launches.add(unit_kernel, 1, kPlanThreads, kPlanThreads * 12, p);
}

struct PlanParams {
  Head head;
  Plan plan;
  bool exact_elsewhere;  // a call that keeps everything has kernels of its own: no chunk has tiles
  const float* stats;
  const double* summary;
};

DEVICE double eps_of(const double* summary) { return summary ? summary[3] : 0.0; }

// 256 rows of one tile: keep bits and masses.
template <class T>
KERNEL void keep_kernel(PlanParams p) {
  const Plan& plan = p.plan;
  const int64_t N = p.head.N, spans = (N + kPlanThreads - 1) / kPlanThreads;
  const int64_t tile = simt::block_idx() / spans;
  const int64_t r = simt::block_idx() % spans * kPlanThreads + simt::thread_idx();
  const double eps = eps_of(p.summary);
  const bool valid = r < *plan.rows.count;
  bool kept = false;
  float mass = 0.0f;
  if (valid) {
    const Coefficients& c = plan.row[r];
    kept = !(c.scale == 0.0f);
    if (kept && eps != 0) {
      const int64_t at = tile * N + r, plane = plan.tiles * N;
      const float top = p.stats[at], sum = p.stats[plane + at], slope = p.stats[2 * plane + at];
      const float peak = expf(top - c.lse);
      const float reference = c.scale < plan.unit[1] ? c.scale : plan.unit[1];
      const float threshold = static_cast<float>(eps) * reference;
      const float bound = fabsf(c.a) + fabsf(c.q) * fmaxf(fabsf(top - c.mean), 1.0f);
      kept = !(peak * bound < threshold);
      const int position = plan.rows.position[r];
      if (!kept && position >= 0 && position / kTile == tile) {
        kept = !(fabsf(c.a * expf(-c.nll) - c.b) < threshold);
      }
      if (!kept) {
        float coef = c.a;
        if (c.q != 0.0f && sum > 0.0f) coef += c.q * (p.stats[3 * plane + at] / sum - c.mean);
        mass = peak * slope * coef * p.head.map.scale / plan.unit[0];
      }
    }
  }
  const unsigned bits = simt::ballot(kept);
  if (simt::lane_idx() == 0 && r < N) plan.keep[tile * plan.words + r / kWordRows] = bits;
  if (eps != 0 && r < plan.mass_stride) {
    static_cast<T*>(plan.mass)[tile * plan.mass_stride + r] = narrow<T>(mass);
  }
}

// One warp per tile: places of the kept rows, and the sum of the masses.
template <class T>
KERNEL void count_kernel(PlanParams p) {
  const Plan& plan = p.plan;
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
  float mass = 0.0f;
  if (eps_of(p.summary) != 0) {
    const T* masses = static_cast<const T*>(plan.mass) + tile * plan.mass_stride;
    for (int64_t r = lane; r < plan.mass_stride; r += simt::kWarpSize) mass += widen(masses[r]);
  }
  UNROLL
  for (int step = 1; step < simt::kWarpSize; step *= 2) mass += simt::shfl_xor(mass, step);
  if (lane == 0) {
    plan.count[tile] = total;
    plan.bias_push[tile] = mass;
  }
}

// Whether all strips surely fit into the chunks that are launched for it: a chunk is closed with at most N
// slots free.
DEVICE bool is_sparse(const Plan& plan, int64_t kept, int64_t rows, int64_t N) {
  const int64_t capacity = plan.sparse_capacity;
  const bool fits = kept <= capacity || kept <= kSparseChunks * (capacity - N);
  return capacity > 0 && fits && kept * kSparseShare <= rows * plan.tiles;
}

// One block: tiles into chunks, in order, as many as fit.
KERNEL void chunk_kernel(PlanParams p) {
  const Plan& plan = p.plan;
  int* s_count = simt::shared<int>();
  const int t = simt::thread_idx();
  int64_t kept = 0;
  for (int first = 0; first < plan.tiles; first += kPlanThreads) {
    if (first + t < plan.tiles) s_count[t] = plan.count[first + t];
    simt::sync_block();
    for (int i = 0; t == 0 && i < kPlanThreads && first + i < plan.tiles; ++i) kept += s_count[i];
    simt::sync_block();
  }
  const bool sparse = is_sparse(plan, kept, *plan.rows.count, p.head.N);  // of thread 0
  const int64_t capacity = sparse ? plan.sparse_capacity : plan.dense_capacity;
  if (t == 0) *plan.sparse = sparse;
  int chunk = 0, slots = 0, tasks = 0;
  const int first_tile = p.exact_elsewhere && eps_of(p.summary) == 0 ? plan.tiles : 0;
  for (int first = first_tile; first < plan.tiles; first += kPlanThreads) {
    if (first + t < plan.tiles) s_count[t] = plan.count[first + t];
    simt::sync_block();
    for (int i = 0; t == 0 && i < kPlanThreads && first + i < plan.tiles; ++i) {
      const int count = s_count[i];
      if (slots + int64_t{count} > capacity) {
        plan.chunk_tasks[chunk++] = tasks;
        plan.chunk_tile[chunk] = first + i;
        slots = tasks = 0;
      }
      plan.begin[first + i] = slots;
      plan.task[first + i] = tasks;
      slots += count;
      tasks += (count + kBlockRows - 1) / kBlockRows;
    }
    simt::sync_block();
  }
  if (t != 0) return;
  plan.chunk_tile[0] = first_tile;
  for (; chunk < plan.chunks; ++chunk, tasks = 0) {
    plan.chunk_tasks[chunk] = tasks;
    plan.chunk_tile[chunk + 1] = plan.tiles;
  }
}

struct ListParams {
  Plan plan;
  int chunk;
};

// A block per tile of the chunk.
KERNEL void list_kernel(ListParams p) {
  const Plan& plan = p.plan;
  const int64_t tile = plan.chunk_tile[p.chunk] + simt::block_idx();
  if (tile >= plan.chunk_tile[p.chunk + 1]) return;
  for (int word = simt::thread_idx(); word < plan.words; word += kPlanThreads) {
    const int64_t at = tile * plan.words + word;
    int slot = plan.begin[tile] + plan.before[at];
    const uint32_t bits = plan.keep[at];
    for (int i = 0; i < kWordRows; ++i) {
      if (!(bits >> i & 1)) continue;
      plan.list[slot] = word * kWordRows + i;
      plan.list_row[slot++] = plan.rows.row[word * kWordRows + i];
    }
  }
}

}  // namespace gemma_ext::cce::cuda
