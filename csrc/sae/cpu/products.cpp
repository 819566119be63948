// SPDX-License-Identifier: Apache-2.0
// Decode, its gradients and the transpose: tasks of tokens, then tasks of features.
#include "products.h"

#include <string.h>

#include <algorithm>
#include <memory>

#include "../../common/cpu/isa.h"
#include "../../common/cpu/pages.h"
#include "products_order.h"

namespace gemma_ext::sae {

#define GEMMA_EXT_DECLARE(isa)                 \
  namespace isa {                              \
  extern const ProductKernels kProductKernels; \
  }
#define GEMMA_EXT_ADDRESS(isa) &isa::kProductKernels,

GEMMA_EXT_ISAS(GEMMA_EXT_DECLARE)

const ProductKernels& product_kernels() {
  static const ProductKernels* const builds[] = {GEMMA_EXT_ISAS(GEMMA_EXT_ADDRESS)};
  return *builds[gemma_ext::cpu::chosen_isa()];
}

namespace cpu {
namespace {

using gemma_ext::cpu::want_huge_pages;

constexpr int64_t kTokens = 16;  // of a task: 0.5 ms where rows come from memory

// task(first, last, scratch) of every run of tokens.
template <class Task>
void each_tokens(int64_t N, Workers& workers, const Task& task) {
  workers.run((N + kTokens - 1) / kTokens,
              [&](int64_t i, Scratch& s) { task(i * kTokens, std::min(N, (i + 1) * kTokens), s); });
}

// row_of(feature) is where a feature's sum goes, null where nobody wants it.
template <class RowOf>
void sum_segments(const Segments& call, const ByFeature& by, Workers& workers,
                  const RowOf& row_of) {
  const ProductKernels& k = product_kernels();
  const Spans work(by);
  const int64_t step = padded_width(call.D);
  const std::unique_ptr<float[]> partial(new float[work.parts * step]);
  workers.run(int64_t(work.spans.size()), [&](int64_t i, Scratch& s) {
    const Span& span = work.spans[i];
    if (span.part >= 0) {
      k.segment(call, span.feature, by.entries.data() + span.from, span.count, nullptr,
                partial.get() + span.part * step, s);
      return;
    }
    for (int64_t f = span.feature; f < span.last; ++f) {
      void* row = row_of(f);
      if (by.count(f))
        k.segment(call, f, by.entries.data() + by.first[f], by.count(f), row, nullptr, s);
      else if (row)
        memset(row, 0, call.D * size_of(call.type));
    }
  });
  workers.run(int64_t(work.cut.size()), [&](int64_t i, Scratch& s) {
    const Span& whole = work.cut[i];
    k.join(call, whole.feature, partial.get() + whole.from * step, whole.count,
           row_of(whole.feature), s);
  });
}

void sum_columns(const DecodeBackward& call, Workers& workers) {
  workers.run((call.D + kColumns - 1) / kColumns, [&](int64_t i, Scratch&) {
    product_kernels().column_sums(call, i * kColumns, std::min(call.D, (i + 1) * kColumns));
  });
}

Segments segments_of(const DecodeBackward& call, void* sums) {
  return {&call.list,     call.weight,   call.grad,        call.scale, call.D,
          call.unit_norm, call.d_values, call.weight.type, sums};
}

char* row_at(void* rows, const Segments& call, int64_t i) {
  return static_cast<char*>(rows) + i * call.D * size_of(call.type);
}

void start_backward(const DecodeBackward& call, Workers& workers) {
  if (call.d_values && has_gaps(call.list))
    memset(call.d_values, 0, call.list.entries * sizeof(float));
  if (call.d_bias) sum_columns(call, workers);
}

}  // namespace

Wrong find_wrong(const List& l) {
  for (int64_t n = 0; l.counts && n < l.N; ++n)
    if (l.counts[n] < 0 || l.counts[n] > l.K) return {"counts", n, l.counts[n], l.K + 1};
  for (int64_t n = 0; l.offsets && n <= l.N; ++n)
    if (l.offsets[n] < (n ? l.offsets[n - 1] : 0) || l.offsets[n] > l.entries ||
        (n == 0 && l.offsets[0] != 0))
      return {"ascending offsets", n, l.offsets[n], l.entries + 1};
  for (int64_t n = 0; n < l.N; ++n)
    for (int64_t i = begin_of(l, n); i < end_of(l, n); ++i)
      if (l.indices[i] < 0 || l.indices[i] >= l.F) return {"indices", i, l.indices[i], l.F};
  return {};
}

void run(const Decode& call, Workers& workers) {
  each_tokens(call.list.N, workers, [&](int64_t first, int64_t last, Scratch& s) {
    product_kernels().decode(call, first, last, s);
  });
}

void run(const DecodeBackward& call, Workers& workers) {
  start_backward(call, workers);
  if (call.d_weight) {
    want_huge_pages(call.d_weight, call.list.F * call.D * size_of(call.weight.type));
    const Segments segments = segments_of(call, call.d_weight);
    sum_segments(segments, ByFeature(call.list), workers,
                 [&](int64_t f) { return row_at(call.d_weight, segments, f); });
  } else if (call.d_values) {
    each_tokens(call.list.N, workers, [&](int64_t first, int64_t last, Scratch& s) {
      product_kernels().dots(call, first, last, s);
    });
  }
}

void run(const DecodeBackward& call, const std::function<TouchedRows(int64_t)>& allocate,
         Workers& workers) {
  start_backward(call, workers);
  const ByFeature by(call.list);
  std::vector<int32_t> place(call.list.F);
  int64_t touched = 0;
  for (int64_t f = 0; f < call.list.F; ++f) place[f] = by.count(f) ? int32_t(touched++) : -1;
  const TouchedRows rows = allocate(touched);
  want_huge_pages(rows.d_weight, touched * call.D * size_of(call.weight.type));
  for (int64_t f = 0; f < call.list.F; ++f)
    if (place[f] >= 0) rows.features[place[f]] = f;
  const Segments segments = segments_of(call, rows.d_weight);
  sum_segments(segments, by, workers, [&](int64_t f) {
    return place[f] < 0 ? nullptr : row_at(rows.d_weight, segments, place[f]);
  });
}

void run(const Scatter& call, Workers& workers) {
  const ByFeature by(call.list);
  const int64_t F = call.list.F;
  constexpr int64_t kFeatures = 4096;
  workers.run((F + kFeatures - 1) / kFeatures, [&](int64_t i, Scratch&) {
    for (int64_t f = i * kFeatures; f < std::min(F, (i + 1) * kFeatures); ++f) {
      float total = 0;
      for (int64_t e = by.first[f]; e < by.first[f + 1]; ++e)
        total += call.list.values[by.entries[e].at];
      call.totals[f] = total;
    }
  });
  if (call.D == 0) return;
  want_huge_pages(call.sums, F * call.D * int64_t(sizeof(float)));
  const Segments segments{&call.list, {},      call.rows,       nullptr,  call.D,
                          false,      nullptr, DType::kFloat32, call.sums};
  sum_segments(segments, by, workers, [&](int64_t f) { return row_at(call.sums, segments, f); });
}

}  // namespace cpu
}  // namespace gemma_ext::sae
