// SPDX-License-Identifier: Apache-2.0
// Backward on the CPU. What is computed is drawn from the forward's masses before anything is recomputed
// (sampling.h).
#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>

#include "gradients.h"

namespace gemma_ext::cce::cpu {
namespace {

// Rows of one step of the fused form when dC can take partial sums: their strips take half of what
// dC takes in fp32, and every step reads and writes that dC once.
int64_t fused_rows(int64_t d) { return std::max<int64_t>(512, d / 2 / kRowSpan * kRowSpan); }

// [n] each, compact: the row's results and the coefficients of its gradient (kernels.h).
struct Coefficients {
  std::vector<float> lse, lse_low, a, at_label, scale;
  std::vector<float> mean, q, class_coef;  // empty where there is none

  Coefficients(const ValidRows& valid, const Upstream& up)
      : lse(valid.gather(up.lse)),
        lse_low(valid.gather(up.lse_low)),
        a(valid.gather(up.d_lse)),
        at_label(a.size()),
        scale(a.size()) {
    const std::vector<float> nll = valid.gather(up.nll), d_nll = valid.gather(up.d_nll);
    if (up.d_mean) {
      mean = valid.gather(up.mean);
      q = valid.gather(up.d_mean);
    }
    if (up.d_class) class_coef = valid.gather(up.d_class);
    if (up.scale) scale = valid.gather(up.scale);
    for (size_t r = 0; r < a.size(); ++r) {
      const float b = valid.label[r] < 0 ? 0 : d_nll[r];
      a[r] += d_nll[r];
      if (up.d_mean) a[r] += q[r];
      // of p near 1, p - 1 would lose what nll still knows
      at_label[r] = a[r] * std::expm1(-nll[r]) + (a[r] - b);
      if (!up.scale) {
        scale[r] = std::max(std::fabs(a[r]), std::fabs(b));
        if (up.d_mean) scale[r] = std::max(scale[r], std::fabs(q[r]));
        if (up.d_class) scale[r] = std::max(scale[r], std::fabs(class_coef[r]));
      }
      if (std::isnan(a[r]) || std::isnan(d_nll[r])) scale[r] = INFINITY;
    }
  }

