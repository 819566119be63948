// SPDX-License-Identifier: Apache-2.0
// How the rows and features of an encoder are dealt to tasks.
#pragma once

#include <algorithm>

#include "kernels.h"

namespace gemma_ext::sae::cpu {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Row range i and feature range j make task i * parts + j.
struct Plan {
  int64_t N, F;
  int64_t rows, ranges;     // rows of a range
  int64_t features, parts;  // features of a part

  // `row_bytes` is what a task keeps for each row beside the row.
  Plan(const Encoder& e, int64_t row_bytes, int threads) : N(e.N), F(e.F) {
    // packed rows of all threads stay in a shared L3, lists beside them in memory
    constexpr int64_t kPackedBytes = 10 << 20, kListBytes = 64 << 20;
    const Compute compute = kernels().compute(e.dtype);
    const int64_t packed = kPackedBytes / (compute.bytes * std::max<int64_t>(e.D, 1));
    const int64_t most =
        std::clamp<int64_t>(std::min(packed, kListBytes / row_bytes), compute.block_rows, 1 << 16);
    ranges = ceil_div(N, most);
    if (N >= threads * compute.block_rows) ranges = ceil_div(ranges, threads) * threads;
    rows = ceil_div(N, std::max<int64_t>(ranges, 1));
    ranges = rows ? ceil_div(N, rows) : 0;
    // few rows: their features are dealt too, each part with lists of its own
    const int64_t tiles = ceil_div(F, kTile);
    parts = ranges && ranges < threads ? std::min(tiles, ceil_div(2 * threads, ranges)) : 1;
    features = ceil_div(tiles, parts) * kTile;
    parts = ceil_div(F, features);
  }

  int64_t tasks() const { return ranges * parts; }

  EncodeTask task(const Encoder& e, int64_t t) const {
    const int64_t row0 = t / parts * rows, feature0 = t % parts * features;
    return {&e,
            row0,
            std::min(rows, N - row0),
            feature0,
            std::min(F, feature0 + features),
            nullptr,
            nullptr,
            nullptr,
            nullptr};
  }
};

}  // namespace gemma_ext::sae::cpu
