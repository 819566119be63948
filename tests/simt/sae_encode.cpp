// SPDX-License-Identifier: Apache-2.0
#include "sae/cuda/batch.cu"
#include "sae/cuda/group_max.cu"
#include "sae/cuda/ordered.cu"
#include "sae/cuda/scan.cu"
#include "sae/cuda/sort.cu"
#include "sae/cuda/threshold.cu"
#include "sae/cuda/topk.cu"

#include "sae_data.h"

namespace sae_test {
namespace {

enum class Shape { kRandom, kAscending, kEqual };

// An encoder, all of its p, and lists chosen from that.
template <class T>
struct Problem {
  Array<T> x, weight;
  Array<float> bias, scale;
  Array<uint8_t> mask;
  Encoder encoder;
  std::vector<std::vector<double>> p;

  Problem(int64_t N, int64_t D, int64_t F, Shape shape, unsigned seed)
      : x(N * D), weight(F * D), bias(F), scale(F), mask(F) {
    Random random(seed);
    x = random.numbers<T>(N * D);
    weight = random.numbers<T>(F * D);
    bias = random.numbers<float>(F);
    for (int64_t f = 0; f < F; ++f) {
      scale[f] = std::ldexp(1.0f, random.between(-1, 1));
      mask[f] = random.between(0, 4) == 0;
      if (shape != Shape::kRandom) bias[f] = shape == Shape::kEqual ? 1.0f : static_cast<float>(f);
      for (int64_t d = 0; shape != Shape::kRandom && d < D; ++d)
        weight[f * D + d] = Storage<T>::of(0.0f);
    }
    encoder = {x.data(),    weight.data(), D, 1, D, 1, Storage<T>::kType,
               bias.data(), scale.data(),  N, F, D};
    recompute();
  }
  void recompute() {
    const auto [N, F, D] = std::tuple(encoder.N, encoder.F, encoder.D);
    p.assign(N, std::vector<double>(F));
    for (int64_t n = 0; n < N; ++n) {
      for (int64_t f = 0; f < F; ++f) {
        double sum = bias[f];
        for (int64_t d = 0; d < D; ++d) sum += value_of(x[n * D + d]) * value_of(weight[f * D + d]);
        p[n][f] = sum;
      }
    }
  }
  uint64_t rank(int64_t n, int f, bool magnitude) const {
    const double size = magnitude ? std::fabs(p[n][f]) : p[n][f];
    return rank_of(static_cast<float>(size * scale[f]), f);
  }
  std::vector<int> best(int64_t n, int64_t k, bool magnitude, bool masked) const {
    std::vector<int> found;
    for (int f = 0; f < encoder.F; ++f)
      if (!masked || mask[f]) found.push_back(f);
    std::sort(found.begin(), found.end(),
              [&](int a, int b) { return rank(n, a, magnitude) > rank(n, b, magnitude); });
    found.resize(std::min<size_t>(found.size(), k));
    return found;
  }
};

template <class T>
void expect_list(const Problem<T>& q, int64_t n, const std::vector<int>& want, const float* values,
                 const int32_t* indices, int64_t room) {
  for (int64_t i = 0; i < room; ++i) {
    const bool there = i < static_cast<int64_t>(want.size());
    EXPECT(indices[i] == (there ? want[i] : 0));
    EXPECT(same(values[i], there ? q.p[n][want[i]] : 0));
  }
}

template <class T>
void topk_matches(int64_t N, int64_t D, int64_t F, int64_t k, Shape shape, bool magnitude,
                  bool poisoned = false) {
  Problem<T> q(N, D, F, shape, 3);
  if (poisoned) {
    q.x[D] = Storage<T>::of(NAN);
    q.recompute();
  }
  const int64_t k_aux = std::min<int64_t>(5, F);
  const Array<float> values(N * k), aux_values(N * k_aux);
  const Array<int32_t> indices(N * k), aux_indices(N * k_aux);
  TopK call{q.encoder, magnitude, k, values.data(), indices.data(), {}};
  for (const bool aux : {false, true}) {
    if (aux) call.aux = {q.mask.data(), k_aux, aux_values.data(), aux_indices.data()};
    run(call);
    for (int64_t n = 0; n < N; ++n) {
      expect_list(q, n, q.best(n, k, magnitude, false), &values[n * k], &indices[n * k], k);
      if (aux) {
        expect_list(q, n, q.best(n, k_aux, false, true), &aux_values[n * k_aux],
                    &aux_indices[n * k_aux], k_aux);
      }
    }
  }
}

// The batch's best, by a sort of everything.
template <class T>
void batch_matches(int64_t N, int64_t D, int64_t F, int64_t total, Shape shape) {
  const Problem<T> q(N, D, F, shape, 5);
  const Array<float> values(total), least(1);
  const Array<int32_t> indices(total);
  const Array<int64_t> offsets(N + 1);
  run(BatchTopK{q.encoder, total, values.data(), indices.data(), offsets.data(), least.data(), {}});
  std::vector<int64_t> order;
  const auto score = [&](int64_t at) { return q.p[at / F][at % F] * q.scale[at % F]; };
  for (int64_t at = 0; at < N * F; ++at)
    if (score(at) > 0) order.push_back(at);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return score(a) > score(b); });
  order.resize(std::min<size_t>(order.size(), total));
  const double smallest =
      order.empty() ? std::numeric_limits<double>::infinity() : score(order.back());
  EXPECT(least[0] == smallest);
  std::sort(order.begin(), order.end());
  EXPECT(offsets[0] == 0 && offsets[N] == static_cast<int64_t>(order.size()));
  for (int64_t i = 0; i < total; ++i) {
    const bool there = i < offsets[N];
    EXPECT(indices[i] == (there ? order[i] % F : 0));
    EXPECT(values[i] == (there ? q.p[order[i] / F][order[i] % F] : 0));
    if (there) EXPECT(offsets[order[i] / F] <= i && i < offsets[order[i] / F + 1]);
  }
}

