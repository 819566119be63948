// SPDX-License-Identifier: Apache-2.0
// Candidates: entries whose score is above their row's threshold wait in shared memory, a queue for each warp, and
// go to their row's list in global memory by a counter. In which order they arrive shows nowhere: lists are chosen
// from by `rank_of`, which no two share.
#pragma once

#include "encode.h"

namespace gemma_ext::sae::cuda {

struct Candidate {
  float p;
  int feature;
};

// Of every row: its threshold and the list of what is above.
struct Pool {
  uint32_t* floor;   // [N] order_of the score that has to be passed
  Candidate* fresh;  // [N, room]
  int* count;        // [N], whether there was room or not
  int room;
};

// What !(x <= score) is asked with before the order itself: NaN for 0, which everything passes, infinity for that of
// NaN, which nothing does.
DEVICE float score_of(uint32_t order) {
  if (order == 0) return __builtin_nanf("");
  if (order == 0xffffffffu) return __builtin_huge_valf();
  return simt::float_of(order >> 31 ? order & 0x7fffffffu : ~order);
}

constexpr int kQueued = 512;
constexpr int kPushed = kEight * simt::kWarpSize;  // at most at a time

struct Waiting {
  float p;
  int where;  // list, row of the block and column of the tile
};
constexpr int kQueueBytes = 8 * kQueued * static_cast<int>(sizeof(Waiting));  // of eight warps

// Of one warp.
class Queue {
 public:
  DEVICE Queue(uint8_t* s_queues, int warp)
      : s_(reinterpret_cast<Waiting*>(s_queues) + warp * kQueued) {}

  // By the whole warp; `hit` of each lane.
  DEVICE void push(bool hit, int list, int row, int column, float p) {
    const unsigned votes = simt::ballot(hit);
    if (hit) {
      const int at = count_ + simt::popcount(votes & ((1u << simt::lane_idx()) - 1));
      s_[at] = {p, list << 16 | row << 8 | column};
    }
    count_ += simt::popcount(votes);
  }
  DEVICE bool is_full() const { return count_ > kQueued - kPushed; }
  DEVICE bool is_empty() const { return count_ == 0; }

  DEVICE int count() const { return count_; }

  // f(i, list, row, column, p) by one lane for each.
  template <class F>
  DEVICE void drain(F f) {
    simt::sync_warp();
    for (int i = simt::lane_idx(); i < count_; i += simt::kWarpSize) {
      const Waiting w = s_[i];
      f(i, w.where >> 16, w.where >> 8 & 0xff, w.where & 0xff, w.p);
    }
    simt::sync_warp();
    count_ = 0;
  }

 private:
  Waiting* s_;
  int count_ = 0;
};

}  // namespace gemma_ext::sae::cuda
