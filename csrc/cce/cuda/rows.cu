// SPDX-License-Identifier: Apache-2.0
#include "rows.cuh"

namespace gemma_ext::cce::cuda {
namespace {

struct RowsParams {
  Head head;
  Rows rows;
};

constexpr int kRowThreads = 1024;

KERNEL void invert_order_kernel(RowsParams p) {
  const int64_t i = int64_t{simt::block_idx()} * kRowThreads + simt::thread_idx();
  if (i >= p.head.V) return;
  const int64_t id = p.head.order[i];
  if (id >= 0 && id < p.head.V) p.rows.inverse[id] = static_cast<int>(i);
}

// One block.
KERNEL void gather_rows_kernel(RowsParams p) {
  const Head& h = p.head;
  int total = 0;
  for (int64_t first = 0; first < h.N; first += kRowThreads) {
    const int64_t i = first + simt::thread_idx();
    int64_t label = h.ignore_index;
    if (i < h.N) {
      label = h.wide_targets ? static_cast<const int64_t*>(h.targets)[i * h.target_stride]
                             : static_cast<const int32_t*>(h.targets)[i * h.target_stride];
    }
    const bool valid = i < h.N && label != h.ignore_index;
    const int before = total;
    const int at = before + block_rank<kRowThreads>(valid, simt::shared<int>(), total);
    if (!valid) continue;
    const bool inside = label >= 0 && label < h.V;
    p.rows.row[at] = static_cast<int>(i);
    p.rows.position[at] = !inside          ? (h.allow_missing ? kMissing : kInvalid)
                          : p.rows.inverse ? p.rows.inverse[label]
                                           : static_cast<int>(label);
  }
  if (simt::thread_idx() == 0) *p.rows.count = total;
}

}  // namespace

void gather_rows(Launches& launches, const Head& head, const Rows& rows) {
  const RowsParams p{head, rows};
  if (head.order)
    launches.add(invert_order_kernel, ceil_div(head.V, kRowThreads), kRowThreads, 0, p);
  launches.add(gather_rows_kernel, 1, kRowThreads, kRowThreads / simt::kWarpSize * sizeof(int), p);
}

}  // namespace gemma_ext::cce::cuda