  RowCoefficients pointers() const {
    const auto or_null = [](const std::vector<float>& x) { return x.empty() ? nullptr : x.data(); };
    return {lse.data(),      lse_low.data(), or_null(mean),      a.data(),
            at_label.data(), or_null(q),     or_null(class_coef)};
  }
};

double fused(const Problem& whole, const std::vector<float>& nll_coef,
             const std::vector<float>& lse2_coef, RowResults& rows, const Gradients& out,
             Workers& workers) {
  const int64_t n = whole.n, strip_bytes = kTile * size_of(strip_type(whole.c.dtype));
  const bool narrow = whole.c.dtype != DType::kFloat32;
  // 16-bit dC wants all rows at once; more rows than that and partial sums in fp32 cost less
  const bool at_once =
      n <= fused_rows(whole.D) ||
      (narrow && (!out.dc || n * whole.tiles * strip_bytes <= whole.V * whole.D * 4));
  const int64_t step = at_once ? std::max<int64_t>(n, 1) : fused_rows(whole.D);
  std::unique_ptr<float[]> dc_sum;
  if (out.dc && narrow && !at_once)
    dc_sum = std::make_unique_for_overwrite<float[]>(whole.V * whole.D);

  const int64_t tiles = whole.tiles;
  const auto strips =
      std::make_unique_for_overwrite<char[]>(std::min(n, step) * tiles * strip_bytes);
  std::vector<float> planes(2 * tiles * std::min(n, step)), a(step), at_label(step), target(step);
  std::vector<int64_t> begin(tiles + 1);
  double loss = 0;
  for (int64_t row = 0; row < n; row += step) {
    Problem p = whole;
    p.n = std::min(step, n - row);
    p.rows += row;
    p.label += row;
    for (int64_t t = 0; t <= tiles; ++t) begin[t] = t * p.n;
    StripStats stats{};
    stats.max = planes.data();
    stats.sum = planes.data() + tiles * p.n;
    stats.target = target.data();
    workers.run(tile_groups(p), [&](int64_t t, Scratch& s) {
      const int64_t tile = t * kForwardTiles;
      kernels().fused_tiles(p, stats, strips.get(), tile, std::min(tiles, tile + kForwardTiles), s);
    });
    RowResults chunk(p.n);
    combine(p, stats, chunk, workers);
    std::copy(chunk.nll.begin(), chunk.nll.end(), rows.nll.begin() + row);
    std::copy(chunk.lse.begin(), chunk.lse.end(), rows.lse.begin() + row);
    const float *lse = chunk.lse.data(), *b = nll_coef.data() + row;
    for (int64_t r = 0; r < p.n; ++r) {
      a[r] = b[r] + 2 * lse2_coef[row + r] * lse[r];
      at_label[r] = a[r] * std::expm1(-chunk.nll[r]) + (a[r] - b[r]);
      loss += double(b[r]) * chunk.nll[r] + double(lse2_coef[row + r]) * lse[r] * lse[r];
    }

    GradTask task{};
    task.problem = &p;
    task.coef = {lse, chunk.lse_low.data(), nullptr, a.data(), at_label.data(), nullptr, nullptr};
    task.begin = begin.data();
    task.strips = strips.get();
    task.dc = out.dc;
    task.dc_sum = dc_sum               ? dc_sum.get()
                  : at_once || !out.dc ? nullptr
                                       : static_cast<float*>(out.dc);
    task.dc_accumulate = row > 0;
    task.dbias = out.dbias;
    if (out.dc || out.dbias || out.de)
      workers.run(tiles,
                  [&](int64_t t, Scratch& s) { kernels().fused_grad_tile(task, stats, t, s); });
    if (out.de)
      workers.run(padded(p.D) / kColumns, [&](int64_t block, Scratch& s) {
        std::vector<float> sums(p.n * kColumns);
        kernels().grad_columns(task, 0, tiles, block * kColumns, sums.data(), s);
        store_columns(p, sums.data(), block * kColumns, out);
      });
  }
  if (dc_sum)
    workers.run(spans(whole.V), [&](int64_t span, Scratch&) {
      for (int64_t v = span * kRowSpan; v < std::min(whole.V, (span + 1) * kRowSpan); ++v)
        store_row(static_cast<char*>(out.dc) + v * whole.D * size_of(whole.c.dtype), whole.c.dtype,
                  dc_sum.get() + v * whole.D, whole.D);
    });
  return loss;
}

}  // namespace

Status run(const Backward& b, Workers& workers) {
  ValidRows valid(b.head);
  if (!valid.status.ok()) return valid.status;
  Problem& p = valid.problem;
  p.want_mean = b.up.d_mean;
  const Gradients out = wanted(valid, b.out);
  if (p.n == 0) return {};
  const Coefficients coef(valid, b.up);
  const RowCoefficients rows = coef.pointers();
  const Plan plan =
      draw({static_cast<const float*>(b.masses), b.head.N, b.summary ? float(b.summary[2]) : 0,
            b.seed, rows.lse, coef.scale.data(), rows.a, rows.q},
           p, workers);
  GradTask task{};
  task.coef = rows;
  add_gradients(
      p, plan, task, out,
      [](const GradTask& t, int64_t tile, Scratch& s) { kernels().grad_tile(t, tile, s); },
      workers);
  return {};
}

Status run(const Fused& f, Workers& workers) {
  const ValidRows valid(f.head);
  if (!valid.status.ok()) return valid.status;
  RowResults rows(valid.problem.n);
  const Gradients out = wanted(valid, f.out);
  *f.loss = float(fused(valid.problem, valid.gather(f.nll_coef), valid.gather(f.lse2_coef), rows,
                        out, workers));
  valid.scatter(rows.nll, f.nll, 0.0f);
  valid.scatter(rows.lse, f.lse, 0.0f);
  return {};
}

Status run(const Scale& call, Workers& workers) {
  const float factor = *call.factor;
  if (factor == 1) return {};
  constexpr int64_t kElements = 4096;
  const int64_t size = size_of(call.dtype);
  workers.run(ceil_div(call.count, kElements), [&](int64_t task, Scratch&) {
    const int64_t first = task * kElements, count = std::min(kElements, call.count - first);
    char* x = static_cast<char*>(call.x) + first * size;
    float row[kElements];
    load_floats(x, call.dtype, count, row);
    for (int64_t i = 0; i < count; ++i) row[i] *= factor;
    store_row(x, call.dtype, row, count);
  });
  return {};
}

}  // namespace gemma_ext::cce::cpu
