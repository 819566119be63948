// SPDX-License-Identifier: Apache-2.0
#include "rows.cuh"

namespace gemma_ext::cce::cuda {
namespace {

struct RowsParams {
  Head head;
  Rows rows;
};

constexpr int kRowThreads = 1024;

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
    p.rows.label[at] = inside ? static_cast<int>(label) : h.allow_missing ? kMissing : kInvalid;
  }
  if (simt::thread_idx() == 0) *p.rows.count = total;
}

}  // namespace

void gather_rows(Launches& launches, const Head& head, const Rows& rows) {
  const RowsParams p{head, rows};
  launches.add(gather_rows_kernel, 1, kRowThreads, kRowThreads / simt::kWarpSize * sizeof(int), p);
}

}  // namespace gemma_ext::cce::cuda
