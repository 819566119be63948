// SPDX-License-Identifier: Apache-2.0
// Backward on the CPU. Survival is decided from the forward's strip statistics before anything is
// recomputed; what is dropped returns its probability mass through tile means:
//   dE_n += sum_j W_nj mean_j(C),  dC_v += q_jv sum_n W_nj E_n,  W_nj = mass of G in strip (n, j)
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
  std::vector<float> lse, nll, a, b;
  std::vector<float> mean, q, class_coef;  // empty where there is none
  int64_t n() const { return int64_t(lse.size()); }

  Coefficients(const ValidRows& valid, const Upstream& up)
      : lse(valid.gather(up.lse)),
        nll(valid.gather(up.nll)),
        a(valid.gather(up.d_lse)),
        b(valid.gather(up.d_nll)) {
    for (int64_t r = 0; r < n(); ++r) a[r] += b[r];
    if (up.d_mean) {
      mean = valid.gather(up.mean);
      q = valid.gather(up.d_mean);
      for (int64_t r = 0; r < n(); ++r) a[r] += q[r];
    }
    if (up.d_class) class_coef = valid.gather(up.d_class);
    for (int64_t r = 0; r < n(); ++r)
      if (valid.position[r] < 0) b[r] = 0;
  }

  RowCoefficients pointers() const {
    const auto or_null = [](const std::vector<float>& x) { return x.empty() ? nullptr : x.data(); };
    return {lse.data(), or_null(mean), a.data(), b.data(), or_null(q), or_null(class_coef)};
  }
};

struct Plan {
  std::vector<int64_t> begin;
  std::vector<int32_t> list;
  std::vector<float> mass;  // [tiles, n], W; empty if nothing is compensated
  std::vector<float> bias_push;
};

// The size of a row's coefficients and the reference its probabilities are weighed against: rows
// far above the average upstream gradient are filtered at a finer threshold.
struct RowScale {
  std::vector<float> scale, reference;
};

RowScale row_scales(const Problem& p, const Coefficients& up) {
  RowScale out{std::vector<float>(p.n), std::vector<float>(p.n)};
  double total = 0;
  for (int64_t r = 0; r < p.n; ++r) {
    float x = std::max(std::fabs(up.a[r]), std::fabs(up.b[r]));
    if (!up.q.empty()) x = std::max(x, std::fabs(up.q[r]));
    if (!up.class_coef.empty()) x = std::max(x, std::fabs(up.class_coef[r]));
    if (std::isnan(up.a[r]) || std::isnan(up.b[r])) x = INFINITY;
    out.scale[r] = x;
    total += x;
  }
  const float mean = p.n ? float(total / double(p.n)) : 0;
  for (int64_t r = 0; r < p.n; ++r) out.reference[r] = std::min(out.scale[r], mean);
  return out;
}

Plan plan_strips(const Problem& p, const StripStats& stats, const Coefficients& up, double eps,
                 Workers& workers) {
  const RowScale rows = row_scales(p, up);
  const bool exact = eps == 0;
  Plan plan;
  std::vector<uint8_t> keep(p.tiles * p.n);
  if (!exact) plan.mass.resize(p.tiles * p.n);
  workers.run(spans(p.n), [&](int64_t span, Scratch&) {
    const int64_t row0 = span * kRowSpan, row1 = std::min(p.n, row0 + kRowSpan);
    for (int64_t t = 0; t < p.tiles; ++t)
      for (int64_t r = row0; r < row1; ++r) {
        const int64_t at = t * p.n + r;
        if (rows.scale[r] == 0) continue;
        if (exact) {
          keep[at] = 1;
          continue;
        }
        const float lse = up.lse[r], peak = std::exp(stats.max[at] - lse);
        const float threshold = float(eps) * rows.reference[r];
        float bound = std::fabs(up.a[r]);
        if (!up.q.empty())
          bound += std::fabs(up.q[r]) * std::max(std::fabs(stats.max[at] - up.mean[r]), 1.0f);
        bool kept = !(peak * bound < threshold);
        if (!kept && p.position[r] >= 0 && p.position[r] / kTile == t) {
          const float prob = std::exp(-up.nll[r]);
          kept = !(std::fabs(up.a[r] * prob - up.b[r]) < threshold);
        }
        keep[at] = kept;
        if (kept) continue;
        float coef = up.a[r];
        if (!up.q.empty() && stats.sum[at] > 0)
          coef += up.q[r] * (stats.weighted[at] / stats.sum[at] - up.mean[r]);
        plan.mass[at] = peak * stats.slope[at] * coef * p.map.scale;
      }
  });

  plan.begin.resize(p.tiles + 1);
  plan.bias_push.resize(p.tiles);
  std::vector<int64_t> count(p.tiles);
  workers.run(p.tiles, [&](int64_t t, Scratch&) {
    double pushed = 0;
    for (int64_t r = 0; r < p.n; ++r) {
      count[t] += keep[t * p.n + r];
      if (!exact) pushed += plan.mass[t * p.n + r];
    }
    plan.bias_push[t] = float(pushed / p.map.scale);
  });
  for (int64_t t = 0; t < p.tiles; ++t) plan.begin[t + 1] = plan.begin[t] + count[t];
  plan.list.resize(plan.begin[p.tiles]);
  workers.run(p.tiles, [&](int64_t t, Scratch&) {
    int32_t* to = plan.list.data() + plan.begin[t];
    for (int64_t r = 0; r < p.n; ++r)
      if (keep[t * p.n + r]) *to++ = int32_t(r);
  });
  return plan;
}

