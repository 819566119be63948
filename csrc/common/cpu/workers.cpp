// SPDX-License-Identifier: Apache-2.0
#include "workers.h"

#include <stdlib.h>

#include <algorithm>
#include <atomic>

namespace gemma_ext::cpu {

Scratch::Scratch() = default;

Scratch::~Scratch() {
  for (void* part : parts_) free(part);
}

void* Scratch::part(int index, size_t bytes) noexcept {
  if (sizes_[index] < bytes) {
    free(parts_[index]);
    sizes_[index] = (bytes + 63) / 64 * 64;
    parts_[index] = aligned_alloc(64, sizes_[index]);
    if (!parts_[index]) abort();
  }
  return parts_[index];
}

Workers::Workers(int threads, ParallelFor parallel_for)
    : scratch_(std::max(threads, 1)), parallel_for_(std::move(parallel_for)) {}

void Workers::run(int64_t tasks, const std::function<void(int64_t, Scratch&)>& task) {
  std::atomic<int64_t> next{0};
  parallel_for_(threads(), [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker)
      for (int64_t t = next++; t < tasks; t = next++) task(t, scratch_[worker]);
  });
}

}  // namespace gemma_ext::cpu
