// SPDX-License-Identifier: Apache-2.0
// The shortlist: bounds of all logits, the logits of those whose bounds are highest, bounds of lse from both.
#include <cmath>
#include <limits>

#include "../verdict.h"
#include "head_engine.h"
#include "head_rows.h"

namespace gemma_ext::depth_batching::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

void finish_row(const Shortlist& call, const Packed& x, const TileSums& sums, const Lists& lists,
                int64_t row) {
  const Head& head = call.head;
  const int64_t n = head.n, tiles = tiles_of(head.V);
  std::vector<Candidate> best = lists.best(row);
  const int64_t count = std::min<int64_t>(best.size(), call.candidates);
  const float others =
      int64_t(best.size()) > count ? kernels().head.capped(head, best[count].value) : -kInfinity;
  std::vector<float> a(count), s(count);
  kernels().head.exact(head, x, row, best.data(), count, a.data(), s.data());

  float first = -kInfinity, second = -kInfinity;
  int32_t id = -1;
  for (int64_t i = 0; i < count; ++i) {
    if (s[i] > first || (s[i] == first && best[i].id < id)) {
      second = first;
      first = s[i];
      id = best[i].id;
    } else if (s[i] > second) {
      second = s[i];
    }
  }
  call.ids[row] = std::max(id, 0);
  call.top[2 * row] = first;
  call.top[2 * row + 1] = second;
  BoundSums bounds{-kInfinity, 0, 0, 0, 0};
  for (int64_t tile = 0; tile < tiles; ++tile)
    bounds.base = std::max<double>(bounds.base, sums.max[tile * n + row]);
  if (bounds.base == -kInfinity) bounds.base = 0;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t at = tile * n + row;
    const double factor = std::exp(sums.max[at] - bounds.base);
    if (sums.sum[at] == 0) continue;
    bounds.high += factor * sums.sum[at];
    bounds.low += factor * sums.below[at];
  }
  for (int64_t i = 0; i < count; ++i) {
    bounds.of_high += std::exp(kernels().head.capped(head, best[i].value) - bounds.base);
    bounds.known += std::exp(s[i] - bounds.base);
  }
  judge(call, row, first, others, bounds);
}

}  // namespace

Wrong find_wrong(const Shortlist&) { return {}; }

void run(const Shortlist& call, Workers& workers) {
  const int64_t n = call.head.n, tiles = tiles_of(call.head.V);
  if (n == 0) return;
  const HeadKernels& k = kernels().head;
  const PackedRows x = pack_rows(call.head, workers), wide(n, call.head.D, sizeof(float));
  std::vector<float> norms(n);
  workers.run(n, [&](int64_t row, Scratch& s) {
    norms[row] = k.pack_wide(call.head, row, wide.rows(), s);
  });
  const int64_t tasks = tasks_of(tiles, workers);
  Sums sums(tiles * n, 3);
  Lists lists(tasks, n, call.candidates + 1);
  workers.run(tasks, [&](int64_t task, Scratch& s) {
    const ScreenTask given{&call, wide.rows(), norms.data(), sums.planes, lists.of(task)};
    for (int64_t tile = tiles * task / tasks; tile < tiles * (task + 1) / tasks; ++tile)
      k.screen(given, tile, s);
  });
  workers.run(n,
              [&](int64_t row, Scratch&) { finish_row(call, x.rows(), sums.planes, lists, row); });
}

}  // namespace gemma_ext::depth_batching::cpu