// Padded with room for `capacity`, and as long as they are.
template <class T>
void threshold_matches(int64_t N, int64_t D, int64_t F, int64_t capacity, Shape shape) {
  const Problem<T> q(N, D, F, shape, 7);
  Array<float> limit(F);
  for (int64_t f = 0; f < F; ++f) limit[f] = static_cast<float>(f % 7) - 3;
  const Array<int64_t> counts(N), offsets(N + 1);
  for (const bool inclusive : {false, true}) {
    std::vector<std::vector<int>> want(N);
    int64_t nnz = 0;
    for (int64_t n = 0; n < N; ++n) {
      for (int f = 0; f < F; ++f) {
        const double score = q.p[n][f] * q.scale[f];
        if (inclusive ? score >= limit[f] : score > limit[f]) want[n].push_back(f);
      }
      nnz += want[n].size();
    }
    const Array<float> values(N * capacity), listed(nnz);
    const Array<int32_t> indices(N * capacity), listed_indices(nnz);
    Threshold call{};
    call.encoder = q.encoder;
    call.limit = limit.data();
    call.inclusive = inclusive;
    call.counts = counts.data();
    call.capacity = capacity;
    call.values = values.data();
    call.indices = indices.data();
    run(call);
    for (int64_t n = 0; n < N; ++n) {
      EXPECT(counts[n] == static_cast<int64_t>(want[n].size()));
      const float* row = &values[n * capacity];
      if (counts[n] <= capacity) {
        expect_list(q, n, want[n], row, &indices[n * capacity], capacity);
      } else {
        for (int64_t i = 0; i < capacity; ++i)
          EXPECT(std::isnan(row[i]) && indices[n * capacity + i] == 0);
      }
    }
    call.capacity = -1;
    call.offsets = offsets.data();
    Array<uint8_t> more(0);
    run(call, cuda::AllocateEntries([&](int64_t count) {
          EXPECT(count == nnz);
          return Entries{listed.data(), listed_indices.data()};
        }),
        cuda::AllocateBytes([&](int64_t bytes) {
          more = Array<uint8_t>(bytes);
          return more.data();
        }));
    for (int64_t n = 0; n < N; ++n) {
      EXPECT(offsets[n + 1] - offsets[n] == static_cast<int64_t>(want[n].size()));
      expect_list(q, n, want[n], listed.data() + offsets[n], listed_indices.data() + offsets[n],
                  offsets[n + 1] - offsets[n]);
    }
  }
}

}  // namespace

