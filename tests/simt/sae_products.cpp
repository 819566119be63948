// SPDX-License-Identifier: Apache-2.0
#include "sae/cuda/backward.cu"
#include "sae/cuda/decode.cu"
#include "sae/cuda/features.cu"
#include "sae/cuda/nested.cu"
#include "sae/cuda/steer.cu"
#include "sae/cuda/sums.cu"
#include "sae/cuda/touched.cu"

#include "sae_data.h"

namespace sae_test {
namespace {

constexpr int64_t kTokens = 40, kEntries = 12, kFeatures = 30;

// Padded, with counts or by offsets; feature 4 has most of the entries.
template <class T>
struct Lists {
  int64_t D;
  Array<float> values;
  Array<int32_t> indices;
  Array<int64_t> offsets, counts;
  Array<T> weight, rows;
  List list;

  Lists(int form, int64_t D, Random& random, int64_t N = kTokens)
      : D(D),
        values(N * kEntries),
        indices(N * kEntries),
        offsets(N + 1),
        counts(N),
        weight(random.numbers<T>(kFeatures * D)),
        rows(random.numbers<T>(N * D)) {
    for (int64_t e = 0; e < N * kEntries; ++e) {
      values[e] = static_cast<float>(random.between(-2, 2));
      indices[e] = random.between(0, 2) ? 4 : random.between(0, kFeatures - 1);
    }
    offsets[0] = 0;
    for (int64_t n = 0; n < N; ++n) {
      counts[n] = random.between(0, kEntries);
      offsets[n + 1] = offsets[n] + counts[n];
    }
    list = {values.data(),
            indices.data(),
            form == 2 ? offsets.data() : nullptr,
            form == 1 ? counts.data() : nullptr,
            N,
            form == 2 ? 0 : kEntries,
            N * kEntries,
            kFeatures};
  }
  // f(token, entry) in order.
  template <class F>
  void each(F f) const {
    for (int64_t n = 0; n < list.N; ++n) {
      const int64_t begin = list.offsets ? offsets[n] : n * kEntries;
      const int64_t count = list.offsets || list.counts ? counts[n] : kEntries;
      for (int64_t e = begin; e < begin + count; ++e) f(n, e);
    }
  }
  Table table(const Array<T>& x) const { return {x.data(), D, Storage<T>::kType}; }
};

void near(double x, double y, double tolerance) {
  EXPECT(std::fabs(x - y) <= tolerance * (1 + std::fabs(y)));
}

template <class T>
void decode_matches(int form, int64_t D, Random& random) {
  const Lists<T> l(form, D, random);
  const Array<float> bias = random.numbers<float>(D), squared(kTokens);
  const Array<T> out(kTokens * D), residual(kTokens * D);
  Decode call{};
  call.list = l.list;
  call.weight = l.table(l.weight);
  call.bias = bias.data();
  call.D = D;
  call.out = out.data();
  run(call);
  call.target = l.table(l.rows);
  call.out = residual.data();
  call.squared = squared.data();
  run(call);
  std::vector<double> want(kTokens * D);
  for (int64_t i = 0; i < kTokens * D; ++i) want[i] = bias[i % D];
  l.each([&](int64_t n, int64_t e) {
    for (int64_t d = 0; d < D; ++d)
      want[n * D + d] += l.values[e] * value_of(l.weight[l.indices[e] * D + d]);
  });
  for (int64_t n = 0; n < kTokens; ++n) {
    double square = 0;
    for (int64_t i = n * D; i < (n + 1) * D; ++i) {
      EXPECT(value_of(out[i]) == want[i]);  // whole numbers below 256
      const double left = value_of(l.rows[i]) - want[i];
      EXPECT(value_of(residual[i]) == left);
      square += left * left;
    }
    EXPECT(squared[n] == square);
  }
}

template <class T>
void backward_matches(int form, int64_t D, bool unit_norm, bool rows_only, Random& random) {
  const Lists<T> l(form, D, random);
  Array<float> scale = random.numbers<float>(kTokens, 1, 2);
  const Array<float> d_values(l.list.entries), d_bias(D);
  const Array<T> d_weight(kFeatures * D);
  const Array<int64_t> features(kFeatures);
  DecodeBackward call{};
  call.list = l.list;
  call.weight = l.table(l.weight);
  call.grad = l.table(l.rows);
  call.scale = scale.data();
  call.D = D;
  call.unit_norm = unit_norm;
  call.rows_only = rows_only;
  call.d_values = d_values.data();
  call.d_bias = d_bias.data();
  call.want_weight = true;
  call.d_weight = rows_only ? nullptr : d_weight.data();
  int64_t touched = -1;
  run(call, cuda::AllocateRows([&](int64_t count) {
        touched = count;
        return TouchedRows{features.data(), d_weight.data()};
      }));

  std::vector<double> dots(l.list.entries), sums(kFeatures * D), bias(D);
  std::vector<bool> named(kFeatures);
  l.each([&](int64_t n, int64_t e) {
    named[l.indices[e]] = true;
    for (int64_t d = 0; d < D; ++d) {
      const double g = scale[n] * value_of(l.rows[n * D + d]);
      dots[e] += g * value_of(l.weight[l.indices[e] * D + d]);
      sums[l.indices[e] * D + d] += l.values[e] * g;
    }
  });
  for (int64_t e = 0; e < l.list.entries; ++e) EXPECT(d_values[e] == dots[e]);
  for (int64_t n = 0; n < kTokens; ++n)
    for (int64_t d = 0; d < D; ++d) bias[d] += scale[n] * value_of(l.rows[n * D + d]);
  for (int64_t d = 0; d < D; ++d) EXPECT(d_bias[d] == bias[d]);
  int64_t row = 0;
  for (int64_t f = 0; f < kFeatures; ++f) {
    if (rows_only && !named[f]) continue;
    double along = 0, square = 0;
    for (int64_t d = 0; unit_norm && d < D; ++d) {
      const double w = value_of(l.weight[f * D + d]);
      along += sums[f * D + d] * w;
      square += w * w;
    }
    for (int64_t d = 0; d < D; ++d) {
      const double off = square > 0 ? along / square * value_of(l.weight[f * D + d]) : 0;
      near(value_of(d_weight[row * D + d]), sums[f * D + d] - off, sizeof(T) == 2 ? 0.01 : 1e-4);
    }
    if (rows_only) EXPECT(features[row] == f);
    ++row;
  }
  if (rows_only) EXPECT(touched == row);
}

// More levels of tokens than suffix sums are held for: slices of 256 columns.
template <class T>
void nested_backward_matches(int64_t D, bool unit_norm, Random& random) {
  constexpr int64_t kMany = 260, kLevels = 64;
  const Lists<T> l(2, D, random, kMany);
  const Array<int64_t> widths(kLevels);
  for (int64_t m = 0; m < kLevels; ++m) widths[m] = m + 1;
  const Array<float> d_squared = random.numbers<float>(kMany * kLevels, -1, 1);
  const Array<float> d_values(l.list.entries), d_bias(D);
  const Array<T> d_weight(kFeatures * D), d_target(kMany * D);
  NestedBackward call{};
  call.nested = {l.list, l.table(l.weight), nullptr,       l.table(l.rows),
                 D,      kLevels,           widths.data(), nullptr};
  call.d_squared = d_squared.data();
  call.unit_norm = unit_norm;
  call.d_values = d_values.data();
  call.d_weight = d_weight.data();
  call.d_bias = d_bias.data();
  call.d_target = d_target.data();
  run(call);

  std::vector<double> values(l.list.entries), weight(kFeatures * D), bias(D);
  std::vector<std::vector<int64_t>> of_token(kMany);
  l.each([&](int64_t n, int64_t e) { of_token[n].push_back(e); });
  for (int64_t n = 0; n < kMany; ++n) {
    for (int64_t d = 0; d < D; ++d) {
      double sum = 0, suffix = 0;
      for (const int64_t e : of_token[n])
        sum += l.values[e] * value_of(l.weight[l.indices[e] * D + d]);
      for (int64_t m = kLevels - 1; m >= 0; --m) {
        suffix += 2 * d_squared[n * kLevels + m] * (sum - value_of(l.rows[n * D + d]));
        for (const int64_t e : of_token[n]) {
          const int64_t f = l.indices[e];
          const bool first = f < widths[m] && (m == 0 || f >= widths[m - 1]);
          if (!first) continue;
          const double w = value_of(l.weight[f * D + d]);
          values[e] += suffix * w;
          weight[f * D + d] += suffix * l.values[e];
          sum -= l.values[e] * w;
        }
      }
      bias[d] += suffix;
      near(value_of(d_target[n * D + d]), -suffix, sizeof(T) == 2 ? 0.01 : 0);
    }
  }
  for (int64_t e = 0; e < l.list.entries; ++e) near(d_values[e], values[e], 1e-6);
  for (int64_t d = 0; d < D; ++d) near(d_bias[d], bias[d], 1e-6);
  for (int64_t f = 0; f < kFeatures; ++f) {
    double along = 0, square = 0;
    for (int64_t d = 0; unit_norm && d < D; ++d) {
      const double w = value_of(l.weight[f * D + d]);
      along += weight[f * D + d] * w;
      square += w * w;
    }
    for (int64_t d = 0; d < D; ++d) {
      const double off = square > 0 ? along / square * value_of(l.weight[f * D + d]) : 0;
      near(value_of(d_weight[f * D + d]), weight[f * D + d] - off, sizeof(T) == 2 ? 0.01 : 1e-4);
    }
  }
}

}  // namespace

CASE(sae_nested_backward) {
  Random random(5);
  nested_backward_matches<simt::bf16>(264, true, random);
}
CASE(sae_nested_backward_float) {
  Random random(6);
  nested_backward_matches<float>(259, false, random);
}

// 4 N M D bytes would be 189 MB of five widths, 2.4 GB by rank.
CASE(sae_nested_workspace) {
  float nothing = 0;
  NestedBackward call{};
  call.nested.list = {&nothing, nullptr, nullptr, nullptr, 4096, 64, 4096 * 64, 16384};
  call.nested.D = 2304;
  call.nested.levels = 5;
  call.d_weight = &nothing;
  call.d_bias = &nothing;
  EXPECT(cuda::workspace(call) < int64_t{64} << 20);
  call.nested.levels = 64;
  EXPECT(cuda::workspace(call) < int64_t{320} << 20);
}

CASE(sae_decode) {
  Random random(1);
  for (const int form : {0, 1, 2}) {
    decode_matches<float>(form, 24, random);
    decode_matches<simt::bf16>(form, 8, random);
    decode_matches<simt::bf16>(form, 37, random);
  }
}

CASE(sae_decode_backward) {
  Random random(2);
  for (const int form : {0, 1, 2}) {
    backward_matches<float>(form, 24, false, false, random);
    backward_matches<simt::bf16>(form, 37, true, false, random);
    backward_matches<simt::bf16>(form, 16, form == 1, true, random);
  }
}

// A feature of several runs, columns of several blocks, and a list without a token.
CASE(sae_scatter) {
  Random random(3);
  for (const int64_t N : {int64_t{0}, int64_t{120}}) {
    for (const int64_t D : {int64_t{0}, int64_t{700}}) {
      const Lists<simt::bf16> l(0, D, random, N);
      const Array<float> sums(kFeatures * D), totals(kFeatures);
      run(Scatter{l.list, l.table(l.rows), D, sums.data(), totals.data()});
      std::vector<double> want(kFeatures * D), mass(kFeatures);
      l.each([&](int64_t n, int64_t e) {
        mass[l.indices[e]] += l.values[e];
        for (int64_t d = 0; d < D; ++d)
          want[l.indices[e] * D + d] += l.values[e] * value_of(l.rows[n * D + d]);
      });
      for (int64_t f = 0; f < kFeatures; ++f) EXPECT(totals[f] == mass[f]);
      for (int64_t i = 0; i < kFeatures * D; ++i) EXPECT(sums[i] == want[i]);
    }
  }
}

// Indices that name no feature: the token is NaN, sums over tokens are without them.
CASE(sae_wrong_indices) {
  Random random(4);
  const Lists<float> l(0, 8, random);
  l.indices[3] = kFeatures;
  l.indices[kEntries + 1] = -1;
  const Array<float> out(kTokens * 8), sums(kFeatures * 8), totals(kFeatures);
  run(Decode{l.list, l.table(l.weight), nullptr, {}, 8, out.data(), nullptr});
  for (int64_t i = 0; i < kTokens * 8; ++i) EXPECT(std::isnan(out[i]) == (i / 8 < 2));
  run(Scatter{l.list, l.table(l.rows), 8, sums.data(), totals.data()});
  for (int64_t i = 0; i < kFeatures * 8; ++i) EXPECT(!std::isnan(sums[i]));
}

}  // namespace sae_test
