// SPDX-License-Identifier: Apache-2.0
// Rows by the loop they run next; K and V of skipped loops.
#include "launches.h"

namespace gemma_ext::depth_batching::cuda {
namespace {

constexpr int kSorters = 128, kCopiers = 128;

// One block. Thread t has a stretch of rows and counts them by kind; the counts, by kind and then by thread, summed
// up to each, are where its rows go.
KERNEL_BOUNDS(kSorters, 1)
void compact_kernel(Compact c) {
  int* s_next = simt::shared<int>();                 // [kinds, kSorters]
  int* s_warps = s_next + (c.loops + 2) * kSorters;  // [kSorters / 32]
  const int t = simt::thread_idx(), lane = simt::lane_idx(), kinds = c.loops + 2;
  const int64_t each = ceil_div(c.n, kSorters), begin = t * each;
  const int64_t end = begin + each < c.n ? begin + each : c.n;
  for (int kind = 0; kind < kinds; ++kind) s_next[kind * kSorters + t] = 0;
  for (int64_t i = begin; i < end; ++i) ++s_next[kind_of(c, i) * kSorters + t];
  simt::sync_block();
  int own = 0;
  for (int i = 0; i < kinds; ++i) own += s_next[t * kinds + i];
  int before = own;
  UNROLL
  for (int step = 1; step < simt::kWarpSize; step *= 2) {
    const int left = simt::shfl_up(before, step);
    if (lane >= step) before += left;
  }
  if (lane == simt::kWarpSize - 1) s_warps[simt::warp_idx()] = before;
  simt::sync_block();
  before -= own;
  for (int warp = 0; warp < simt::warp_idx(); ++warp) before += s_warps[warp];
  for (int i = 0; i < kinds; ++i) {
    const int count = s_next[t * kinds + i];
    s_next[t * kinds + i] = before;
    before += count;
  }
  simt::sync_block();
  for (int loop = t; loop <= c.loops; loop += kSorters)
    c.seg_offsets[loop] = s_next[loop * kSorters];
  if (t == 0) {
    const int leave = s_next[c.loops * kSorters], drop = s_next[(c.loops + 1) * kSorters];
    c.counts[0] = leave;
    c.counts[1] = drop - leave;
    c.counts[2] = static_cast<int>(c.n) - drop;
  }
  simt::sync_block();
  for (int64_t i = begin; i < end; ++i) {
    const int kind = kind_of(c, i), to = s_next[kind * kSorters + t]++;
    c.order[to] = static_cast<int>(i);
    c.next_loop[to] = kind < c.loops ? kind : -1;
  }
}

// A block per row and layer.
template <class T>
KERNEL_BOUNDS(kCopiers, 8)
void kv_copy_kernel(Copy c) {
  const Places& p = c.places;
  const int64_t i = simt::block_idx() / c.layers, layer = simt::block_idx() % c.layers;
  if (!is_place(p, i)) return;
  const int64_t page = p.block_tables[p.req[i] * p.max_pages + p.pos[i] / kPage];
  if (page < 0 || page >= c.pool.pages) return;
  const int32_t* depths = c.depths + layer * p.loops;
  const int from = p.loop[i], offset = p.pos[i] % kPage;
  const auto is_depth = [&](int64_t depth) { return depth >= 0 && depth < c.pool.depths; };
  T* pool = static_cast<T*>(c.pool.data);
  for (int j = from + 1; j < p.loops; ++j) {
    if (!is_copied(depths, from, j) || !is_depth(depths[from]) || !is_depth(depths[j])) continue;
    const int64_t source = page_at(c.pool, depths[from], page, 0, 0);
    const int64_t target = page_at(c.pool, depths[j], page, 0, 0);
    for (int64_t e = simt::thread_idx(); e < 2 * c.pool.heads * c.pool.width; e += kCopiers) {
      const int64_t at = (e / c.pool.width * kPage + offset) * c.pool.width + e % c.pool.width;
      pool[target + at] = pool[source + at];
    }
  }
  if (c.marks && layer == 0 && simt::thread_idx() == 0) {
    uint8_t* mark = c.marks + page * kPage + offset;
    if (*mark < p.loops) *mark = static_cast<uint8_t>(p.loops);
  }
}

}  // namespace

int64_t workspace(const Compact&) { return 0; }
int64_t workspace(const Copy&) { return 0; }

Status run(const Compact& call, void*, Stream stream) {
  Launches launches(stream);
  const int64_t ints = (call.loops + 2) * kSorters + kSorters / simt::kWarpSize;
  launches.add(compact_kernel, 1, kSorters, static_cast<int>(ints * sizeof(int)), call);
  return launches.status();
}

Status run(const Copy& call, void*, Stream stream) {
  Launches launches(stream);
  by_dtype(call.pool.type, [&](auto like) {
    launches.add(kv_copy_kernel<decltype(like)>, call.places.n * call.layers, kCopiers, 0, call);
  });
  return launches.status();
}

const char* status_text(Status status) {
  return simt::status_text(static_cast<simt::Status>(status));
}

}  // namespace gemma_ext::depth_batching::cuda