CASE(sae_topk) {
  topk_matches<simt::bf16>(5, 24, 1500, 6, Shape::kRandom, false);
  topk_matches<simt::bf16>(2, 8, 30, 30, Shape::kRandom, true);
}
CASE(sae_topk_before_hopper) {
  simt::host::options.hopper = false;
  topk_matches<simt::bf16>(3, 24, 1500, 6, Shape::kRandom, true);
  topk_matches<float>(3, 12, 1300, 4, Shape::kRandom, false);
}
// Each stage is better than all before: every list runs over.
CASE(sae_topk_of_ascending_features) {
  topk_matches<simt::bf16>(3, 8, 3000, 5, Shape::kAscending, false);
}
CASE(sae_topk_of_equal_features) { topk_matches<simt::bf16>(2, 8, 1500, 40, Shape::kEqual, false); }
CASE(sae_topk_of_a_poisoned_row) {
  topk_matches<simt::bf16>(3, 8, 1500, 4, Shape::kRandom, false, true);
}
// An infinity, what bf16 rounds to one, and a row beside them.
CASE(sae_topk_of_infinities) {
  simt::host::options.hopper = false;
  Problem<float> q(3, 12, 1300, Shape::kRandom, 11);
  for (int64_t f = 0; f < 1300; ++f) {
    q.bias[f] = 0;
    for (int64_t d = 0; d < 12; ++d) q.weight[f * 12 + d] = static_cast<float>((f + d) % 3) - 1;
  }
  for (int64_t d = 0; d < 12; ++d) q.x[12 + d] = 0;
  q.x[4] = -INFINITY;
  q.x[12 + 7] = std::numeric_limits<float>::max();
  q.recompute();
  const Array<float> values(3 * 1300);
  const Array<int32_t> indices(3 * 1300);
  q.encoder.scale = nullptr;
  run(TopK{q.encoder, false, 1300, values.data(), indices.data(), {}});
  for (int64_t i = 0; i < 3 * 1300; ++i) EXPECT(same(values[i], q.p[i / 1300][indices[i]]));
  for (int64_t i = 0; i < 2 * 1300; ++i) EXPECT(i % 1300 == 0 || !(values[i] > values[i - 1]));
}
CASE(sae_topk_of_many) { topk_matches<simt::bf16>(2, 8, 2600, 2500, Shape::kRandom, false); }

CASE(sae_batch_topk) {
  batch_matches<simt::bf16>(6, 16, 1500, 37, Shape::kRandom);
  batch_matches<simt::bf16>(3, 8, 40, 120, Shape::kRandom);
  batch_matches<simt::bf16>(3, 8, 1400, 50, Shape::kEqual);
}
// More pass than there is room for: counted from products made again.
CASE(sae_batch_topk_of_ascending_features) {
  batch_matches<simt::bf16>(3, 8, 7500, 20, Shape::kAscending);
}
CASE(sae_threshold) {
  threshold_matches<simt::bf16>(4, 16, 700, 300, Shape::kRandom);
  threshold_matches<float>(3, 4, 300, 100, Shape::kRandom);
}
// Rows longer than there is room for.
CASE(sae_threshold_of_long_rows) {
  threshold_matches<simt::bf16>(2, 8, 1300, 1300, Shape::kAscending);
}

CASE(sae_group_max) {
  for (const int64_t groups : {1, 6, 20, 300}) {
    const Problem<simt::bf16> q(3, 16, 300, Shape::kRandom, 9);
    Encoder encoder = q.encoder;
    encoder.scale = nullptr;
    const Array<float> values(3 * groups);
    const Array<int32_t> indices(3 * groups);
    run(GroupMax{encoder, groups, values.data(), indices.data()});
    const int64_t size = 300 / groups;
    for (int64_t i = 0; i < 3 * groups; ++i) {
      const std::vector<double>& p = q.p[i / groups];
      const auto first = p.begin() + i % groups * size;
      const auto at = std::max_element(first, first + size);
      EXPECT(indices[i] == at - p.begin() && values[i] == *at);
    }
  }
}

}  // namespace sae_test
