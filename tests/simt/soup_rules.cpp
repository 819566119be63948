// SPDX-License-Identifier: Apache-2.0
#include "souping/cuda/apply.cu"
#include "souping/cuda/gather_rows.cu"

#include "soup_data.h"

namespace soup_test {
namespace {

// f<A>(data, numbers, p, i)
template <class F>
void rule_matches(Element element, int models, int columns, bool based, F f, int task = -1) {
  Data d({.models = models,
          .parts = {{5001, 3}, {0}, {333, 8}},
          .based = based,
          .extras = element == Element::kFisher ? models : 0});
  const auto numbers = d.numbers(d.parts() * columns, 0.0, 0.9);
  for (Rounding rounding : {Rounding::kNearest, Rounding::kStochastic}) {
    run(Apply{d.table(), element, numbers.data(), columns, 2, task, rounding});
    expect_outs(d, false, rounding, [&](auto zero, int64_t p, int64_t i) {
      return f(zero, d, &numbers[p * columns], p, i);
    });
  }
}

}  // namespace

// By the zero-one principle (Knuth, volume 3, 5.3.4): a network that sorts all inputs of 0 and 1 sorts everything.
template <int kM>
void network_sorts(int count) {
  for (unsigned bits = 0; bits < 1u << count; ++bits) {
    float x[kMaxModels];
    for (int m = 0; m < count; ++m) x[m] = static_cast<float>(bits >> m & 1);
    sort_terms<kM>(x, count);
    EXPECT(std::is_sorted(x, x + count));
    EXPECT(sum_sorted<kM>(x, count) == static_cast<float>(simt::popcount(bits)));
  }
}

CASE(sorting_networks) {
  network_sorts<1>(1);
  network_sorts<2>(2);
  network_sorts<3>(3);
  network_sorts<4>(4);
  network_sorts<8>(8);
  for (int count = 0; count <= 17; ++count) network_sorts<0>(count);
  simt::host::Random random(5);
  for (int count = 18; count <= kMaxModels; ++count) {
    float x[kMaxModels];
    for (int m = 0; m < count; ++m) x[m] = static_cast<float>(random.below(40) - 20);
    sort_terms<0>(x, count);
    EXPECT(std::is_sorted(x, x + count));
  }
}

CASE(rule_consensus) {
  for (int task : {-1, 1}) {
    for (int models : {3, 6}) {
      const auto want = [&](auto zero, const Data& d, const double* n, int64_t p, int64_t i) {
        using A = decltype(zero);
        A terms[kMaxModels];
        int votes = 0;
        for (int m = 0; m < models; ++m) terms[m] = d.delta<A>(p, m, i);
        const A total = sum_terms<0>(terms, models);
        bool chosen = false;
        for (int m = 0; m < models; ++m) {
          const A x = d.delta<A>(p, m, i);
          const bool uses = std::fabs(x) > static_cast<A>(n[m]) * std::fabs(total - x);
          votes += uses;
          chosen |= uses && m == task;
        }
        const bool use = task < 0 ? votes >= 2 : chosen;
        if (total != total) return static_cast<A>(NAN);
        return static_cast<A>(d.at(d.base[p], i)) +
               static_cast<A>(n[models]) * (use ? total : A{0});
      };
      rule_matches(Element::kConsensus, models, models + 1, true, want, task);
    }
  }
}

CASE(rule_fisher) {
  for (bool based : {true, false}) {
    for (int models : {2, 5}) {
      const auto want = [&](auto zero, const Data& d, const double* n, int64_t p, int64_t i) {
        using A = decltype(zero);
        A aboves[kMaxModels], belows[kMaxModels], plains[kMaxModels], numbers[kMaxModels];
        for (int m = 0; m < models; ++m) {
          const A c = static_cast<A>(n[m]), x = d.delta<A>(p, m, i);
          const A weight =
              fisher_weight(c, static_cast<A>(d.at(d.extra[p * models + m], i)),
                            static_cast<A>(n[models + m]), static_cast<A>(n[2 * models]));
          aboves[m] = weight * x;
          belows[m] = weight;
          plains[m] = c * x;
          numbers[m] = c;
        }
        const A above = sum_terms<0>(aboves, models), below = sum_terms<0>(belows, models);
        const A plain = sum_terms<0>(plains, models), coefficients = sum_terms<0>(numbers, models);
        const A mean = above / below;
        if (!based) return below == 0 ? plain / coefficients : mean;
        return static_cast<A>(d.at(d.base[p], i)) + (below == 0 ? A{0} : mean);
      };
      rule_matches(Element::kFisher, models, 2 * models + 1, based, want);
    }
  }
}

CASE(rule_nearswap) {
  rule_matches(Element::kNearswap, 1, 1, true,
               [](auto zero, const Data& d, const double* n, int64_t p, int64_t i) {
                 using A = decltype(zero);
                 return nearswap(static_cast<A>(d.at(d.base[p], i)), d.delta<A>(p, 0, i),
                                 static_cast<A>(n[0]));
               });
}

CASE(rule_mutate) {
  rule_matches(Element::kMutate, 1, 2, false,
               [](auto zero, const Data& d, const double* n, int64_t p, int64_t i) {
                 using A = decltype(zero);
                 const uint32_t model = d.model[p];
                 const int64_t odd = (d.part[p].offset + i) % 2;
                 float normal[2];
                 normal_pair(d.word(p, model, kNoise, i - odd),
                             d.word(p, model, kNoise, i - odd + 1), &normal[0], &normal[1]);
                 const A x = d.delta<A>(p, 0, i);
                 const A moved = x + static_cast<A>(n[1]) * static_cast<A>(normal[odd]);
                 return uniform(d.word(p, model, kGene, i)) < n[0] ? moved : x;
               });
}

CASE(rule_pick) {
  for (bool by_magnitude : {false, true}) {
    const auto want = [&](auto zero, const Data& d, const double* n, int64_t p, int64_t i) {
      using A = decltype(zero);
      float top = 0, total = 0, bound[3];
      const auto size = [&](int m) { return std::fabs(static_cast<float>(d.delta<A>(p, m, i))); };
      for (int m = 0; m < 3; ++m) top = size(m) > top ? size(m) : top;
      for (int m = 0; m < 3; ++m) {
        const float share = by_magnitude ? exp_of(size(m) - top) : 1.0f;
        total = total + static_cast<float>(n[m]) * share;
        bound[m] = total;
      }
      const float at = uniform(d.word(p, 0, kChoice, i)) * total;
      A found = d.delta<A>(p, 0, i);
      for (int m = 1; m < 3; ++m) found = at >= bound[m - 1] ? d.delta<A>(p, m, i) : found;
      return found;
    };
    rule_matches(by_magnitude ? Element::kPickMagnitude : Element::kPick, 3, 3, false, want);
  }
}

CASE(rule_blend) {
  rule_matches(Element::kBlend, 3, 4, false,
               [](auto zero, const Data& d, const double* n, int64_t p, int64_t i) {
                 using A = decltype(zero);
                 A low = d.delta<A>(p, 0, i), high = low, terms[3];
                 for (int m = 0; m < 3; ++m) {
                   const A x = d.delta<A>(p, m, i);
                   low = x < low ? x : low;
                   high = x > high ? x : high;
                   terms[m] = weighted(static_cast<A>(n[m]), x);
                 }
                 const A sum = sum_terms<0>(terms, 3);
                 const A away = static_cast<A>(n[3]) * (high - low);
                 return clamped(sum, low - away, high + away);
               });
}

CASE(swarm) {
  Data d({.models = 4, .parts = {{5003, 5}, {0}, {64}}, .based = false});
  const auto numbers = d.numbers(3 * 5);
  std::vector<Array> velocity, before;
  for (int64_t p = 0; p < d.parts(); ++p) {
    velocity.push_back(d.array(d.part[p].numel, 0.1f));
    before.push_back({malloc(4 * d.part[p].numel + 1), DType::kFloat32});
    for (int64_t i = 0; i < d.part[p].numel; ++i)
      Data::put(static_cast<uint8_t*>(const_cast<void*>(before[p].data)), DType::kFloat32, i,
                d.at(velocity[p], i));
  }
  run(Swarm{d.table(), velocity.data(), numbers.data(), Rounding::kStochastic});
  const auto speed = [&](auto zero, int64_t p, int64_t i) {
    using A = decltype(zero);
    A c[4], x[4];
    for (int k = 0; k < 4; ++k) {
      c[k] = static_cast<A>(numbers[5 * p + k]);
      x[k] = d.at(d.source[4 * p + k], i);
    }
    return swarm_velocity<A>(c, x[0], d.at(before[p], i), x[1], x[2], x[3]);
  };
  expect_outs(d, false, Rounding::kStochastic, [&](auto zero, int64_t p, int64_t i) {
    using A = decltype(zero);
    const A x = d.at(d.source[4 * p], i);
    return x + static_cast<A>(numbers[5 * p + 4]) * speed(zero, p, i);
  });
  std::vector<Array> outs = velocity;
  std::swap(d.out, outs);
  for (int64_t p = 0; p < d.parts(); ++p) {
    for (int64_t i = 0; i < d.part[p].numel; ++i) {
      const bool wide = outs[p].type == DType::kFloat32;
      const uint32_t want = wide ? rounded(d, p, i, speed(double{}, p, i), Rounding::kNearest)
                                 : rounded(d, p, i, speed(float{}, p, i), Rounding::kNearest);
      EXPECT(bits_at(velocity[p], i) == want);
    }
    free(const_cast<void*>(before[p].data));
  }
}

void gathers(int64_t width) {
  Data d({.models = 3, .parts = {{20 * width, 0, width}}});
  simt::host::Random random(3);
  const int64_t count = 30;
  const std::vector<int64_t> limit(3, 20);
  std::vector<int64_t> rows(count * 3);
  for (int64_t& row : rows) row = random.below(24) - 4;
  for (int64_t& row : rows) row = std::max<int64_t>(row, -1);
  for (DType type : {DType::kBFloat16, DType::kFloat32}) {
    d.o.types = {type};
    d.out = {d.array(count * width, 1.0f)};
    d.part[0].numel = count * width;
    run(GatherRows{d.source.data(), rows.data(), limit.data(), d.out[0], 3, count, width});
    for (int64_t v = 0; v < count; ++v) {
      for (int64_t i = 0; i < width; ++i) {
        float sum = 0, x[3];
        int owners = 0, owner = 0;
        for (int m = 0; m < 3; ++m) {
          const int64_t row = rows[3 * v + m];
          if (row < 0) continue;
          x[owners++] = d.at(d.source[m], row * width + i);
          owner = m;
        }
        if (owners) sum = sum_terms<0>(x, owners);
        const Array& only = d.source[owner];
        const uint32_t want = owners == 1 && only.type == type
                                  ? bits_at(only, rows[3 * v + owner] * width + i)
                                  : rounded(d, 0, i, sum / static_cast<float>(std::max(owners, 1)),
                                            Rounding::kNearest);
        EXPECT(bits_at(d.out[0], v * width + i) == want);
      }
    }
  }
}

CASE(gather_rows) {
  gathers(40);
  gathers(13);
}

}  // namespace soup_test
