// SPDX-License-Identifier: Apache-2.0
#include "souping/cuda/counts.cu"
#include "souping/cuda/gram_rows.cu"
#include "souping/cuda/sums.cu"

#include "soup_data.h"

namespace soup_test {
namespace {

// One sum in the order of contract.h.
struct Running {
  std::array<double, kStrands> strands{};
  double span = 0, total = 0;

  void close_block() {
    for (int64_t half = kStrands / 2; half > 0; half /= 2)
      for (int64_t i = 0; i < half; ++i) strands[i] = strands[i] + strands[i + half];
    span = span + strands[0];
    strands.fill(0);
  }
  void add(int64_t position, double x) {
    if (position % kBlock == 0) close_block();
    if (position % kSpan == 0) {
      total = total + span;
      span = 0;
    }
    double& strand = strands[position % kStrands];
    strand = strand + x;
  }
  double value() {
    close_block();
    return one_nan(total + span);
  }
};

double value_of(const double* state) {
  Running r;
  std::copy(state, state + kStrands, r.strands.begin());
  r.span = state[kStrands];
  r.total = state[kStrands + 1];
  return r.value();
}

bool same(double a, double b) { return memcmp(&a, &b, sizeof(a)) == 0; }

// Two groups of tensors, one cut inside of blocks and spans; called twice, so that states are carried on.
const std::vector<Shape> kCut = {{3000, 0}, {0, 3000},   {2000, 3000},         {4096, 8192},
                                 {700, 0},  {64, 12288}, {5000, kSpan - 4096}, {90, kSpan + 904}};
const std::vector<int64_t> kGroup = {0, 0, 0, 0, 1, 0, 1, 1};

void sums_match(Sum sum, const Options& options, const std::vector<int64_t>& group) {
  Data d(options);
  const int models = options.models, quantities = cuda::sums_of(sum, models);
  const auto density = d.numbers(d.parts() * models, 0.3, 0.9);
  std::vector<double> state(2 * quantities * kState), top(2 * models * 2);
  std::vector<Running> want(2 * quantities);
  std::vector<double> want_top(top.size());
  Sums call{};
  call.table = d.table();
  call.sum = sum;
  call.group = group.data();
  call.mask.density = sum == Sum::kNorms ? density.data() : nullptr;
  call.state = state.data();
  call.top = top.data();
  for (int time = 0; time < 2; ++time) {
    run(call);
    for (int64_t p = 0; p < d.parts(); ++p) {
      for (int64_t i = 0; i < d.part[p].numel; ++i) {
        const int64_t at = d.part[p].offset + i;
        Running* to = &want[group[p] * quantities];
        if (sum == Sum::kGram) {
          for (int a = 0; a < models; ++a)
            for (int b = a; b < models; ++b)
              (to++)->add(at, d.delta<double>(p, a, i) * d.delta<double>(p, b, i));
          continue;
        }
        for (int m = 0; m < models; ++m) {
          if (sum == Sum::kDots) {
            (to++)->add(at, d.delta<double>(p, m, i) * d.at(d.extra[p], i));
            continue;
          }
          const double x = d.delta<double>(p, m, i), size = x == x ? fabs(x) : 0.0;
          const int64_t model = p * models + m;
          const bool kept = uniform(d.word(p, d.model[model], kDrop, i)) < density[model];
          const double more = kept ? size : 0.0;
          for (double y : {size, size * size, more, more * more}) (to++)->add(at, y);
          double* tops = &want_top[(group[p] * models + m) * 2];
          tops[0] = std::max(tops[0], size);
          tops[1] = std::max(tops[1], more);
        }
      }
    }
  }
  for (size_t q = 0; q < want.size(); ++q)
    EXPECT(same(value_of(&state[q * kState]), want[q].value()));
  if (sum == Sum::kNorms) EXPECT(top == want_top);
}

void gram_rows_match(int models, int64_t width) {
  Data d({.models = models, .parts = {{3 * width, 5 * width, width}, {0}, {width, 0, width}}});
  std::vector<double> out(4 * models * models, NAN);
  run(GramRows{d.table(), out.data()});
  for (int64_t p = 0; p < d.parts(); ++p) {
    for (int64_t row = 0; row < d.part[p].numel / d.part[p].width; ++row) {
      for (int a = 0; a < models; ++a) {
        for (int b = 0; b < models; ++b) {
          Running sum;
          for (int64_t i = row * width; i < (row + 1) * width; ++i)
            sum.add(i - row * width,
                    d.delta<double>(p, std::min(a, b), i) * d.delta<double>(p, std::max(a, b), i));
          const double got = out[((d.part[p].row + row) * models + a) * models + b];
          EXPECT(same(got, sum.value()));
        }
      }
    }
  }
}

}  // namespace

CASE(sums_gram) { sums_match(Sum::kGram, {.parts = kCut}, kGroup); }
CASE(sums_gram_of_any_number) {
  for (int models : {1, 2, 6, 9})
    sums_match(Sum::kGram, {.models = models, .parts = {{4200, 8000}}}, {1});
}
CASE(sums_of_spans) {
  const std::vector<Shape> parts = {{kSpan + 5000, 4096}, {kSpan, 0}};
  sums_match(Sum::kDots, {.models = 1, .parts = parts, .extras = 1}, {0, 0});
}
CASE(sums_dots) { sums_match(Sum::kDots, {.parts = kCut, .extras = 1}, kGroup); }
CASE(sums_norms) { sums_match(Sum::kNorms, {.models = 2, .parts = kCut}, kGroup); }
CASE(gram_of_rows) {
  gram_rows_match(1, 7);
  gram_rows_match(3, 300);
  gram_rows_match(9, 65);
  gram_rows_match(2, 8300);
}

CASE(counts) {
  Data d({.models = 3, .parts = {{5000, 3}, {0}, {200}}});
  const std::vector<double> ones(9, 1.0);
  const auto weights = d.numbers(9, -1), density = d.numbers(9, 0.3, 0.9);
  Mask mask{};
  mask.density = density.data();
  std::vector<int64_t> overlaps(3 * 3 * 2), balance(3), want(3 * 3 * 2), want_balance(3);
  const Rule rule = {Election::kSum, true, 1, Combine::kSum};
  run(Counts{d.table(), Count::kOverlaps, rule, mask, weights.data(), ones.data(),
             overlaps.data()});
  run(Counts{d.table(), Count::kBalance, rule, mask, weights.data(), ones.data(), balance.data()});
  for (int64_t p = 0; p < d.parts(); ++p) {
    for (int64_t i = 0; i < d.part[p].numel; ++i) {
      bool kept[3];
      float total = 0;
      for (int m = 0; m < 3; ++m) {
        kept[m] = uniform(d.word(p, d.model[3 * p + m], kDrop, i)) < density[3 * p + m];
        const float w = static_cast<float>(weights[3 * p + m]);
        total = total + term(kept[m], w, d.delta<float>(p, m, i));
      }
      for (int m = 0; m < 3; ++m)
        if (kept[m]) ++want[(3 * p + m) * 2 + (kept[0] + kept[1] + kept[2] > 1)];
      want_balance[p] += total > 0 ? 1 : total < 0 ? -1 : 0;
    }
  }
  EXPECT(overlaps == want && balance == want_balance);
}

}  // namespace soup_test
