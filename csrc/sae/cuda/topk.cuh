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
  Contest contest[kMostContests];  // those with a mask behind those without
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
    DEVICE Eight(const FirstVisitor& v, const Columns& at)
        : EightFeatures(v.p.encode.encoder, at) {}
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

// Queues what passes, of the rows that `rows` names or of those from first_row on. kMain: the first list takes all
// features; kAux: the last takes those of its mask, by value.
template <bool kMain, bool kAux>
class FilterVisitor {
 public:
  static constexpr int kLists = kMain + kAux, kMasked = kMain ? 1 : 0;

  struct Eight : EightFeatures {
    unsigned allowed = 0;  // by the mask

    DEVICE Eight(const FilterVisitor& v, const Columns& at)
        : EightFeatures(v.p_.encode.encoder, at) {
      if constexpr (kAux) {
        const uint8_t* mask = v.p_.contest[kMasked].order.mask;
        UNROLL
        for (int i = 0; i < kEight; ++i) {
          if (inside(v.p_.encode.encoder, i))
            allowed |= static_cast<unsigned>(mask[feature(i)] != 0) << i;
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
      : p_(p),
        first_row_(first_row),
        first_column_(first_column),
        queue_(shared, warp),
        rows_(rows) {}

  DEVICE void visit(const Eight& eight, const Row& row, const float (&x)[kEight]) {
    const bool magnitude = kMain && p_.contest[0].order.by_magnitude;
    float p[kEight];
    bool some = false;
    UNROLL
    for (int i = 0; i < kEight; ++i) {
      p[i] = x[i] + eight.bias[i];
      const float score = p[i] * eight.scale[i];
      if constexpr (kMain)
        some |= !((magnitude ? fabsf(p[i]) * eight.scale[i] : score) <= row.score[0]);
      if constexpr (kAux) some |= (eight.allowed >> i & 1) && !(score <= row.score[kMasked]);
    }
    if (!simt::any(some)) return;
    UNROLL
    for (int list = 0; list < kLists; ++list) {
      const bool main = kMain && list == 0;
      UNROLL
      for (int i = 0; i < kEight; ++i) {
        const float size = main && magnitude ? fabsf(p[i]) : p[i];
        const bool takes_part =
            main ? eight.inside(p_.encode.encoder, i) : (eight.allowed >> i & 1) != 0;
        const bool hit =
            row.inside && takes_part && order_of(size * eight.scale[i]) > row.floor[list];
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
    queue_.drain([&](int, int list, int row, int column, float x) {
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

// Of all features those that come as they are.
inline int64_t first_columns(const Encoder& e, int64_t k) {
  constexpr int64_t kLeast = 1024;
  const int64_t wanted = most(kLeast, 2 * k);
  return least(ceil_div(wanted, kTileColumns) * kTileColumns, e.F);
}

// A stage brings `growth` times as many features as came before.
inline int64_t growth_of(int64_t k) { return k <= 256 ? 3 : 1; }

// f(from, to) for the stages behind the first.
template <class F>
void each_stage_behind(int64_t first, int64_t features, int64_t growth, F f) {
  for (int64_t done = first; done < features;) {
    int64_t end = done * (1 + growth);
    if (end + done / 2 > features) end = features;  // not a stage of scraps
    f(done, end);
    done = end;
  }
}

// A list that is asked for.
struct Wanted {
  int64_t k;
  const uint8_t* mask;
  bool by_magnitude;
  float* values;
  int32_t* indices;
};

struct TopKMemory {
  TopKParams p{};

  // One or two lists, with a mask the last; none: nothing.
  TopKMemory(Arena& memory, const Encoder&, const Wanted* wanted, int count);
  int room_bytes() const;
};

void add_topk(Launches&, const TopKMemory&);

inline Wanted wanted_aux(const Aux& aux) {
  return {aux.k, aux.mask, false, aux.values, aux.indices};
}

// Of an encoder whose other list is no TopK: a product of its own.
inline TopKMemory aux_memory(Arena& memory, const Encoder& e, const Aux& aux) {
  const Wanted wanted = wanted_aux(aux);
  return TopKMemory(memory, e, &wanted, aux.mask ? 1 : 0);
}

}  // namespace gemma_ext::sae::cuda
