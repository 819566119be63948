// SPDX-License-Identifier: Apache-2.0
// What passes the floor of all rows together, of the products of a stage.
#pragma once

#include "sieve.cuh"
#include "topk.cuh"

namespace gemma_ext::sae::cuda {

constexpr uint32_t kZeroOrder = 0x80000000u, kNanOrder = 0xffffffffu;

struct BatchParams {
  EncodeParams encode;
  Sieve sieve;
  float* first;  // [N, first_columns]
  int first_columns, room;
  Entry *kept[2], *fresh;         // [total], [room + N]
  int *kept_count, *fresh_count;  // [2], [1]
  uint32_t *floor, *least;        // [1] order that has to be passed, of the least chosen number
  int *lost, *first_nan;          // [1], [N] a row's first NaN, or F
  float* min_positive;
  int stage, pass;
};

DEVICE void note_nan(const BatchParams& p, int64_t n, int feature) {
  if (feature < p.first_nan[n]) simt::atomic_min(&p.first_nan[n], feature);
}

struct BatchRow {
  int local;
  int64_t n;
};

struct BatchFirstVisitor {
  const BatchParams& p;
  int64_t first_row;

  struct Eight : EightFeatures {
    DEVICE Eight(const BatchFirstVisitor& v, const Columns& at)
        : EightFeatures(v.p.encode.encoder, at) {}
  };
  struct Row : BatchRow {
    DEVICE Row(const BatchFirstVisitor& v, int row) : BatchRow{row, v.first_row + row} {}
  };

  DEVICE BatchFirstVisitor(const BatchParams& p, int64_t first_row, int, uint8_t*, int)
      : p(p), first_row(first_row) {}
  DEVICE void visit(const Eight& eight, const Row& row, const float (&x)[kEight]) {
    if (row.n >= p.encode.encoder.N) return;
    float* to = p.first + row.n * p.first_columns;
    UNROLL
    for (int i = 0; i < kEight; ++i) {
      const int f = eight.feature(i);
      if (f >= p.first_columns) continue;
      const float own = x[i] + eight.bias[i], score = own * eight.scale[i];
      to[f] = own;
      if (score != score) note_nan(p, row.n, f);
    }
  }
  DEVICE void end() {}
};

class BatchVisitor {
 public:
  struct Eight : EightFeatures {
    DEVICE Eight(const BatchVisitor& v, const Columns& at)
        : EightFeatures(v.p_.encode.encoder, at) {}
  };
  struct Row : BatchRow {
    DEVICE Row(const BatchVisitor& v, int row) : BatchRow{row, v.first_row_ + row} {}
  };

  DEVICE BatchVisitor(const BatchParams& p, int64_t first_row, int first_column, uint8_t* shared,
                      int warp)
      : p_(p),
        first_row_(first_row),
        first_column_(first_column),
        queue_(shared, warp),
        floor_(*p.floor),
        score_(score_of(floor_)) {}

  DEVICE void visit(const Eight& eight, const Row& row, const float (&x)[kEight]) {
    float p[kEight];
    bool some = false;
    UNROLL
    for (int i = 0; i < kEight; ++i) {
      p[i] = x[i] + eight.bias[i];
      some |= !(p[i] * eight.scale[i] <= score_);
    }
    if (!simt::any(some)) return;
    const Encoder& e = p_.encode.encoder;
    UNROLL
    for (int i = 0; i < kEight; ++i) {
      const bool inside = row.n < e.N && eight.inside(e, i);
      const uint32_t order = order_of(p[i] * eight.scale[i]);
      if (inside && order == kNanOrder) note_nan(p_, row.n, eight.feature(i));
      const bool hit = inside && order > floor_ && order != kNanOrder;
      queue_.push(hit, 0, row.local, eight.column(i), p[i]);
    }
    if (queue_.is_full()) drain();
  }
  DEVICE void end() {
    if (!queue_.is_empty()) drain();
  }

 private:
  DEVICE void drain() {
    int begin = 0;
    if (simt::lane_idx() == 0) {
      begin = simt::atomic_add(p_.fresh_count, queue_.count());
      // lost, and counted no further: 2^31 may pass
      if (begin > p_.room) simt::atomic_exchange(p_.fresh_count, p_.room + 1);
    }
    begin = simt::shfl(begin, 0);
    queue_.drain([&](int i, int, int row, int column, float x) {
      if (begin + i < p_.room)
        p_.fresh[begin + i] = {x, first_column_ + column, static_cast<int>(first_row_) + row};
    });
  }

  const BatchParams& p_;
  int64_t first_row_;
  int first_column_;
  Queue queue_;
  uint32_t floor_;
  float score_;
};

}  // namespace gemma_ext::sae::cuda
