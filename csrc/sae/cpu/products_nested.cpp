// SPDX-License-Identifier: Apache-2.0
// Nested reconstructions: suffix sums of a block of tokens, then sums over those tokens feature by feature, block
// after block. Sums over tokens are in the order of tokens however blocks are cut.
#include <string.h>

#include <algorithm>
#include <memory>

#include "../../common/cpu/pages.h"
#include "products.h"
#include "products_order.h"

namespace gemma_ext::sae::cpu {
namespace {

using gemma_ext::cpu::want_huge_pages;

constexpr int64_t kSuffixBytes = 16 << 20;  // of a block: about a last-level cache
constexpr int64_t kTokens = 4;              // of a task

// The level of a place in a token's list; of an entry of none, `levels`.
struct Levels {
  const Nested& call;
  int64_t of(int64_t token, int64_t at) const {
    if (!call.widths) return at - begin_of(call.list, token);
    const int64_t index = call.list.indices[at];
    return std::upper_bound(call.widths, call.widths + call.levels, index) - call.widths;
  }
};

// One contribution v s to the sum of a feature.
struct Term {
  int32_t feature, at;
  const float* suffix;
};

// Rows of sums, of the features in a list alone: F x D floats would be what the codes are there to avoid.
struct FeatureSums {
  std::vector<int32_t> place;  // [F], -1 for a feature in no list
  int64_t touched = 0, step;
  std::unique_ptr<float[]> rows;

  FeatureSums(const List& l, int64_t D) : place(l.F, -1), step(padded_width(D)) {
    for (int64_t n = 0; n < l.N; ++n)
      for (int64_t i = begin_of(l, n); i < end_of(l, n); ++i) place[l.indices[i]] = 0;
    for (int32_t& p : place)
      if (p == 0) p = int32_t(touched++);
    rows.reset(new float[touched * step]);
    want_huge_pages(rows.get(), touched * step * int64_t(sizeof(float)));
    memset(rows.get(), 0, touched * step * sizeof(float));
  }
  float* row(int32_t feature) { return rows.get() + place[feature] * step; }
};

// Terms of a block, sorted by feature, in the order of tokens.
void collect(const Nested& call, int64_t first, int64_t last, const float* suffixes,
             std::vector<Term>& terms) {
  const Levels level{call};
  const int64_t step = padded_width(call.D);
  terms.clear();
  for (int64_t n = first; n < last; ++n)
    for (int64_t i = begin_of(call.list, n); i < end_of(call.list, n); ++i) {
      const int64_t m = level.of(n, i);
      if (m < call.levels)
        terms.push_back(
            {call.list.indices[i], int32_t(i), suffixes + ((n - first) * call.levels + m) * step});
    }
  std::stable_sort(terms.begin(), terms.end(),
                   [](const Term& a, const Term& b) { return a.feature < b.feature; });
}

void add_terms(const Nested& call, const std::vector<Term>& terms, FeatureSums& sums,
               Workers& workers) {
  constexpr int64_t kTerms = 64;  // of a task, up to the end of a feature
  std::vector<int64_t> starts;
  for (int64_t i = 0; i < int64_t(terms.size()); ++i)
    if ((i == 0 || terms[i].feature != terms[i - 1].feature) &&
        (starts.empty() || i - starts.back() >= kTerms))
      starts.push_back(i);
  starts.push_back(int64_t(terms.size()));
  workers.run(int64_t(starts.size()) - 1, [&](int64_t task, Scratch&) {
    std::vector<const float*> suffix;
    std::vector<float> v;
    for (int64_t i = starts[task]; i < starts[task + 1];) {
      const int32_t feature = terms[i].feature;
      suffix.clear();
      v.clear();
      for (; i < starts[task + 1] && terms[i].feature == feature; ++i) {
        suffix.push_back(terms[i].suffix);
        v.push_back(call.list.values[terms[i].at]);
      }
      product_kernels().nested_segment(suffix.data(), v.data(), int64_t(v.size()), call.D,
                                       sums.row(feature));
    }
  });
}

}  // namespace

void run(const Nested& call, Workers& workers) {
  workers.run((call.list.N + kTokens - 1) / kTokens, [&](int64_t i, Scratch& s) {
    product_kernels().nested(call, i * kTokens, std::min(call.list.N, (i + 1) * kTokens), s);
  });
}

void run(const NestedBackward& call, Workers& workers) {
  const Nested& f = call.nested;
  const int64_t N = f.list.N, D = f.D, step = padded_width(D);
  const auto zero = [](void* p, int64_t bytes) {
    if (p) memset(p, 0, bytes);
  };
  zero(call.d_values, f.list.entries * sizeof(float));
  zero(call.d_bias, D * sizeof(float));
  if (f.levels == 0) {
    zero(call.d_target, N * D * size_of(f.target.type));
    zero(call.d_weight, f.list.F * D * size_of(f.weight.type));
    return;
  }
  const int64_t token_bytes = f.levels * step * int64_t(sizeof(float));
  const int64_t block =
      std::clamp(kSuffixBytes / std::max(token_bytes, int64_t{1}), kTokens, int64_t{4096});
  const std::unique_ptr<float[]> suffixes(new float[std::min(block, N) * f.levels * step]);
  std::unique_ptr<FeatureSums> sums;
  if (call.d_weight) sums = std::make_unique<FeatureSums>(f.list, D);
  std::vector<Term> terms;
  for (int64_t first = 0; first < N; first += block) {
    const int64_t last = std::min(N, first + block);
    workers.run((last - first + kTokens - 1) / kTokens, [&](int64_t i, Scratch& s) {
      const int64_t from = first + i * kTokens;
      product_kernels().nested_rows(call, from, std::min(last, from + kTokens),
                                    suffixes.get() + (from - first) * f.levels * step, s);
    });
    for (int64_t n = first; call.d_bias && n < last; ++n) {
      const float* whole = suffixes.get() + (n - first) * f.levels * step;
      for (int64_t c = 0; c < D; ++c) call.d_bias[c] += whole[c];
    }
    if (!call.d_weight) continue;
    collect(f, first, last, suffixes.get(), terms);
    add_terms(f, terms, *sums, workers);
  }
  if (!call.d_weight) return;
  want_huge_pages(call.d_weight, f.list.F * D * size_of(f.weight.type));
  const Segments ends{&f.list, f.weight,      {},           nullptr, D, call.unit_norm,
                      nullptr, f.weight.type, call.d_weight};
  constexpr int64_t kFeatures = 64;
  workers.run((f.list.F + kFeatures - 1) / kFeatures, [&](int64_t i, Scratch& s) {
    for (int64_t k = i * kFeatures; k < std::min(f.list.F, (i + 1) * kFeatures); ++k) {
      char* row = static_cast<char*>(call.d_weight) + k * D * size_of(f.weight.type);
      if (sums->place[k] < 0)
        memset(row, 0, D * size_of(f.weight.type));
      else
        product_kernels().finish(ends, k, sums->row(int32_t(k)), row, s);
    }
  });
}

}  // namespace gemma_ext::sae::cpu
