// SPDX-License-Identifier: Apache-2.0
#include "gradients.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>

namespace gemma_ext::cce::cpu {
namespace {

// Gradient strips of a batch of tiles: they are written by the first product and read once per 128
// columns by the second, so they should stay in L3.
constexpr int64_t kBatchBytes = int64_t{2} << 20;

// [tiles, n] weight of each strip, 0 where it is not computed.
std::vector<float> weigh(const Draw& d, const Problem& p, Workers& workers) {
  double total = 0;
  int64_t rows = 0;
  for (int64_t r = 0; r < p.n; ++r) {
    total += d.scale[r];
    rows += d.scale[r] != 0;
  }
  const float mean_scale = rows ? float(total / double(rows)) : 0;
  std::vector<float> weight(p.tiles * p.n);
  workers.run(spans(p.n), [&](int64_t span, Scratch&) {
    const int64_t row0 = span * kRowSpan, rows = std::min(kRowSpan, p.n - row0);
    float threshold[kRowSpan];
    uint32_t phase[kRowSpan];
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t r = row0 + i;
      threshold[i] = d.tau * std::min(d.scale[r], mean_scale);
      phase[i] = first_phase(uint32_t(p.rows[r]), bits_of(d.lse[r]), d.seed);
    }
    for (int64_t t = 0; t < p.tiles; ++t)
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t r = row0 + i, at = t * d.stride + r;
        if (d.scale[r] == 0) continue;
        float& w = weight[t * p.n + r];
        if (d.tau == 0 || (p.label[r] >= 0 && p.label[r] / kTile == t)) {
          w = 1;
          continue;
        }
        float x = std::fabs(d.a[r]) * d.masses[at];
        if (d.q) x += std::fabs(d.q[r]) * d.masses[p.tiles * d.stride + at];
        const float u = x / threshold[i];
        const uint32_t step = phase_step(u);
        phase[i] += step;
        if (is_certain(u) || is_drawn(phase[i], step)) w = draw_weight(step);
      }
  });
  return weight;
}

}  // namespace

Plan draw(const Draw& d, const Problem& p, Workers& workers) {
  const std::vector<float> weight = weigh(d, p, workers);
  Plan plan;
  plan.begin.resize(p.tiles + 1);
  std::vector<int64_t> count(p.tiles);
  workers.run(p.tiles, [&](int64_t t, Scratch&) {
    for (int64_t r = 0; r < p.n; ++r) count[t] += weight[t * p.n + r] > 0;
  });
  for (int64_t t = 0; t < p.tiles; ++t) plan.begin[t + 1] = plan.begin[t] + count[t];
  plan.list.resize(plan.begin[p.tiles]);
  plan.weight.resize(plan.begin[p.tiles]);
  workers.run(p.tiles, [&](int64_t t, Scratch&) {
    int64_t at = plan.begin[t];
    for (int64_t r = 0; r < p.n; ++r) {
      const float w = weight[t * p.n + r];
      if (!(w > 0)) continue;
      plan.list[at] = int32_t(r);
      plan.weight[at++] = w;
    }
  });
  return plan;
}

void store_columns(const Problem& p, const float* de, int64_t column, const Gradients& out) {
  const int64_t size = size_of(p.e.dtype), width = std::min<int64_t>(kColumns, p.D - column);
  for (int64_t r = 0; r < p.n; ++r)
    store_row(static_cast<char*>(out.de) + (p.rows[r] * p.D + column) * size, p.e.dtype,
              de + r * kColumns, width);
}

void add_gradients(const Problem& p, const Plan& plan, GradTask task, const Gradients& out,
                   const GradTile& grad_tile, Workers& workers) {
  const int64_t columns = padded(p.D), blocks = columns / kColumns;
  task.problem = &p;
  task.list = plan.list.data();
  task.weight = plan.weight.data();
  task.begin = plan.begin.data();
  task.dc = out.dc;
  task.dbias = out.dbias;

  // Few strips wait for the last tile, and dE is summed a column block at a time; otherwise all of
  // dE is summed in fp32, a batch of tiles at a time.
  const int64_t strip_bytes = kTile * size_of(strip_type(p.c.dtype));
  const int64_t all_bytes = plan.begin[p.tiles] * strip_bytes;
  const bool at_once = all_bytes <= p.n * columns * int64_t{sizeof(float)};
  const int64_t batch_bytes = at_once ? all_bytes : kBatchBytes;
  std::vector<float> de(out.de && !at_once ? p.n * columns : 0);
  size_t capacity = 0;
  std::unique_ptr<char[]> strips;
  for (int64_t tile0 = 0, tile1; tile0 < p.tiles; tile0 = tile1) {
    for (tile1 = tile0 + 1; tile1 < p.tiles; ++tile1)
      if ((plan.begin[tile1 + 1] - plan.begin[tile0]) * strip_bytes > batch_bytes &&
          tile1 - tile0 >= 2 * workers.threads())
        break;
    task.slot0 = plan.begin[tile0];
    const size_t bytes = (plan.begin[tile1] - plan.begin[tile0]) * strip_bytes;
    if (capacity < bytes) {
      strips = std::make_unique_for_overwrite<char[]>(bytes);
      capacity = bytes;
    }
    task.strips = strips.get();
    workers.run(tile1 - tile0, [&](int64_t t, Scratch& s) { grad_tile(task, tile0 + t, s); });
    if (out.de && !at_once)
      workers.run(blocks, [&](int64_t block, Scratch& s) {
        kernels().grad_columns(task, tile0, tile1, block * kColumns, &de[block * kColumns * p.n],
                               s);
      });
  }
  if (out.de)
    workers.run(blocks, [&](int64_t block, Scratch& s) {
      const int64_t column = block * kColumns;
      if (!at_once) return store_columns(p, &de[column * p.n], column, out);
      std::vector<float> sums(p.n * kColumns);
      kernels().grad_columns(task, 0, p.tiles, column, sums.data(), s);
      store_columns(p, sums.data(), column, out);
    });
}

Gradients wanted(const ValidRows& valid, const Gradients& out) {
  const Problem& p = valid.problem;
  const int64_t size = size_of(p.e.dtype);
  if (out.de && p.n < p.e.rows) memset(out.de, 0, p.e.rows * p.D * size);
  if (p.n > 0) return out;
  if (out.dc) memset(out.dc, 0, p.V * p.D * size);
  if (out.dbias) memset(out.dbias, 0, p.V * sizeof(float));
  return {};
}

}  // namespace gemma_ext::cce::cpu
