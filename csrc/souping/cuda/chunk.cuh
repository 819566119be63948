// SPDX-License-Identifier: Apache-2.0
// A block on its way through the chunks of a plan, and the deltas of an octet.
#pragma once

#include "octet.cuh"
#include "table.h"

namespace gemma_ext::souping::cuda {

// In shared memory, behind each other: the views of a part's arrays.
constexpr int kViewBytes = (2 * kMaxModels + 2) * int{sizeof(View)};

struct Chunk {
  int64_t part, number;  // in the plan, in the call
  int64_t begin, end;    // positions
  int64_t offset;
  uint64_t key;
  const View* views;  // [models], the base, the out, the extras
  int models;
  bool based, aligned;

  DEVICE const View& source(int m) const { return views[m]; }
  DEVICE const View& base() const { return views[models]; }
  DEVICE const View& out() const { return views[models + 1]; }
  DEVICE const View& extra(int x) const { return views[models + 2 + x]; }
};

// The last of `count` ascending numbers that is not above x.
DEVICE int64_t last_not_above(const int64_t* numbers, int64_t count, int64_t x) {
  int64_t low = 0, high = count;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (numbers[middle] <= x ? low : high) = middle;
  }
  return low;
}

// The views of a part, with position 0 `offset` elements before it. Two barriers: until the first nobody may be
// busy with an earlier chunk. fill(chunk) runs between them, for what else is shared.
template <class Fill>
DEVICE Chunk open_part(const Plan& plan, int64_t at, int64_t offset, View* views, Fill fill) {
  const Table& t = plan.table;
  Chunk k{};
  k.part = at;
  k.number = plan.origin ? plan.origin[at] : at;
  k.offset = offset;
  k.key = t.part[at].key;
  k.views = views;
  k.models = t.models;
  simt::sync_block();
  const int count = t.models + 2 + t.extras;
  for (int i = simt::thread_idx(); i < count; i += simt::block_dim()) {
    Array a{nullptr, DType::kFloat32};
    if (i < t.models) {
      a = t.source[at * t.models + i];
    } else if (i == t.models) {
      a = t.base[at];
    } else if (i == t.models + 1) {
      if (t.out) a = t.out[at];
    } else {
      a = t.extra[at * t.extras + i - t.models - 2];
    }
    views[i] = View::of(a, offset);
  }
  fill(k);
  simt::sync_block();
  k.based = k.base().there;
  k.aligned = true;
  for (int i = 0; i < count; ++i) k.aligned &= views[i].aligned || !views[i].there;
  return k;
}

template <class Fill>
DEVICE Chunk open_chunk(const Plan& plan, int64_t c, View* views, Fill fill) {
  const int64_t at = last_not_above(plan.first, plan.table.parts, c);
  const Part& part = plan.table.part[at];
  const int64_t in_part = c - plan.first[at] + part.offset / plan.grain;
  Chunk k = open_part(plan, at, part.offset, views, fill);
  k.begin = most(in_part * plan.grain, part.offset);
  k.end = least((in_part + 1) * plan.grain, part.offset + part.numel);
  return k;
}
DEVICE Chunk open_chunk(const Plan& plan, int64_t c, View* views) {
  return open_chunk(plan, c, views, [](const Chunk&) {});
}

// body(c) for the chunks of a range: in order where `ticket` deals them, which one `dealt` of shared memory holds.
template <class Body>
DEVICE void each_chunk(const Range& range, Word* ticket, Word* dealt, Body body) {
  if (!ticket) {
    for (int64_t c = range.from + simt::block_idx(); c < range.to; c += simt::grid_dim()) body(c);
    return;
  }
  for (;;) {
    if (simt::thread_idx() == 0) *dealt = simt::atomic_add(ticket, Word{1});
    simt::sync_block();
    const int64_t c = range.from + static_cast<int64_t>(*dealt);
    if (c >= range.to) return;
    body(c);  // has a barrier
  }
}

// f(octet) for every octet of a chunk, each by one thread.
template <class F>
DEVICE void each_octet(const Chunk& k, F f) {
  for (int64_t q = k.begin / kLanes + simt::thread_idx(); q * kLanes < k.end;
       q += simt::block_dim()) {
    f(octet_of(q, k.begin, k.end));
  }
}

// f(m) for every model; kM bounds their number and unrolls, 0 does neither.
template <int kM, class F>
DEVICE void each_model(int models, F f) {
  if constexpr (kM > 0) {
    UNROLL
    for (int m = 0; m < kM; ++m)
      if (m < models) f(m);
  } else {
    NO_UNROLL
    for (int m = 0; m < models; ++m) f(m);
  }
}

