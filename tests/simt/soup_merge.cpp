// SPDX-License-Identifier: Apache-2.0
#include "souping/cuda/batches.cu"
#include "souping/cuda/mask.cu"
#include "souping/cuda/merge.cu"
#include "souping/cuda/rows.cu"
#include "souping/cuda/soup.cu"
#include "souping/cuda/survey.cu"
#include "souping/cuda/table.cu"

#include "soup_data.h"

namespace soup_test {
namespace {

void soup_matches(const Options& options, bool wide, Rounding rounding) {
  Data d(options);
  const auto weights = d.numbers(d.parts() * options.models, -1), scale = d.numbers(d.parts());
  run(Soup{d.table(), weights.data(), scale.data(), false, wide, rounding});
  expect_outs(d, wide, rounding, [&](auto zero, int64_t p, int64_t i) {
    using A = decltype(zero);
    A terms[kMaxModels];
    for (int m = 0; m < options.models; ++m)
      terms[m] = weighted(static_cast<A>(weights[p * options.models + m]), d.delta<A>(p, m, i));
    const A sum = sum_terms<0>(terms, options.models);
    if (!options.based) return sum;
    return static_cast<A>(d.at(d.base[p], i)) + weighted(static_cast<A>(scale[p]), sum);
  });
}

// The cut of the `keep` largest magnitudes of each model of each part, with its ties.
struct Cuts {
  std::vector<int32_t> bits;
  std::vector<int64_t> ties;

