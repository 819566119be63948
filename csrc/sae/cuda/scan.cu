// SPDX-License-Identifier: Apache-2.0
#include "scan.cuh"

namespace gemma_ext::sae::cuda {
namespace {

constexpr int kScanThreads = 1024;

// One block.
template <class T>
KERNEL_BOUNDS(kScanThreads, 1)
void scan_kernel(ScanParams<T> p) {
  int* s_warps = simt::shared<int>();
  int64_t sum = 0;
  for (int64_t first = 0; first < p.count; first += kScanThreads) {
    const int64_t i = first + simt::thread_idx();
    int total = 0;
    const int rank = block_scan(i < p.count ? static_cast<int>(p.counts[i]) : 0, s_warps, total);
    if (i < p.count) p.before[i] = sum + rank;
    sum += total;
  }
  if (simt::thread_idx() == 0) p.before[p.count] = sum;
}

template <class T>
void add_typed_scan(Launches& launches, const ScanParams<T>& p) {
  launches.add(scan_kernel<T>, 1, kScanThreads, kScanThreads / simt::kWarpSize * sizeof(int), p);
}

}  // namespace

void add_scan(Launches& launches, const ScanParams<int>& p) { add_typed_scan(launches, p); }
void add_scan(Launches& launches, const ScanParams<int64_t>& p) { add_typed_scan(launches, p); }

}  // namespace gemma_ext::sae::cuda