// body(bound) of an octet: kM where it is whole and aligned, else 0.
template <int kM, class Body>
DEVICE void by_bound(const Chunk& k, const Octet& o, Body body) {
  if constexpr (kM > 0) {
    if (k.aligned && o.whole()) return body(std::integral_constant<int, kM>{});
  }
  body(std::integral_constant<int, 0>{});
}

// x_m - base of an octet, or x_m without a base. With kM, of whole and aligned ones alone, all models are read at
// once and kept in registers, without each when it is asked for.
template <class A, int kM>
class Deltas {
 public:
  A base[kLanes];

  DEVICE Deltas(const Chunk& k, const Octet& o) : k_(k), o_(o) {
    float x[kLanes] = {};
    if constexpr (kM == 0) {
      if (k.based) load(k.base(), o, x);
      set_base(x);
    } else {
      Bits bits[kM], bottom{};
      // the last model again where there are fewer: no branch between the loads
      UNROLL
      for (int m = 0; m < kM; ++m) bits[m] = fetch_whole(k.source(bounded(m)), o);
      if (k.based) bottom = fetch_whole(k.base(), o);
      if (k.based) widen(bottom, k.base().type, x);
      set_base(x);
      UNROLL
      for (int m = 0; m < kM; ++m) {
        widen(bits[m], k.source(bounded(m)).type, x);
        subtract(x, delta_[m]);
      }
    }
  }

  DEVICE const A (&of(int m)) [kLanes] {
    if constexpr (kM > 0) {
      return delta_[m];
    } else {
      float x[kLanes];
      load(k_.source(m), o_, x);
      subtract(x, delta_[0]);
      return delta_[0];
    }
  }

  // One position's; 0 where there is none.
  DEVICE A at(int m, int j) const {
    if constexpr (kM > 0) {
      return delta_[m][j];
    } else {
      if (!o_.has(j)) return A{};
      const A x = static_cast<A>(element(k_.source(m), o_.first + j));
      return k_.based ? x - base[j] : x;
    }
  }

 private:
  DEVICE int bounded(int m) const {
    const int last = k_.models > 0 ? k_.models - 1 : 0;
    return m < last ? m : last;
  }
  DEVICE void set_base(const float (&x)[kLanes]) {
    UNROLL
    for (int j = 0; j < kLanes; ++j) base[j] = static_cast<A>(x[j]);
  }
  DEVICE void subtract(const float (&x)[kLanes], A (&to)[kLanes]) const {
    UNROLL
    for (int j = 0; j < kLanes; ++j) {
      const A y = static_cast<A>(x[j]);
      to[j] = k_.based ? y - base[j] : y;
    }
  }

  const Chunk& k_;
  const Octet& o_;
  A delta_[kM > 0 ? kM : 1][kLanes];
};

// f(j) for every position of an octet; only what is in registers, with kM, asks for unrolling.
template <int kM, class F>
DEVICE void each_position(F f) {
  if constexpr (kM > 0) {
    UNROLL
    for (int j = 0; j < kLanes; ++j) f(j);
  } else {
    NO_UNROLL
    for (int j = 0; j < kLanes; ++j) f(j);
  }
}

// term(m) of one position, added up over the models in ascending order (element.h); kM as of each_model.
template <int kM, class A, class Term>
DEVICE void collect_terms(int models, Term term, A* x) {
  if constexpr (kM > 0) {
    UNROLL
    for (int m = 0; m < kM; ++m) x[m] = m < models ? term(m) : nothing<A>();
  } else {
    for (int m = 0; m < models; ++m) x[m] = term(m);
  }
}
template <int kM, class A, class Term>
DEVICE A sum_models(int models, Term term) {
  A x[kM > 0 ? kM : kMaxModels];
  collect_terms<kM>(models, term, x);
  return sum_terms<kM>(x, models);
}

// Of one model.
DEVICE void load_delta(const Chunk& k, int m, const Octet& o, float (&d)[kLanes]) {
  float base[kLanes];
  const Bits x = fetch(k.source(m), o);
  if (k.based) load(k.base(), o, base);
  widen(x, k.source(m).type, d);
  UNROLL
  for (int j = 0; j < kLanes; ++j) d[j] = k.based ? d[j] - base[j] : d[j];
}

constexpr int kThreads = 256;

// f(bound) with the least bound that is not below `models`, of 2, 4, 8 and none.
template <class F>
void by_models(int models, F f) {
  if (models <= 2) return f(std::integral_constant<int, 2>{});
  if (models <= 4) return f(std::integral_constant<int, 4>{});
  if (models <= 8) return f(std::integral_constant<int, 8>{});
  f(std::integral_constant<int, 0>{});
}

}  // namespace gemma_ext::souping::cuda