  Cuts(const Data& d, double share) {
    for (int64_t p = 0; p < d.parts(); ++p) {
      for (int m = 0; m < d.o.models; ++m) {
        std::vector<uint32_t> keys;
        for (int64_t i = 0; i < d.part[p].numel; ++i) {
          const uint32_t key = magnitude(d.delta<float>(p, m, i));
          if (key != kNoKey) keys.push_back(key);
        }
        std::sort(keys.rbegin(), keys.rend());
        const auto keep = static_cast<int64_t>(share * static_cast<double>(keys.size()));
        const uint32_t bound = keep > 0 ? keys[keep - 1] : 0x7fffffff;
        bits.push_back(static_cast<int32_t>(bound));
        ties.push_back(
            keep -
            (std::upper_bound(keys.begin(), keys.end(), bound, std::greater<>()) - keys.begin()) +
            (keep > 0 ? std::count(keys.begin(), keys.end(), bound) : 0));
      }
    }
  }
};

bool takes(const Data& d, const Cuts& cuts, int64_t p, int m, int64_t i,
           std::vector<int64_t>& rank) {
  const int64_t at = p * d.o.models + m;
  const uint32_t key = magnitude(d.delta<float>(p, m, i)),
                 bits = static_cast<uint32_t>(cuts.bits[at]);
  const bool taken = in_cut(key, bits, rank[at], cuts.ties[at]);
  rank[at] += key == bits;
  return taken;
}

struct MergeCase {
  Rule rule = {Election::kSum, true, 1, Combine::kWeightedMean};
  bool cuts = true, density = true, alone = false;
  Rounding rounding = Rounding::kNearest;
};

void merge_matches(const Options& options, const MergeCase& c) {
  Data d(options);
  const int models = options.models;
  const int64_t count = d.parts() * models;
  const auto weights = d.numbers(count), divide = d.numbers(count, 0.5), alone = d.numbers(count),
             scale = d.numbers(d.parts()), density = d.numbers(count, 0.3, 0.9);
  const Cuts keep(d, 0.4), drop(d, 0.01);
  Cuts left_keep = keep, left_drop = drop;
  Mask mask{};
  if (c.cuts) {
    mask.keep = {left_keep.bits.data(), left_keep.ties.data(), d.parts(), false};
    mask.drop = {left_drop.bits.data(), left_drop.ties.data(), d.parts(), false};
  }
  if (c.density) mask.density = density.data();
  run(Merge{d.table(), c.rule, mask, weights.data(), divide.data(),
            c.alone ? alone.data() : nullptr, scale.data(), false, c.rounding});
  std::vector<int64_t> kept_rank(count), drop_rank(count);
  expect_outs(d, false, c.rounding, [&](auto zero, int64_t p, int64_t i) {
    using A = decltype(zero);
    A x[kMaxModels], votes[kMaxModels], voices[kMaxModels];
    bool kept[kMaxModels], nan = false;
    for (int m = 0; m < models; ++m) {
      const int64_t at = p * models + m;
      const A delta = d.delta<A>(p, m, i);
      nan |= delta != delta;
      kept[m] = !c.cuts || takes(d, keep, p, m, i, kept_rank);
      if (c.cuts) kept[m] &= !takes(d, drop, p, m, i, drop_rank);
      if (c.density) kept[m] &= uniform(d.word(p, d.model[at], kDrop, i)) < density[at];
      x[m] = term(kept[m], static_cast<A>(weights[at] / divide[at]), delta);
      votes[m] = c.rule.weighted ? x[m] : term(kept[m], static_cast<A>(1 / divide[at]), delta);
      voices[m] = c.rule.election == Election::kCount ? elected_sign(votes[m], 0) : votes[m];
    }
    const A sign = elected_sign(sum_terms<0>(voices, models), c.rule.zero);
    Combined<A> held{};
    for (int m = 0; m < models; ++m) {
      const int64_t at = p * models + m;
      const bool agree = c.rule.election == Election::kNone ? kept[m] : agrees(votes[m], sign);
      combine(c.rule.combine, agree, x[m], c.alone ? static_cast<A>(alone[at]) : A{1}, &held);
      voices[m] = agree ? static_cast<A>(weights[at]) : A{0};
      if (!agree) x[m] = nothing<A>();
    }
    held.weight = sum_terms<0>(voices, models);
    if (c.rule.combine != Combine::kMax) held.value = sum_terms<0>(x, models);
    if (nan) return static_cast<A>(NAN);
    return moved(options.based, options.based ? static_cast<A>(d.at(d.base[p], i)) : A{0},
                 static_cast<A>(scale[p]), combined(c.rule.combine, c.alone, held));
  });
  for (int64_t at = 0; c.cuts && at < count; ++at) {
    EXPECT(left_keep.ties[at] == std::max<int64_t>(keep.ties[at] - kept_rank[at], 0));
    EXPECT(left_drop.ties[at] == std::max<int64_t>(drop.ties[at] - drop_rank[at], 0));
  }
}

const Options kAligned = {.models = 4,
                          .parts = {{9000}, {8192}, {24}},
                          .aligned = true,
                          .special = false,
                          .types = {DType::kBFloat16}};

}  // namespace

CASE(soup_values) {
  for (int models : {0, 1, 2, 3, 5, 9}) soup_matches({.models = models}, false, Rounding::kNearest);
  soup_matches({.based = false}, false, Rounding::kStochastic);
  soup_matches({}, true, Rounding::kStochastic);
}
CASE(soup_whole_words) { soup_matches(kAligned, false, Rounding::kNearest); }

void soup_rows_match(const std::vector<Shape>& parts) {
  Data d({.parts = parts});
  const int64_t rows = d.part.back().row + parts.back().numel / parts.back().width;
  const auto weights = d.numbers(rows * 3, -1), scale = d.numbers(rows);
  run(Soup{d.table(), weights.data(), scale.data(), true, false, Rounding::kNearest});
  expect_outs(d, false, Rounding::kNearest, [&](auto zero, int64_t p, int64_t i) {
    using A = decltype(zero);
    const int64_t row = d.part[p].row + i / d.part[p].width;
    A terms[3];
    for (int m = 0; m < 3; ++m)
      terms[m] = weighted(static_cast<A>(weights[row * 3 + m]), d.delta<A>(p, m, i));
    const A sum = sum_terms<3>(terms, 3);
    return static_cast<A>(d.at(d.base[p], i)) + weighted(static_cast<A>(scale[row]), sum);
  });
}

CASE(soup_rows) { soup_rows_match({{7 * 13, 0, 13}, {3 * 300, 600, 300}}); }
CASE(soup_rows_beyond_parameters) { soup_rows_match({{40'000, 5, 1}}); }

CASE(parts_are_cut_between_rows) {
  Data d({.parts = {{7 * 10, 20, 10}, {0}, {3 * 40, 0, 40}}, .extras = 1});
  const cuda::Split split(d.table(), 25);
  const Table t = split.table(d.table());
  EXPECT(t.parts == 4 + 3 && split.origin == std::vector<int64_t>({0, 0, 0, 0, 2, 2, 2}));
  int64_t at = 0;
  for (int64_t p = 0; p < t.parts; ++p) {
    const int64_t whole = split.origin[p], size = gemma_ext::size_of(d.base[whole].type);
    if (p > 0 && split.origin[p - 1] != whole) at = 0;
    EXPECT(t.part[p].numel == std::min<int64_t>(whole == 0 ? 20 : 40, d.part[whole].numel - at));
    EXPECT(t.part[p].offset == d.part[whole].offset + at && t.part[p].key == d.part[whole].key);
    EXPECT(t.part[p].row == d.part[whole].row + at / t.part[p].width);
    const char* base = static_cast<const char*>(d.base[whole].data);
    EXPECT(t.base[p].data == base + at * size && t.model[3 * p + 2] == 4);
    at += t.part[p].numel;
  }
}

CASE(merge_trimmed) { merge_matches({}, {}); }
CASE(merge_trimmed_whole_words) { merge_matches(kAligned, {.density = false}); }
CASE(merge_of_many) {
  merge_matches({.models = 9, .parts = {{4500, 5}, {300}}}, {.rounding = Rounding::kStochastic});
}
CASE(merge_rules) {
  const Options small = {.parts = {{700, 5}, {64}}};
  merge_matches(small, {.rule = {Election::kNone, true, 1, Combine::kSum}, .cuts = false});
  merge_matches(small, {.rule = {Election::kCount, false, -1, Combine::kMax}});
  merge_matches(small, {.rule = {Election::kSum, false, 0, Combine::kMean}, .alone = true});
  merge_matches({.models = 6, .parts = {{640}}, .based = false}, {.density = false});
}

// One cut for all parts: their ties go on from part to part.
CASE(merge_one_cut) {
  Data d({.models = 2,
          .parts = {{6000, 0}, {9000, 6000}, {50, 15000}},
          .special = false,
          .types = {DType::kBFloat16}});
  const std::vector<double> ones(6, 1.0);
  std::vector<int32_t> bits = {static_cast<int32_t>(to_bits(0.005f)), 0};
  bits[1] = static_cast<int32_t>(magnitude(d.delta<float>(0, 1, 17)));
  const std::vector<int64_t> ties = {0, 40};
  std::vector<int64_t> left = ties;
  Mask mask{};
  mask.keep = {bits.data(), left.data(), 1, false};
  run(Merge{d.table(),
            {Election::kNone, true, 1, Combine::kSum},
            mask,
            ones.data(),
            ones.data(),
            nullptr,
            ones.data(),
            false,
            Rounding::kNearest});
  int64_t rank = 0;
  expect_outs(d, false, Rounding::kNearest, [&](auto zero, int64_t p, int64_t i) {
    using A = decltype(zero);
    A sum = 0;
    for (int m = 0; m < 2; ++m) {
      const uint32_t key = magnitude(d.delta<float>(p, m, i)),
                     bound = static_cast<uint32_t>(bits[m]);
      const bool kept = in_cut(key, bound, m == 1 ? rank : 0, ties[m]);
      if (m == 1) rank += key == bound;
      sum = sum + term(kept, A{1}, d.delta<A>(p, m, i));
    }
    return static_cast<A>(d.at(d.base[p], i)) + sum;
  });
  EXPECT(rank > 2 * ties[1]);
  EXPECT(left[0] == 0 && left[1] == std::max<int64_t>(40 - rank, 0));
}

void rows_match(int64_t width, bool draw, bool by_value, bool rescale) {
  Data d({.models = 2, .parts = {{5 * width, 3 * width, width}, {2 * width, 0, width}}});
  const std::vector<double> ones(4, 1.0);
  const std::vector<RowChoice> choices = {{1, width / 2, 0.3f, 0.5f, draw},
                                          {0, width, 0.6f, 0.1f, draw}};
  Mask mask{};
  mask.rows = choices.data();
  mask.by_value = by_value;
  mask.rescale = rescale;
  run(Merge{d.table(),
            {Election::kNone, true, 1, Combine::kSum},
            mask,
            ones.data(),
            ones.data(),
            nullptr,
            ones.data(),
            false,
            Rounding::kNearest});
  std::map<std::array<int64_t, 3>, std::vector<float>> shares;  // of a row: 0 where it is not kept
  const auto share_of = [&](int64_t p, int m, int64_t i) {
    const int64_t row = i / width;
    std::vector<float>& share = shares[{p, m, row}];
    if (!share.empty()) return share[i % width];
    std::vector<uint32_t> keys(width), order(width);
    for (int64_t j = 0; j < width; ++j) {
      keys[j] = magnitude(d.delta<float>(p, m, row * width + j));
      order[j] = static_cast<uint32_t>(j);
    }
    const auto size = [&](int64_t j) { return keys[j] == kNoKey ? 0.0f : from_bits(keys[j]); };
    std::stable_sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) {
      const bool na = keys[a] == kNoKey, nb = keys[b] == kNoKey;
      return na || nb ? nb && !na : keys[a] > keys[b];
    });
    float low = INFINITY, high = 0;
    for (int64_t j = 0; j < width; ++j) {
      if (keys[j] != kNoKey) low = std::min(low, size(j));
      high = std::max(high, size(j));
    }
    const RowChoice& c = choices[m];
    share.resize(width);
    for (int64_t place = 0; place < width; ++place) {
      const int64_t j = order[place];
      const float chance = !draw      ? 1.0f
                           : by_value ? value_probability(c.low, c.spread, size(j), low, high)
                                      : rank_probability(c.low, c.spread, width - 1 - place, width);
      bool kept = place >= c.drop && place < c.drop + c.keep;
      if (draw) kept &= uniform(d.word(p, d.model[2 * p + m], kDrop, row * width + j)) < chance;
      share[j] = kept ? chance : 0.0f;
    }
    return share[i % width];
  };
  expect_outs(d, false, Rounding::kNearest, [&](auto zero, int64_t p, int64_t i) {
    using A = decltype(zero);
    A x[2];
    bool nan = false;
    for (int m = 0; m < 2; ++m) {
      const A delta = d.delta<A>(p, m, i);
      const float share = share_of(p, m, i);
      nan |= delta != delta;
      x[m] = term(share != 0, A{1}, delta);
      if (rescale && share != 0) x[m] = x[m] / static_cast<A>(share);
    }
    return nan ? static_cast<A>(NAN) : static_cast<A>(d.at(d.base[p], i)) + sum_terms<2>(x, 2);
  });
}

CASE(row_masks) {
  rows_match(97, true, false, true);
  rows_match(300, true, true, false);
  rows_match(1, true, false, true);
  rows_match(64, false, false, false);
}
CASE(row_masks_of_long_rows) { rows_match(10'300, true, false, false); }

void survey_matches(bool variance, bool windowed) {
  Data d({.models = 3, .parts = {{70'000, 0}, {0}, {900, 100}}});
  const std::vector<int64_t> group = {1, 0, 0};
  const int streams = variance ? 1 : 3;
  std::vector<int64_t> coarse(2 * streams * kCoarse), odd(coarse.size()), zeros(2 * streams);
  Survey call{};
  call.table = d.table();
  call.group = group.data();
  call.variance = variance;
  call.coarse = coarse.data();
  call.odd = odd.data();
  call.zeros = zeros.data();
  const auto key_of = [&](int64_t p, int s, int64_t i) {
    if (!variance) return magnitude(d.delta<float>(p, s, i));
    float x[3] = {d.delta<float>(p, 0, i), d.delta<float>(p, 1, i), d.delta<float>(p, 2, i)};
    return magnitude(gemma_ext::souping::variance<3>(x, 3));
  };
  const int64_t bin = key_of(2, 0, 5) >> 16;
  const Window w = windowed ? Window{bin - 20, bin + 9} : kWidest;
  std::vector<int64_t> window;
  for (int i = 0; i < 2 * streams; ++i) window.insert(window.end(), {w.below, w.above});
  call.window = windowed ? window.data() : nullptr;
  run(call);
  const std::vector<int64_t> prefix(2 * streams * 2, bin);
  std::vector<int64_t> fine(2 * streams * 2 * kFine), want_fine(fine.size());
  std::vector<int64_t> want(coarse.size()), want_odd(coarse.size()), want_zeros(zeros.size());
  for (int64_t p = 0; p < d.parts(); ++p) {
    for (int s = 0; s < streams; ++s) {
      const int64_t to = group[p] * streams + s;
      for (int64_t i = 0; i < d.part[p].numel; ++i) {
        const uint32_t key = key_of(p, s, i);
        if (key == kNoKey) continue;
        const int64_t in = key >> 16;
        ++want[to * kCoarse + std::clamp(in, std::max<int64_t>(w.below, 0), w.above)];
        want_odd[to * kCoarse + in] += (key & 0xffff) && in > w.below && in < w.above;
        want_zeros[to] += key == 0;
        for (int c = 0; c < 2; ++c)
          if (key >> 16 == bin) ++want_fine[(to * 2 + c) * kFine + (key & 0xffff)];
      }
    }
  }
  EXPECT(coarse == want && odd == want_odd && zeros == want_zeros);
  call.cuts = 2;
  call.prefix = prefix.data();
  call.fine = fine.data();
  run(call);
  EXPECT(fine == want_fine);
}

CASE(survey_deltas) { survey_matches(false, false); }
CASE(survey_variance) { survey_matches(true, false); }
CASE(survey_window) { survey_matches(false, true); }

}  // namespace soup_test