// Weight of each position inside its tile; uniform without a profile.
std::vector<float> tile_profile(const Problem& p, const float* prob) {
  std::vector<float> out(p.tiles * kTile);
  for (int64_t t = 0; t < p.tiles; ++t) {
    const int64_t first = t * kTile, last = std::min(p.V, first + kTile);
    const auto weight = [&](int64_t i) { return prob[p.order ? p.order[i] : i]; };
    double total = 0;
    if (prob)
      for (int64_t i = first; i < last; ++i) total += weight(i);
    for (int64_t i = first; i < last; ++i)
      out[i] = total > 0 ? float(weight(i) / total) : 1.0f / float(last - first);
  }
  return out;
}

// de [n, kColumns] -> kColumns columns of the result.
void store_columns(const Problem& p, const float* de, int64_t column, const Gradients& out) {
  const int64_t size = size_of(p.e.dtype), width = std::min<int64_t>(kColumns, p.D - column);
  for (int64_t r = 0; r < p.n; ++r)
    store_row(static_cast<char*>(out.de) + (p.rows[r] * p.D + column) * size, p.e.dtype,
              de + r * kColumns, width);
}

void backward(const Problem& p, const StripStats& stats, const Coefficients& up, const float* prob,
              double eps, const Gradients& out, Workers& workers) {
  const Plan plan = plan_strips(p, stats, up, eps, workers);
  const int64_t columns = padded(p.D), blocks = columns / kColumns;
  const bool compensated = !plan.mass.empty();
  const std::vector<float> profile = compensated ? tile_profile(p, prob) : std::vector<float>();
  // of the kTile tiles at hand: what they push into dC, then their means
  std::vector<float> group(compensated ? std::min<int64_t>(p.tiles, kTile) * columns : 0);

  GradTask task{};
  task.problem = &p;
  task.coef = up.pointers();
  task.list = plan.list.data();
  task.begin = plan.begin.data();
  task.profile = compensated ? profile.data() : nullptr;
  task.push = compensated && out.dc ? group.data() : nullptr;
  task.bias_push = plan.bias_push.data();
  task.dc = out.dc;
  task.dbias = out.dbias;

  // Few strips wait for the last tile, and dE is summed a column block at a time; otherwise all of
  // dE is summed in fp32, a batch of tiles at a time.
  const int64_t strip_bytes = kTile * size_of(strip_type(p.c.dtype));
  const int64_t all_bytes = plan.begin[p.tiles] * strip_bytes;
  const bool at_once = p.tiles <= kTile && all_bytes <= p.n * columns * int64_t{sizeof(float)};
  const int64_t batch_bytes = at_once ? all_bytes : kBatchBytes;
  std::vector<float> de(out.de && !at_once ? p.n * columns : 0);
  size_t capacity = 0;
  std::unique_ptr<char[]> strips;
  for (int64_t group0 = 0; group0 < p.tiles; group0 += kTile) {
    const int64_t group1 = std::min(p.tiles, group0 + kTile);
    if (compensated && out.dc)
      workers.run(blocks, [&](int64_t b, Scratch& s) {
        kernels().push_columns(p, plan.mass.data(), group.data(), group0, b * kColumns, s);
      });
    for (int64_t tile0 = group0, tile1; tile0 < group1; tile0 = tile1) {
      for (tile1 = tile0 + 1; tile1 < group1; ++tile1)
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
        workers.run(blocks, [&](int64_t b, Scratch& s) {
          kernels().grad_columns(task, tile0, tile1, b * kColumns, &de[b * kColumns * p.n], s);
        });
    }
    if (compensated && out.de) {
      workers.run(group1 - group0, [&](int64_t t, Scratch& s) {
        kernels().tile_mean(p, profile.data(), group.data(), group0 + t, s);
      });
      if (!at_once)
        workers.run(blocks, [&](int64_t b, Scratch& s) {
          kernels().pull_columns(p, plan.mass.data(), group.data(), &de[b * kColumns * p.n], group0,
                                 b * kColumns, s);
        });
    }
  }
  if (out.de)
    workers.run(blocks, [&](int64_t b, Scratch& s) {
      const int64_t column = b * kColumns;
      if (!at_once) return store_columns(p, &de[column * p.n], column, out);
      std::vector<float> sums(p.n * kColumns);
      if (compensated)
        kernels().pull_columns(p, plan.mass.data(), group.data(), sums.data(), 0, column, s);
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
  std::vector<float> planes(2 * tiles * std::min(n, step)), a(step), target(step);
  std::vector<int64_t> begin(tiles + 1);
  double loss = 0;
  for (int64_t row = 0; row < n; row += step) {
    Problem p = whole;
    p.n = std::min(step, n - row);
    p.rows += row;
    p.position += row;
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
      loss += double(b[r]) * chunk.nll[r] + double(lse2_coef[row + r]) * lse[r] * lse[r];
    }

    GradTask task{};
    task.problem = &p;
    task.coef = {lse, nullptr, a.data(), b, nullptr, nullptr};
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
  p.want_mean = b.up.mean;
  const Gradients out = wanted(valid, b.out);
  if (p.n == 0) return {};
  const StripStats stats = stat_planes(const_cast<float*>(b.stats), p);
  backward(p, stats, Coefficients(valid, b.up), b.prob, b.summary ? b.summary[3] : 0, out, workers);
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

}  // namespace gemma_ext::cce::cpu
