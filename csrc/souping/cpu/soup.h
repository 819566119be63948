// SPDX-License-Identifier: Apache-2.0
// out = base + scale sum_m w_m (x_m - base), or sum_m w_m x_m.
#pragma once

#include "lanes.h"

namespace gemma_ext::souping::GEMMA_EXT_ISA {
namespace {

// Elements first .. last of a step, in whole vectors; kM models, 0: any number. Out is A, or bfloat16.
template <class A, bool kBf16, int kM, class Out>
void soup_step(const Inputs& in, int models, const A* w, A scale, int first, int last, Out* sum) {
  for (int i = first; i < last; i += kLanes) {
    const V<A> base = load_base<A, kBf16>(in, i);
    V<A> x[kM ? kM : kMaxModels];
#pragma GCC unroll 4
    for (int m = 0; m < (kM ? kM : models); ++m)
      x[m] = weighted(w[m], load_delta<A, kBf16>(in, m, i, base));
    const V<A> total = sum_terms<kM>(x, models);
    put_lanes(sum, i, in.base ? base + weighted(scale, total) : total);
  }
}

template <class A, bool kBf16, class Out>
void soup_models(const Inputs& in, int models, const A* w, A scale, int first, int last, Out* sum) {
  switch (models) {
    case 1: return soup_step<A, kBf16, 1>(in, models, w, scale, first, last, sum);
    case 2: return soup_step<A, kBf16, 2>(in, models, w, scale, first, last, sum);
    case 3: return soup_step<A, kBf16, 3>(in, models, w, scale, first, last, sum);
    case 4: return soup_step<A, kBf16, 4>(in, models, w, scale, first, last, sum);
    default: return soup_step<A, kBf16, 0>(in, models, w, scale, first, last, sum);
  }
}

template <class A>
void soup_run(const Soup& call, const Run& run, bool stream, Scratch& s) {
  const Table& t = call.table;
  const Part& part = t.part[run.part];
  const int models = t.models;
  // a row may end inside a vector, which the next one then overwrites from its own beginning
  A* sum = scratch<A>(s, kValues, kStep + kLanes);
  const Array& out = t.out[run.part];
  A w[kMaxModels];
  const auto set = [&](int64_t number) {
    for (int m = 0; m < models; ++m) w[m] = A(call.weights[number * models + m]);
    return A(call.scale[number]);
  };
  A scale = call.by_row ? A(0) : set(run.part);
  in_steps(run, [&](int64_t at, int n) {
    const Inputs in(t, run.part, at, n, !call.by_row, s);
    const auto compute = in.bf16 ? soup_models<A, true, A> : soup_models<A, false, A>;
    if constexpr (sizeof(A) == sizeof(float))
      if (in.bf16 && out.type == DType::kBFloat16 && call.rounding == Rounding::kNearest) {
        alignas(64) uint16_t narrow[kStep];
        soup_models<A, true>(in, models, w, scale, 0, n, narrow);
        return put(out, at, n, narrow, stream);
      }
    if (!call.by_row) compute(in, models, w, scale, 0, n, sum);
    for (int done = 0; call.by_row && done < n;) {
      const int64_t row = (at + done) / part.width;
      const int last = int(least(n, (row + 1) * part.width - at));
      scale = set(part.row + row);
      compute(in, models, w, scale, done, last, sum);
      done = last;
    }
    store(out, at, n, sum, rounding_words(call.rounding, out, part, at, n, s), stream);
  });
  end_stream(stream);
}

void soup(const Soup& call, const Run& run, bool stream, Scratch& s) {
  is_wide(call.wide, call.table.out[run.part]) ? soup_run<double>(call, run, stream, s)
                                               : soup_run<float>(call, run, stream, s);
}

}  // namespace
}  // namespace gemma_ext::souping::GEMMA_EXT_ISA
