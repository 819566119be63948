// SPDX-License-Identifier: Apache-2.0
// Marks of whole rows: places by a stable radix sort of the inverted magnitudes, probabilities, draws.
#include "batches.h"
#include "chunk.cuh"

namespace gemma_ext::souping::cuda {
namespace {

constexpr int kWarps = kThreads / simt::kWarpSize;
constexpr int kDigits = 256;
static_assert(kDigits == kThreads);
constexpr int64_t kSharedRow =
    10240;  // 8 bytes an element and 8 KiB of counters: under the 99 KiB of sm_86

struct SortShared {
  unsigned count[kWarps][kDigits];
  unsigned total[kWarps];
  unsigned same;  // whether all keys have one digit
};

// Inverted, so that ascending is from the largest down; NaN last.
DEVICE uint32_t inverted(uint32_t key) { return key == kNoKey ? 0x7fffffffu : 0x7ffffffeu - key; }
DEVICE float size_of_inverted(uint32_t key) {
  return key == 0x7fffffffu ? 0.0f : from_bits(0x7ffffffeu - key);
}

// Where each warp's elements of each digit go: exclusive sums, digit by digit, warp by warp. Thread d has digit d.
DEVICE void scan_counts(SortShared* s, int64_t c) {
  const int d = simt::thread_idx();
  unsigned mine = 0;
  for (int w = 0; w < kWarps; ++w) mine += s->count[w][d];
  unsigned up_to = mine;
  UNROLL
  for (int step = 1; step < simt::kWarpSize; step *= 2) {
    const unsigned other = simt::shfl_up(up_to, step);
    if (simt::lane_idx() >= step) up_to += other;
  }
  if (simt::lane_idx() == simt::kWarpSize - 1) s->total[simt::warp_idx()] = up_to;
  if (d == 0) s->same = 0;
  simt::sync_block();
  unsigned at = up_to - mine;
  for (int w = 0; w < simt::warp_idx(); ++w) at += s->total[w];
  for (int w = 0; w < kWarps; ++w) {
    const unsigned here = s->count[w][d];
    s->count[w][d] = at;
    at += here;
  }
  if (mine == c) s->same = 1;
  simt::sync_block();
}

// Lanes of the warp with the same digit, of those in `active`.
DEVICE unsigned peers_of(unsigned digit, unsigned active) {
  UNROLL
  for (int b = 0; b < 8; ++b) {
    const unsigned set = simt::ballot(digit >> b & 1);
    active &= digit >> b & 1 ? set : ~set;
  }
  return active;
}

// Columns in the order of their keys, equals by column; in one of the two buffers.
template <class Index>
DEVICE const Index* sort_row(const uint32_t* keys, int64_t c, Index* one, Index* other,
                             SortShared* s) {
  const Index* from = nullptr;
  Index* to = one;
  const int64_t each = ceil_div(c, kThreads) * simt::kWarpSize;
  const int64_t begin = each * simt::warp_idx(), end = least(begin + each, c);
  unsigned* count = s->count[simt::warp_idx()];
  for (int shift = 0; shift < 32; shift += 8) {
    for (int d = simt::lane_idx(); d < kDigits; d += simt::kWarpSize) count[d] = 0;
    simt::sync_warp();
    for (int64_t i = begin + simt::lane_idx(); i < end; i += simt::kWarpSize) {
      const uint32_t key = keys[from ? from[i] : i];
      simt::atomic_add(&count[key >> shift & 0xff], 1u);
    }
    simt::sync_block();
    scan_counts(s, c);
    const bool sorted = s->same != 0 && (from || shift < 24);
    if (sorted) {
      simt::sync_block();
      continue;
    }
    for (int64_t first = begin; first < end; first += simt::kWarpSize) {
      const int64_t i = first + simt::lane_idx();
      const bool here = i < end;
      const int64_t column = !here ? 0 : from ? static_cast<int64_t>(from[i]) : i;
      const unsigned digit = keys[column] >> shift & 0xff;
      const unsigned peers = peers_of(digit, simt::ballot(here));
      const unsigned below = peers & ((1u << simt::lane_idx()) - 1);
      const unsigned at = count[digit];
      simt::sync_warp();
      if (here && below == 0) count[digit] = at + simt::popcount(peers);
      if (here) to[at + simt::popcount(below)] = static_cast<Index>(column);
      simt::sync_warp();
    }
    simt::sync_block();
    from = to;
    to = to == one ? other : one;
  }
  return from;
}

template <class Index>
KERNEL_BOUNDS(kThreads, kMarkBlocks)
void mark_rows_kernel(MarkParams p) {
  constexpr bool kShared = sizeof(Index) == 2;
  SortShared* s = simt::shared<SortShared>();
  uint32_t* keys = kShared ? simt::shared<uint32_t>(sizeof(SortShared))
                           : p.scratch + simt::block_idx() * 3 * p.longest;
  Index* one = reinterpret_cast<Index*>(keys + p.longest);
  Index* other = one + p.longest;
  const Table& t = p.plan.table;
  for (int64_t item = simt::block_idx(); item < p.rows.size() * t.models;
       item += simt::grid_dim()) {
    const int64_t row = p.rows.from + item / t.models;
    const int m = static_cast<int>(item % t.models);
    const int64_t at = last_not_above(p.rows_before, t.parts, row);
    const Part& part = t.part[at];
    const RowChoice choice = p.choices[m];
    const int64_t c = part.width, in_part = (row - p.rows_before[at]) * c;
    const View source = View::of(t.source[at * t.models + m], 0);
    const View base = View::of(t.base[at], 0);
    simt::sync_block();
    for (int64_t q = simt::thread_idx(); q * kLanes < c; q += kThreads) {
      Octet o = octet_of(q, 0, c);
      o.first += in_part;
      float x[kLanes], b[kLanes];
      widen(fetch_ragged(source, o), source.type, x);
      if (base.there) widen(fetch_ragged(base, o), base.type, b);
      UNROLL
      for (int j = 0; j < kLanes; ++j) {
        const float d = base.there ? x[j] - b[j] : x[j];
        if (o.has(j)) keys[q * kLanes + j] = inverted(magnitude(d));
      }
    }
    simt::sync_block();
    const Index* order = sort_row(keys, c, one, other, s);
    float least_size = 0, most_size = 0;
    if (p.by_value) {
      int64_t last = c - 1;
      while (last > 0 && keys[order[last]] == 0x7fffffffu) --last;
      least_size = size_of_inverted(keys[order[last]]);
      most_size = size_of_inverted(keys[order[0]]);
    }
    simt::sync_block();
    for (int64_t q = simt::thread_idx(); q < c; q += kThreads) {
      const int64_t column = order[q];
      float chance = 1;
      if (choice.draw) {
        chance = p.by_value
                     ? value_probability(choice.low, choice.spread, size_of_inverted(keys[column]),
                                         least_size, most_size)
                     : rank_probability(choice.low, choice.spread, c - 1 - q, c);
      }
      const bool kept = q >= choice.drop && q - choice.drop < choice.keep;
      keys[column] = to_bits(kept ? chance : 0.0f);
    }
    simt::sync_block();
    float* marks = p.marks + m * p.stride + p.marked[at] - p.first + in_part;
    const int64_t begin = part.offset + in_part, end = begin + c;
    const uint32_t model = t.model[at * t.models + m];
    for (int64_t quad = begin / 4 + simt::thread_idx(); quad * 4 < end; quad += kThreads) {
      uint32_t words[4];
      if (choice.draw) philox(part.key, static_cast<uint64_t>(quad), model, kDrop, words);
      UNROLL
      for (int j = 0; j < 4; ++j) {
        const int64_t column = quad * 4 + j - begin;
        if (column < 0 || column >= c) continue;
        const float chance = from_bits(keys[column]);
        marks[column] = !choice.draw || uniform(words[j]) < chance ? chance : 0.0f;
      }
    }
  }
}

int64_t blocks() { return kMarkBlocks * simt::device().multiprocessors; }

}  // namespace

int64_t mark_scratch(int64_t longest) { return longest > kSharedRow ? blocks() * 3 * longest : 0; }

void mark_rows(const MarkParams& p, Launches& launches) {
  const int64_t grid = least(p.rows.size() * p.plan.table.models, blocks());
  if (p.longest > kSharedRow) {
    launches.add(mark_rows_kernel<uint32_t>, grid, kThreads, sizeof(SortShared), p);
  } else {
    const int shared = static_cast<int>(sizeof(SortShared) + p.longest * 8);
    launches.add(mark_rows_kernel<uint16_t>, grid, kThreads, shared, p);
  }
}

}  // namespace gemma_ext::souping::cuda
