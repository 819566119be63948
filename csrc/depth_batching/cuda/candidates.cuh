// SPDX-License-Identifier: Apache-2.0
// The C best of a row, from the logits of one part of the vocabulary after the other and those kept so far: a block a
// row. A radix select finds the key that the last of them has; then those above it are kept, and of those equal to it
// the first, all in the order of their ids.
#pragma once

#include "logits.cuh"

namespace gemma_ext::depth_batching::cuda {

constexpr int kSelectThreads = 256, kSelectEach = 8, kDigits = 256;

struct SelectParams {
  const float* logits;  // [n, width]
  int64_t width, id0;
  int32_t count;             // of the width that are tokens
  int32_t kept;              // of a row so far
  int32_t wanted;            // min(kept + count, C)
  const float* from_values;  // [n, kMostCandidates]
  const int32_t* from_ids;
  float* to_values;  // not those
  int32_t* to_ids;
};

struct SelectShared {
  int32_t digits[kDigits];
  int32_t above, digit;  // of the digit that holds the last wanted: how many are above it
  int32_t warps[kSelectThreads / simt::kWarpSize][2];
};

// Ascends with the value; NaN counts as -inf.
DEVICE uint32_t key_of(float x) {
  const uint32_t bits = simt::bits_of(x == x ? x + 0.0f : kLeast);  // -0 becomes 0
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

KERNEL_BOUNDS(kSelectThreads, 4) void depth_select_kernel(SelectParams p) {
  SelectShared& s = *simt::shared<SelectShared>();
  const int64_t row = simt::block_idx();
  const int t = simt::thread_idx(), total = p.kept + p.count;
  const float* old_values = p.from_values + row * kMostCandidates;
  const int32_t* old_ids = p.from_ids + row * kMostCandidates;
  const float* fresh = p.logits + row * p.width;
  const auto value_at = [&](int i) { return i < p.kept ? old_values[i] : fresh[i - p.kept]; };

  uint32_t prefix = 0;
  int wanted = p.wanted;  // of those that share the prefix
  for (int shift = 24; shift >= 0; shift -= 8) {
    const uint32_t mask = shift == 24 ? 0u : ~0u << (shift + 8);
    s.digits[t] = 0;
    simt::sync_block();
    for (int i = t; i < total; i += kSelectThreads) {
      const uint32_t key = key_of(value_at(i));
      if ((key & mask) == prefix) simt::atomic_add(&s.digits[key >> shift & 255u], 1);
    }
    simt::sync_block();
    if (t == 0) {
      int above = 0, digit = kDigits - 1;
      while (digit > 0 && above + s.digits[digit] < wanted) above += s.digits[digit--];
      s.above = above;
      s.digit = digit;
    }
    simt::sync_block();
    prefix |= static_cast<uint32_t>(s.digit) << shift;
    wanted -= s.above;
    simt::sync_block();
  }

  float* to_values = p.to_values + row * kMostCandidates;
  int32_t* to_ids = p.to_ids + row * kMostCandidates;
  int written = 0, equal = 0;  // so far; of those equal to the key
  for (int begin = 0; begin < total; begin += kSelectThreads * kSelectEach) {
    const int first = begin + t * kSelectEach;
    int mine_above = 0, mine_equal = 0;
    UNROLL
    for (int i = 0; i < kSelectEach; ++i) {
      const uint32_t key = first + i < total ? key_of(value_at(first + i)) : 0u;
      mine_above += first + i < total && key > prefix;
      mine_equal += first + i < total && key == prefix;
    }
    int before_above = mine_above, before_equal = mine_equal;
    UNROLL
    for (int step = 1; step < simt::kWarpSize; step *= 2) {
      const int a = simt::shfl_up(before_above, step), b = simt::shfl_up(before_equal, step);
      if (simt::lane_idx() >= step) {
        before_above += a;
        before_equal += b;
      }
    }
    if (simt::lane_idx() == simt::kWarpSize - 1) {
      s.warps[simt::warp_idx()][0] = before_above;
      s.warps[simt::warp_idx()][1] = before_equal;
    }
    simt::sync_block();
    int all_above = 0, all_equal = 0;
    before_above -= mine_above;
    before_equal -= mine_equal;
    for (int w = 0; w < kSelectThreads / simt::kWarpSize; ++w) {
      if (w < simt::warp_idx()) {
        before_above += s.warps[w][0];
        before_equal += s.warps[w][1];
      }
      all_above += s.warps[w][0];
      all_equal += s.warps[w][1];
    }
    // those equal to the key that came before, as far as they are wanted
    const auto taken = [&](int count) { return count < wanted ? count : wanted; };
    int seen = equal + before_equal;
    int to = written + before_above + taken(seen) - taken(equal);
    for (int i = first; i < first + kSelectEach && i < total; ++i) {
      const float x = value_at(i);
      const uint32_t key = key_of(x);
      if (key < prefix || (key == prefix && seen++ >= wanted)) continue;
      to_values[to] = x == x ? x : kLeast;
      to_ids[to++] = i < p.kept ? old_ids[i] : static_cast<int32_t>(p.id0 + i - p.kept);
    }
    written += all_above + taken(equal + all_equal) - taken(equal);
    equal += all_equal;
    simt::sync_block();
  }
}

struct SortParams {
  const float* values;  // [n, kMostCandidates]
  const int32_t* ids;
  int32_t count;
  float* out_values;  // [n, count]
  int32_t* out_ids;
};

constexpr int kSortShared = kMostCandidates * 8;

// Descending values, ascending ids: a bitonic sort in shared memory.
KERNEL_BOUNDS(kSelectThreads, 4) void depth_sort_kernel(SortParams p) {
  uint32_t* s_keys = simt::shared<uint32_t>();
  int32_t* s_at = simt::shared<int32_t>(kMostCandidates * 4);
  const int64_t row = simt::block_idx();
  const float* values = p.values + row * kMostCandidates;
  int side = 1;
  while (side < p.count) side *= 2;
  // ids ascend with the place, so that the place decides among equal values
  for (int i = simt::thread_idx(); i < side; i += kSelectThreads) {
    s_keys[i] = i < p.count ? key_of(values[i]) : 0u;
    s_at[i] = i;
  }
  simt::sync_block();
  for (int size = 2; size <= side; size *= 2) {
    for (int step = size / 2; step > 0; step /= 2) {
      for (int i = simt::thread_idx(); i < side; i += kSelectThreads) {
        const int other = i ^ step;
        if (other <= i) continue;
        const bool before =
            s_keys[i] > s_keys[other] || (s_keys[i] == s_keys[other] && s_at[i] < s_at[other]);
        if (before == ((i & size) == 0)) continue;
        const uint32_t key = s_keys[i];
        const int32_t at = s_at[i];
        s_keys[i] = s_keys[other];
        s_at[i] = s_at[other];
        s_keys[other] = key;
        s_at[other] = at;
      }
      simt::sync_block();
    }
  }
  for (int i = simt::thread_idx(); i < p.count; i += kSelectThreads) {
    p.out_values[row * p.count + i] = values[s_at[i]];
    p.out_ids[row * p.count + i] = p.ids[row * kMostCandidates + s_at[i]];
  }
}

}  // namespace gemma_ext::depth_batching::cuda
