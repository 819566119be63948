// SPDX-License-Identifier: Apache-2.0
// out = base + scale sum_m w_m (x_m - base), or sum_m w_m x_m.
#pragma once

#include "stages.h"

namespace gemma_ext::souping::GEMMA_EXT_ISA {
namespace {

template <class A>
void soup_step(const float* const* x, const float* base, int models, const A* w, A scale, int n,
               A* __restrict sum) {
  for (int m = 0; m < models; ++m) {
    const float* __restrict y = x[m];
    const A weight = w[m];
    if (base && m == 0)
      for (int i = 0; i < n; ++i) sum[i] = weight * (A(y[i]) - A(base[i]));
    else if (base)
      for (int i = 0; i < n; ++i) sum[i] = sum[i] + weight * (A(y[i]) - A(base[i]));
    else if (m == 0)
      for (int i = 0; i < n; ++i) sum[i] = weight * A(y[i]);
    else
      for (int i = 0; i < n; ++i) sum[i] = sum[i] + weight * A(y[i]);
  }
  if (models == 0)
    for (int i = 0; i < n; ++i) sum[i] = 0;
  if (base)
    for (int i = 0; i < n; ++i) sum[i] = A(base[i]) + scale * sum[i];
}

template <class A>
void soup_run(const Soup& call, const Run& run, bool stream, Scratch& s) {
  const Table& t = call.table;
  const Part& part = t.part[run.part];
  const int models = t.models;
  float* inputs = scratch<float>(s, kInputs, (models + 1) * kStep);
  A* sum = scratch<A>(s, kValues, kStep);
  const Array& out = t.out[run.part];
  A w[kMaxModels];
  const float* x[kMaxModels];
  in_steps(run, [&](int64_t at, int n) {
    for (int m = 0; m < models; ++m)
      x[m] = widen(t.source[run.part * models + m], at, n, inputs + m * kStep);
    const float* base = widen(t.base[run.part], at, n, inputs + models * kStep);
    // every row of a step has its numbers, or the part has
    for (int done = 0; done < n;) {
      const int64_t row = (at + done) / part.width;
      const int64_t number = call.by_row ? part.row + row : run.part;
      const int left = call.by_row ? int(least(n - done, (row + 1) * part.width - at - done)) : n;
      for (int m = 0; m < models; ++m) w[m] = A(call.weights[number * models + m]);
      const float* shifted[kMaxModels];
      for (int m = 0; m < models; ++m) shifted[m] = x[m] + done;
      soup_step<A>(shifted, base ? base + done : nullptr, models, w, A(call.scale[number]), left,
                   sum + done);
      done += left;
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
