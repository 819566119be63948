// SPDX-License-Identifier: Apache-2.0
#include "ordered.cuh"

namespace gemma_ext::sae::cuda {
namespace {

struct OrderParams {
  OrderCall call;
  Keys from, to;  // sorted by feature, to be sorted by row; then sorted
  int* counts;
};

DEVICE int64_t first_of() { return int64_t{simt::block_idx()} * kThreads + simt::thread_idx(); }
DEVICE int64_t stride_of() { return int64_t{simt::grid_dim()} * kThreads; }

KERNEL_BOUNDS(kThreads, 4)
void clear_counts_kernel(OrderParams p) {
  for (int64_t n = first_of(); n < p.call.N; n += stride_of()) p.counts[n] = 0;
}

KERNEL_BOUNDS(kThreads, 4)
void name_features_kernel(OrderParams p) {
  const int count = *p.call.count;
  for (int64_t i = first_of(); i < p.call.room; i += stride_of()) {
    p.to.key[i] = i < count ? static_cast<uint32_t>(p.call.entries[i].feature) : 0;
    p.to.id[i] = static_cast<int>(i);
    if (i < count) simt::atomic_add(&p.counts[p.call.entries[i].row], 1);
  }
}

// What there is not goes behind the last row.
KERNEL_BOUNDS(kThreads, 4)
void name_rows_kernel(OrderParams p) {
  const int count = *p.call.count;
  for (int64_t i = first_of(); i < p.call.room; i += stride_of()) {
    const int id = p.from.id[i];
    p.to.key[i] = static_cast<uint32_t>(id < count ? p.call.entries[id].row : p.call.N);
    p.to.id[i] = id;
  }
}

KERNEL_BOUNDS(kThreads, 4)
void write_entries_kernel(OrderParams p) {
  const int count = *p.call.count;
  for (int64_t i = first_of(); i < p.call.room; i += stride_of()) {
    const Entry entry = i < count ? p.call.entries[p.from.id[i]] : Entry{0.0f, 0, 0};
    p.call.values[i] = entry.p;
    p.call.indices[i] = entry.feature;
  }
}

}  // namespace

void add_order(Launches& launches, const OrderMemory& m, const OrderCall& call) {
  const int64_t blocks = taking_turns(ceil_div(call.room, kThreads));
  OrderParams p{call, {}, m.by_feature.first(), m.counts};
  launches.add(clear_counts_kernel, taking_turns(ceil_div(call.N, kThreads)), kThreads, 0, p);
  launches.add(name_features_kernel, blocks, kThreads, 0, p);
  add_sort(launches, m.by_feature);
  p.from = m.by_feature.sorted();
  p.to = m.by_row.first();
  launches.add(name_rows_kernel, blocks, kThreads, 0, p);
  add_sort(launches, m.by_row);
  p.from = m.by_row.sorted();
  launches.add(write_entries_kernel, blocks, kThreads, 0, p);
  add_scan(launches, ScanParams<int>{m.counts, call.offsets, call.N});
}

}  // namespace gemma_ext::sae::cuda
