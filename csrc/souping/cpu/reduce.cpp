// SPDX-License-Identifier: Apache-2.0
// Calls whose runs add up: histograms, which any order gives, and sums in float64, which one order gives.
#include <string.h>

#include "work.h"

namespace gemma_ext::souping::cpu {
namespace {

// Clearing and adding up the histograms of a run takes a fiftieth of it.
constexpr int64_t kSurveyRun = 1 << 20;

void add(int64_t* total, const uint32_t* counts, int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    if (counts[i])
      std::atomic_ref<int64_t>(total[i]).fetch_add(counts[i], std::memory_order_relaxed);
}

}  // namespace

void run(const Survey& call, Workers& workers) {
  const Work work(call.table, kSurveyRun);
  const int64_t streams = call.variance ? 1 : call.table.models;
  workers.run(work.size(), [&](int64_t i, Scratch& s) {
    const int64_t group = call.group[work[i].part];
    if (call.fine) {
      const int64_t bins = streams * call.cuts * kFine;
      uint32_t* counts = static_cast<uint32_t*>(s.part(kKept, bins * sizeof(uint32_t)));
      memset(counts, 0, bins * sizeof(uint32_t));
      kernels().fine(call, work[i], counts, s);
      add(call.fine + group * bins, counts, bins);
      return;
    }
    uint32_t* counts =
        static_cast<uint32_t*>(s.part(kKept, streams * 2 * kCoarse * sizeof(uint32_t)));
    int64_t zeros[kMaxModels] = {};
    kernels().coarse(call, work[i], counts, zeros, s);
    for (int64_t m = 0; m < streams; ++m) {
      const Window w = window_of(call, work[i].part, int(m));
      const int64_t first = std::max(w.below, int64_t{0}), bins = w.above + 1 - first;
      const int64_t at = (group * streams + m) * kCoarse + first;
      add(call.coarse + at, counts + 2 * m * kCoarse + first, bins);
      if (call.odd) add(call.odd + at, counts + (2 * m + 1) * kCoarse + first, bins);
    }
    for (int64_t m = 0; m < streams; ++m)
      std::atomic_ref<int64_t>(call.zeros[group * streams + m]).fetch_add(zeros[m]);
  });
}

namespace {

// The state [Q, kState] of a group: strands, open span, total.
struct State {
  double* at;
  int64_t quantities;

  double* strands(int64_t q) const { return at + q * kState; }
  double& span(int64_t q) const { return at[q * kState + kStrands]; }
  double& total(int64_t q) const { return at[q * kState + kStrands + 1]; }

  void close_block() const {
    for (int64_t q = 0; q < quantities; ++q) {
      double* s = strands(q);
      for (int64_t half = kStrands / 2; half > 0; half /= 2)
        for (int64_t i = 0; i < half; ++i) s[i] = s[i] + s[i + half];
      span(q) = span(q) + s[0];
      memset(s, 0, kStrands * sizeof(double));
    }
  }
  void close_span() const {
    for (int64_t q = 0; q < quantities; ++q) {
      total(q) = total(q) + span(q);
      span(q) = 0;
    }
  }
  // Before a part that begins at `offset`.
  void open(int64_t offset) const {
    if (offset % kBlock == 0) close_block();
    if (offset % kSpan == 0) close_span();
  }
};

}  // namespace

void run(const Sums& call, Workers& workers) {
  const Table& t = call.table;
  const Work work(t, kSpan, Work::Cuts::kPositions);
  Masks masks(t, call.mask, work);
  const int64_t quantities = sums_of(call.sum, t.models), tops = 2 * t.models;
  const int64_t strands = quantities * kStrands, each = strands + quantities + tops;
  const auto state_of = [&](int64_t part) {
    return State{call.state + call.group[part] * quantities * kState, quantities};
  };
  // Parts that begin a span need nothing of those before and go together.
  for (int64_t p = 0; p < t.parts;) {
    int64_t next = p + 1;
    while (next < t.parts && t.part[next].offset % kSpan == 0) ++next;
    const int64_t first = work.first(p), tasks = work.first(next) - first;
    std::vector<double> found(tasks * each);
    const State opening = state_of(p);
    const bool goes_on = work.first(p + 1) > first;  // its first part is not empty
    if (goes_on) {
      opening.open(t.part[p].offset);
      for (int64_t q = 0; q < quantities; ++q) {
        memcpy(&found[q * kStrands], opening.strands(q), kStrands * sizeof(double));
        memset(opening.strands(q), 0, kStrands * sizeof(double));
        found[strands + q] = opening.span(q);
        opening.span(q) = 0;
      }
    }
    workers.run(tasks, [&](int64_t i, Scratch& s) {
      double* mine = &found[i * each];
      const Kept kept = masks.fill(first + i, s);
      kernels().sums(t, call.sum, work[first + i], kept,
                     {mine, mine + strands, mine + strands + quantities}, s);
    });
    for (int64_t i = 0; i < tasks; ++i) {
      const Run& run = work[first + i];
      const double* mine = &found[i * each];
      const State state = state_of(run.part);
      const int64_t begin = t.part[run.part].offset + run.begin;
      if (i > 0 || !goes_on) state.open(begin);
      for (int64_t q = 0; q < quantities; ++q) {
        memcpy(state.strands(q), mine + q * kStrands, kStrands * sizeof(double));
        state.span(q) = mine[strands + q];
      }
      if (call.sum != Sum::kNorms) continue;
      double* top = call.top + call.group[run.part] * tops;
      for (int64_t k = 0; k < tops; ++k) top[k] = std::max(top[k], mine[strands + quantities + k]);
    }
    p = next;
  }
  masks.count_down();
}

}  // namespace gemma_ext::souping::cpu
