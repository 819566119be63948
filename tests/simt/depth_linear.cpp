// SPDX-License-Identifier: Apache-2.0
#include "depth_batching/cuda/best_lists.cu"
#include "depth_batching/cuda/gate.cu"
#include "depth_batching/cuda/head.cu"
#include "depth_batching/cuda/head_rows.cu"
#include "depth_batching/cuda/linear.cu"
#include "depth_batching/cuda/norm.cu"
#include "depth_batching/cuda/shortlist.cu"

#include "sae_data.h"

namespace depth_linear_test {
namespace {

using namespace gemma_ext::depth_batching;
using gemma_ext::DType;
namespace cuda = gemma_ext::depth_batching::cuda;
using sae_test::Array;
using sae_test::Random;
using sae_test::Storage;
using sae_test::value_of;

template <class Call>
void run(const Call& call) {
  const Array<uint8_t> memory(cuda::workspace(call));
  EXPECT(cuda::run(call, memory.data(), nullptr) == 0);
}

// Small whole numbers, whose sums are exact, so that every row is what it is alone: three loops, of which the second
// has no rows, and two rows behind them; x and weights in arrays as long as they are.
template <class T>
void linear_matches(int64_t n, int64_t features, int64_t rank, Activation activation,
                    Random& random) {
  constexpr int64_t kLoops = 3, D = 24;
  const Array<T> x = random.numbers<T>(n * D), bias = random.numbers<T>(features);
  const Array<int32_t> offsets(kLoops + 1);
  offsets[0] = 0;
  offsets[1] = offsets[2] = static_cast<int32_t>(n / 3);
  offsets[3] = static_cast<int32_t>(n > 2 ? n - 2 : n);
  Linear call{};
  call.x = x.data();
  call.x_stride = D;
  call.n = n;
  call.D = D;
  call.loops = kLoops;
  call.type = Storage<T>::kType;
  call.count = 2;
  call.seg_offsets = offsets.data();
  call.scale = 0.5f;
  call.activation = activation;
  std::vector<Array<T>> kept;
  for (int p = 0; p < 2; ++p) {
    const int64_t own = p == 0 ? rank : 8;
    kept.push_back(random.numbers<T>(features * D));
    kept.push_back(random.numbers<T>(kLoops * own * D, -1, 1));
    kept.push_back(random.numbers<T>(kLoops * features * own, -1, 1));
    call.projections[p] = {kept[3 * p].data(),
                           p == 0 ? bias.data() : nullptr,
                           kept[3 * p + 1].data(),
                           kept[3 * p + 2].data(),
                           features,
                           own,
                           D,
                           D,
                           own,
                           0};
  }
  call.y_width = width_of(call);
  const Array<T> y(n * call.y_width);
  call.y = y.data();
  run(call);
  const auto sum_of = [&](int p, int64_t row, int64_t f) {
    const int64_t own = call.projections[p].rank;
    double sum = p == 0 ? value_of(bias[f]) : 0;
    for (int64_t d = 0; d < D; ++d)
      sum += value_of(x[row * D + d]) * value_of(kept[3 * p][f * D + d]);
    int64_t loop = 0;
    while (loop < kLoops && row >= offsets[loop + 1]) ++loop;
    for (int64_t r = 0; loop < kLoops && r < own; ++r) {
      double low = 0;
      for (int64_t d = 0; d < D; ++d)
        low += value_of(x[row * D + d]) * value_of(kept[3 * p + 1][(loop * own + r) * D + d]);
      sum += low / 2 * value_of(kept[3 * p + 2][(loop * features + f) * own + r]);
    }
    return sum;
  };
  for (int64_t row = 0; row < n; ++row)
    for (int64_t at = 0; at < call.y_width; ++at) {
      const double got = value_of(y[row * call.y_width + at]);
      if (activation == kNone) {
        EXPECT(got == value_of(Storage<T>::of(
                          static_cast<float>(sum_of(at >= features, row, at % features)))));
        continue;
      }
      const double gate = sum_of(0, row, at),
                   want = gate / (1 + std::exp(-gate)) * sum_of(1, row, at);
      EXPECT(std::fabs(got - want) <= (sizeof(T) == 2 ? 4e-3 : 1e-5) * std::fabs(want) + 1e-6);
    }
}

// Whole numbers, so that logits are exact and many are equal.
template <class T>
void head_matches(int64_t n, int64_t vocabulary, int64_t candidates, Random& random) {
  constexpr int64_t D = 16;
  const Array<T> h = random.numbers<T>(n * D, -2, 2), w = random.numbers<T>(vocabulary * D, -2, 2);
  const Array<int32_t> ids(n), indices(n * candidates);
  const Array<float> top(2 * n), lse(n), entropy(n), values(n * candidates), threshold(n);
  const Array<uint8_t> exits(n);
  HeadExit call{};
  call.head = {h.data(),
               D,
               Storage<T>::kType,
               nullptr,
               Storage<T>::kType,
               {},
               w.data(),
               D,
               Storage<T>::kType,
               nullptr,
               n,
               vocabulary,
               D,
               1.0f,
               0.0f};
  call.mode = kMargin;
  call.threshold = threshold.data();
  for (int64_t i = 0; i < n; ++i) threshold[i] = 0.1f;
  call.candidates = candidates;
  call.ids = ids.data();
  call.top = top.data();
  call.lse = lse.data();
  call.entropy = entropy.data();
  call.exits = exits.data();
  call.values = values.data();
  call.indices = indices.data();
  run(call);
  for (int64_t row = 0; row < n; ++row) {
    std::vector<std::pair<double, int64_t>> order;  // -logit, id
    for (int64_t v = 0; v < vocabulary; ++v) {
      double s = 0;
      for (int64_t d = 0; d < D; ++d) s += value_of(h[row * D + d]) * value_of(w[v * D + d]);
      order.push_back({-s, v});
    }
    std::sort(order.begin(), order.end());
    double total = 0, mean = 0;
    for (const auto& [s, v] : order) total += std::exp(order[0].first - s);
    for (const auto& [s, v] : order) mean += std::exp(order[0].first - s) / total * -s;
    const double want = std::log(total) - order[0].first;
    EXPECT(ids[row] == order[0].second && top[2 * row] == -order[0].first);
    EXPECT(std::fabs(lse[row] - want) < 1e-4 && std::fabs(entropy[row] - (want - mean)) < 1e-4);
    if (vocabulary > 1) {
      EXPECT(top[2 * row + 1] == -order[1].first);
      const double margin = (1 - std::exp(order[0].first - order[1].first)) / total;
      if (std::fabs(margin - 0.1) > 1e-4) EXPECT(exits[row] == (margin > 0.1));
    }
    for (int64_t c = 0; c < candidates; ++c)
      EXPECT(indices[row * candidates + c] == order[c].second &&
             values[row * candidates + c] == -order[c].first);
  }
}

// Whole numbers, of which the codes are off by a quarter here and there.
template <class T>
void shortlist_holds(int64_t n, int64_t vocabulary, int64_t D, int64_t candidates, Random& random) {
  const Array<T> h = random.numbers<T>(n * D, -3, 3), w = random.numbers<T>(vocabulary * D, -3, 3);
  const Array<int8_t> codes(vocabulary * D);
  const Array<float> scale(vocabulary), slack(vocabulary), top(2 * n), rest(n), low(n), high(n);
  const Array<int32_t> ids(n);
  for (int64_t v = 0; v < vocabulary; ++v) {
    scale[v] = 0.25f;
    double off = 0, norm = 0;
    for (int64_t d = 0; d < D; ++d) {
      const int x = static_cast<int>(value_of(w[v * D + d]));
      codes[v * D + d] = static_cast<int8_t>(4 * x + (v + d) % 3 - 1);
      off += std::pow(((v + d) % 3 - 1) * 0.25, 2);
      norm += x * x;
    }
    slack[v] = static_cast<float>(std::sqrt(off) + (D + 16) * 0x1p-22 * std::sqrt(norm)) * 1.0001f;
  }
  Shortlist call{};
  call.head.h = h.data();
  call.head.h_stride = call.head.w_stride = call.head.D = call.code_stride = D;
  call.head.h_type = call.head.norm_type = call.head.type = Storage<T>::kType;
  call.head.weight = w.data();
  call.head.n = n;
  call.head.V = vocabulary;
  call.head.scale = 0.5f;
  call.codes = codes.data();
  call.code_scale = scale.data();
  call.slack = slack.data();
  call.candidates = candidates;
  call.ids = ids.data();
  call.top = top.data();
  call.rest = rest.data();
  call.low = low.data();
  call.high = high.data();
  run(call);
  for (int64_t row = 0; row < n; ++row) {
    std::vector<double> s(vocabulary);
    for (int64_t v = 0; v < vocabulary; ++v)
      for (int64_t d = 0; d < D; ++d) s[v] += value_of(h[row * D + d]) * value_of(w[v * D + d]) / 2;
    const int64_t best = std::max_element(s.begin(), s.end()) - s.begin();
    double total = 0;
    for (const double x : s) total += std::exp(x - top[2 * row]);
    EXPECT(low[row] <= std::log(total) && std::log(total) <= high[row]);
    EXPECT(top[2 * row] == s[ids[row]]);
    if (candidates == vocabulary) EXPECT(ids[row] == best && std::isinf(rest[row]));
    if (top[2 * row] > rest[row]) EXPECT(ids[row] == best);
    EXPECT(std::max<double>(top[2 * row], rest[row]) >= s[best]);
  }
}

}  // namespace

CASE(depth_shortlist) {
  Random random(6);
  shortlist_holds<simt::bf16>(3, 300, 16, 9, random);
  shortlist_holds<simt::bf16>(18, 130, 144, 70, random);
  shortlist_holds<float>(2, 129, 80, 1, random);
  shortlist_holds<float>(1, 5, 16, 5, random);
}

CASE(depth_linear_few_rows) {
  Random random(1);
  linear_matches<simt::bf16>(5, 40, 16, kNone, random);
  linear_matches<float>(7, 33, 8, kNone, random);
  linear_matches<simt::bf16>(3, 24, 8, kSilu, random);
}

CASE(depth_linear_more_rows) {
  Random random(2);
  linear_matches<simt::bf16>(20, 40, 40, kNone, random);
  linear_matches<float>(19, 20, 8, kSilu, random);
}

CASE(depth_linear_many_rows) {
  Random random(3);
  linear_matches<simt::bf16>(130, 20, 16, kNone, random);
}

CASE(depth_head) {
  Random random(4);
  head_matches<simt::bf16>(3, 300, 9, random);
  head_matches<float>(2, 130, 130, random);
  head_matches<simt::bf16>(17, 1, 1, random);
}

CASE(depth_norms) {
  Random random(5);
  constexpr int64_t S = 5, D = 37, n = 3;
  const Array<float> bank = random.numbers<float>(S * D, 1, 4), weight = random.numbers<float>(D);
  const Array<float> y = random.numbers<float>(n * D, 1, 3), next(n * D);
  const Array<int32_t> slots(n);
  slots[0] = 4;
  slots[1] = -1;
  slots[2] = 0;
  std::vector<double> before(S * D);
  for (int64_t i = 0; i < S * D; ++i) before[i] = bank[i];
  const DType type = DType::kFloat32;
  run(Scatter{bank.data(),
              type,
              S,
              D,
              n,
              slots.data(),
              y.data(),
              D,
              type,
              weight.data(),
              type,
              weight.data(),
              type,
              {1e-6f, true},
              next.data()});
  const auto norm = [&](const auto& x, int64_t i) {
    double squares = 0;
    for (int64_t d = 0; d < D; ++d) squares += x(d) * x(d);
    return x(i) / std::sqrt(squares / D + 1e-6) * (1 + weight[i]);
  };
  for (int64_t row = 0; row < n; ++row)
    for (int64_t d = 0; d < D; ++d) {
      const int64_t slot = slots[row];
      if (slot < 0) {
        EXPECT(next[row * D + d] == 0);
        continue;
      }
      const double step = norm([&](int64_t i) { return double(y[row * D + i]); }, d);
      EXPECT(std::fabs(bank[slot * D + d] - before[slot * D + d] - step) < 1e-5);
      const double want = norm([&](int64_t i) { return double(bank[slot * D + i]); }, d);
      EXPECT(std::fabs(next[row * D + d] - want) < 1e-5);
    }
}

}  // namespace depth_linear_test
