// SPDX-License-Identifier: Apache-2.0
// Backward on the CPU. What is computed is drawn from the forward's masses before anything is recomputed
// (sampling.h).
#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>

#include "rows.h"

namespace gemma_ext::cce::cpu {
namespace {

// Gradient strips of a batch of tiles: they are written by the first product and read once per 128
// columns by the second, so they should stay in L3.
constexpr int64_t kBatchBytes = int64_t{2} << 20;
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

struct Plan {
  std::vector<int64_t> begin;
  std::vector<int32_t> list;
  std::vector<float> weight;
};

// [tiles, n] weight of each strip, 0 where it is not computed.
std::vector<float> draw(const Problem& p, const Backward& b, const Coefficients& coef,
                        Workers& workers) {
  const float tau = b.summary ? float(b.summary[2]) : 0;
  double total = 0;
  for (float x : coef.scale) total += x;
  const float mean_scale = p.n ? float(total / double(p.n)) : 0;
  const float* masses = static_cast<const float*>(b.masses);
  std::vector<float> weight(p.tiles * p.n);
  workers.run(spans(p.n), [&](int64_t span, Scratch&) {
    const int64_t row0 = span * kRowSpan, rows = std::min(kRowSpan, p.n - row0);
    float threshold[kRowSpan];
    uint32_t phase[kRowSpan];
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t r = row0 + i;
      threshold[i] = tau * std::min(coef.scale[r], mean_scale);
      phase[i] = first_phase(uint32_t(p.rows[r]), bits_of(coef.lse[r]), b.seed);
    }
    for (int64_t t = 0; t < p.tiles; ++t)
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t r = row0 + i, at = t * b.head.N + r;
        if (coef.scale[r] == 0) continue;
        float& w = weight[t * p.n + r];
        if (tau == 0 || (p.label[r] >= 0 && p.label[r] / kTile == t)) {
          w = 1;
          continue;
        }
        float x = std::fabs(coef.a[r]) * masses[at];
        if (p.want_mean) x += std::fabs(coef.q[r]) * masses[p.tiles * b.head.N + at];
        const float u = x / threshold[i];
        const uint32_t step = phase_step(u);
        phase[i] += step;
        if (is_certain(u) || is_drawn(phase[i], step)) w = draw_weight(step);
      }
  });
  return weight;
}

Plan plan_strips(const Problem& p, const std::vector<float>& weight, Workers& workers) {
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

// de [n, kColumns] -> kColumns columns of the result.
void store_columns(const Problem& p, const float* de, int64_t column, const Gradients& out) {
  const int64_t size = size_of(p.e.dtype), width = std::min<int64_t>(kColumns, p.D - column);
  for (int64_t r = 0; r < p.n; ++r)
    store_row(static_cast<char*>(out.de) + (p.rows[r] * p.D + column) * size, p.e.dtype,
              de + r * kColumns, width);
}

void backward(const Problem& p, const Backward& b, const Gradients& out, const Coefficients& coef,
              Workers& workers) {
  const Plan plan = plan_strips(p, draw(p, b, coef, workers), workers);
  const int64_t columns = padded(p.D), blocks = columns / kColumns;
  GradTask task{};
  task.problem = &p;
  task.coef = coef.pointers();
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
    workers.run(tile1 - tile0,
                [&](int64_t t, Scratch& s) { kernels().grad_tile(task, tile0 + t, s); });
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

// Nothing where no row is valid.
Gradients wanted(const ValidRows& valid, const Gradients& out) {
  const Problem& p = valid.problem;
  const int64_t size = size_of(p.e.dtype);
  if (out.de && p.n < p.e.rows) memset(out.de, 0, p.e.rows * p.D * size);
  if (p.n > 0) return out;
  if (out.dc) memset(out.dc, 0, p.V * p.D * size);
  if (out.dbias) memset(out.dbias, 0, p.V * sizeof(float));
  return {};
}

}  // namespace

Status run(const Backward& b, Workers& workers) {
  ValidRows valid(b.head);
  if (!valid.status.ok()) return valid.status;
  Problem& p = valid.problem;
  p.want_mean = b.up.d_mean;
  const Gradients out = wanted(valid, b.out);
  if (p.n == 0) return {};
  backward(p, b, out, Coefficients(valid, b.up), workers);
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
