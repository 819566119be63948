// SPDX-License-Identifier: Apache-2.0
// The head: tiles of tokens dealt to threads, then every row from its tiles, in their order.
#include <algorithm>
#include <cmath>
#include <limits>

#include "deal.h"
#include "head_engine.h"
#include "head_rows.h"
#include "kernels.h"

namespace gemma_ext::depth_batching {

void keep_best(BestList& list) noexcept {
  if (list.count > list.wanted) {
    std::nth_element(list.at, list.at + list.wanted - 1, list.at + list.count, cpu::comes_before);
    list.count = list.wanted;
  }
  if (list.count < list.wanted) return;
  list.full = true;
  list.limit = list.at[0].value;
  for (int64_t i = 1; i < list.count; ++i) list.limit = std::min(list.limit, list.at[i].value);
}

namespace cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

void exit_row(const HeadExit& call, int64_t row, double lse) {
  if (call.mode == kNever) return;
  const float limit = call.threshold[row];
  const float* top = call.top + 2 * row;
  if (call.mode == kEntropy) {
    call.exits[row] = leaves_below(call.entropy[row], limit, call.strict);
    return;
  }
  double p = std::exp(top[0] - lse);
  if (call.mode == kMargin) p -= std::exp(top[1] - lse);
  call.exits[row] = leaves_above(float(p), limit, call.strict);
}

void finish_row(const HeadExit& call, const TileSums& sums, const std::vector<Best>& best,
                int64_t tasks, int64_t row) {
  const int64_t n = call.head.n, tiles = tiles_of(call.head.V);
  const float heat = heat_of(call, row);
  Best all = best[row];
  for (int64_t task = 1; task < tasks; ++task) {
    const Best& other = best[task * n + row];
    if (other.value > all.value) {
      all.second = std::max(all.value, other.second);
      all.value = other.value;
      all.id = other.id;
    } else {
      all.second = std::max(all.second, other.value);
    }
    if (other.score > all.score) {
      all.score = other.score;
      all.sample = other.sample;
    }
  }
  call.ids[row] = std::max(all.id, 0);
  call.top[2 * row] = all.value;
  call.top[2 * row + 1] = all.second;
  double total = 0, below = 0, tempered = 0;
  const double base = all.value == -kInfinity ? 0 : all.value;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t at = tile * n + row;
    const double gap = base - sums.max[at], factor = std::exp(-gap);
    if (sums.sum[at] == 0) continue;
    total += factor * sums.sum[at];
    below += factor * (sums.below[at] + gap * sums.sum[at]);
    if (heat > 0) tempered += std::exp(-gap / heat) * sums.tempered[at];
  }
  const double lse = base + std::log(total);
  call.lse[row] = float(lse);
  call.entropy[row] = float(std::log(total) + below / total);
  exit_row(call, row, lse);
  if (!call.temperature) return;
  call.samples[row] = heat > 0 ? std::max(all.sample, 0) : call.ids[row];
  call.tempered[row] = heat > 0 ? float(base / heat + std::log(tempered)) : call.lse[row];
}

void write_candidates(const HeadExit& call, Lists& lists, int64_t row) {
  const std::vector<Candidate> best = lists.best(row);
  for (int64_t c = 0; c < call.candidates; ++c) {
    call.values[row * call.candidates + c] = best[c].value;
    call.indices[row * call.candidates + c] = best[c].id;
  }
}

}  // namespace

Wrong find_wrong(const HeadExit&) { return {}; }
Wrong find_wrong(const Gate&) { return {}; }
Wrong find_wrong(const Noise& call) {
  for (int64_t i = 0; i < call.n * call.C; ++i)
    if (call.ids[i] < 0) return {"ids", i, call.ids[i], 0, INT32_MAX};
  return {};
}

void run(const HeadExit& call, Workers& workers) {
  const int64_t n = call.head.n, tiles = tiles_of(call.head.V);
  if (n == 0) return;
  const HeadKernels& k = kernels().head;
  const PackedRows x = pack_rows(call.head, workers);
  const int64_t tasks = tasks_of(tiles, workers);
  Sums sums(tiles * n, call.temperature ? 4 : 3);
  std::vector<Best> best(tasks * n, {-kInfinity, -kInfinity, -kInfinity, -1, -1});
  Lists lists(tasks, n, call.candidates);
  workers.run(tasks, [&](int64_t task, Scratch& s) {
    const HeadTask given{&call, x.rows(), sums.planes, best.data() + task * n, lists.of(task)};
    for (int64_t tile = tiles * task / tasks; tile < tiles * (task + 1) / tasks; ++tile)
      k.tile(given, tile, s);
  });
  workers.run(n, [&](int64_t row, Scratch&) {
    finish_row(call, sums.planes, best, tasks, row);
    if (call.candidates) write_candidates(call, lists, row);
  });
}

void run(const Noise& call, Workers& workers) {
  deal(workers, 64 * call.n * call.C, call.n,
       [&](int64_t row, Scratch&) { kernels().head.noise(call, row); });
}

void run(const Gate& call, Workers& workers) {
  deal(workers, call.n * call.D, call.n,
       [&](int64_t row, Scratch&) { kernels().head.gate(call, row); });
}

}  // namespace cpu
}  // namespace gemma_ext::depth_batching
