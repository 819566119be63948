// SPDX-License-Identifier: Apache-2.0
// The k best of every row without the row: features come in stages, each some times as many as all before, and what
// of a stage is not above the k-th best so far is dropped while it is in registers.
//
//   first     p of the first features as they are
//   stage     above the row's floor -> its list, of which k are kept; the floor rises
//   redo      rows whose list ran over, where later features are better than earlier ones: tile by tile, exactly
//
// Features come in ascending order, so that what equals the floor has a higher index and loses.
#pragma once

#include "select.cuh"

namespace gemma_ext::sae::cuda {

// One of the lists that a row has: the k best by an order.
struct Contest {
  Order order;
  int k;
  Pool pool;
  Candidate* kept[2];  // [N, k], of a stage and of the one before
  int* kept_count;     // [N]
  float* values;       // [N, k]
  int32_t* indices;    // [N, k]
};

constexpr int kMostContests = 2;  // the list, aux

struct TopKParams {
  EncodeParams encode;
  Contest contest[kMostContests];
  int contests;
  float* first;  // [N, first_columns]
  int first_columns;
  int* lost;        // [N] whether a row's list ran over
  int* lost_rows;   // [N] which did
  int* lost_count;  // [1]
  uint8_t* rooms;   // to sort in, of every block; null: in shared memory
  int sort_size;
  int stage;
  bool last;
};

// Writes p.
struct FirstVisitor {
  const TopKParams& p;
  int64_t first_row;

  struct Eight : EightFeatures {
    DEVICE Eight(const FirstVisitor& v, const Columns& at) : EightFeatures(v.p.encode.encoder, at) {}
  };
  struct Row {
    int64_t n;
    DEVICE Row(const FirstVisitor& v, int row) : n(v.first_row + row) {}
  };

  DEVICE FirstVisitor(const TopKParams& p, int64_t first_row, int, uint8_t*, int)
      : p(p), first_row(first_row) {}
  DEVICE void visit(const Eight& eight, const Row& row, const float (&x)[kEight]) {
    if (row.n >= p.encode.encoder.N) return;
    float* to = p.first + row.n * p.first_columns;
    UNROLL
    for (int i = 0; i < kEight; ++i) {
      if (eight.feature(i) < p.first_columns) to[eight.feature(i)] = x[i] + eight.bias[i];
    }
  }
  DEVICE void end() {}
};

// Of the rows that `rows` names, or of those from first_row on.
template <bool kAux>
class FilterVisitor {
 public:
  static constexpr int kLists = kAux ? 2 : 1;

  struct Eight : EightFeatures {
    unsigned allowed = 0;  // in aux

    DEVICE Eight(const FilterVisitor& v, const Columns& at)
        : EightFeatures(v.p_.encode.encoder, at) {
      if constexpr (kAux) {
        UNROLL
        for (int i = 0; i < kEight; ++i) {
          if (inside(v.p_.encode.encoder, i))
            allowed |= static_cast<unsigned>(v.p_.contest[1].order.mask[feature(i)] != 0) << i;
        }
      }
    }
  };

  struct Row {
    int local;
    bool inside;
    uint32_t floor[kLists];
    float score[kLists];

    DEVICE Row(const FilterVisitor& v, int row) : local(row), inside(v.token(row) >= 0) {
      UNROLL
      for (int list = 0; list < kLists; ++list) {
        floor[list] = inside ? v.p_.contest[list].pool.floor[v.token(row)] : 0xffffffffu;
        score[list] = inside ? score_of(floor[list]) : __builtin_huge_valf();
      }
    }
  };

  DEVICE FilterVisitor(const TopKParams& p, int64_t first_row, int first_column, uint8_t* shared,
                       int warp, const int* rows = nullptr)
      : p_(p), first_row_(first_row), first_column_(first_column), queue_(shared, warp),
        rows_(rows) {}

  DEVICE void visit(const Eight& eight, const Row& row, const float (&x)[kEight]) {
    const bool magnitude = p_.contest[0].order.by_magnitude;
    float p[kEight];
    bool some = false;
    UNROLL
    for (int i = 0; i < kEight; ++i) {
      p[i] = x[i] + eight.bias[i];
      const float score = p[i] * eight.scale[i];
      some |= !((magnitude ? fabsf(p[i]) * eight.scale[i] : score) <= row.score[0]);
      if constexpr (kAux) some |= (eight.allowed >> i & 1) && !(score <= row.score[1]);
    }
    if (!simt::any(some)) return;
    UNROLL
    for (int list = 0; list < kLists; ++list) {
      UNROLL
      for (int i = 0; i < kEight; ++i) {
        const float size = list == 0 && magnitude ? fabsf(p[i]) : p[i];
        const bool takes_part =
            list == 0 ? eight.inside(p_.encode.encoder, i) : (eight.allowed >> i & 1) != 0;
        const bool hit = row.inside && takes_part &&
                         order_of(size * eight.scale[i]) > row.floor[list];
        queue_.push(hit, list, row.local, eight.column(i), p[i]);
      }
      if (queue_.is_full()) drain();
    }
  }
  DEVICE void end() {
    if (!queue_.is_empty()) drain();
  }

 private:
  DEVICE int64_t token(int row) const {
    if (rows_) return rows_[row];
    return first_row_ + row < p_.encode.encoder.N ? first_row_ + row : -1;
  }
  DEVICE void drain() {
    queue_.drain([&](int list, int row, int column, float x) {
      const Pool& pool = p_.contest[list].pool;
      const int64_t n = token(row);
      const int at = simt::atomic_add(&pool.count[n], 1);
      if (at < pool.room) pool.fresh[n * pool.room + at] = {x, first_column_ + column};
    });
  }

  const TopKParams& p_;
  int64_t first_row_;
  int first_column_;
  Queue queue_;
  const int* rows_;
};

}  // namespace gemma_ext::sae::cuda
