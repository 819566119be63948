// SPDX-License-Identifier: Apache-2.0
// The valid rows of a head side by side: ignored ones cost nothing afterwards.
#pragma once

#include <cmath>

#include "engine.h"
#include "kernels.h"

namespace gemma_ext::cce::cpu {

constexpr int64_t kRowSpan = 256;  // rows that one elementwise task owns
inline int64_t spans(int64_t n) { return ceil_div(n, kRowSpan); }
inline int64_t tile_groups(const Problem& p) { return ceil_div(p.tiles, kForwardTiles); }

struct ValidRows {
  Problem problem{};
  Status status;
  std::vector<int64_t> rows, label;

  explicit ValidRows(const Head& h) {
    Problem& p = problem;
    p.e = {h.e, h.dtype, h.N, h.D, h.e_stride, h.e_step};
    p.c = {h.c, h.dtype, h.V, h.D, h.c_stride, h.c_step};
    p.bias = h.bias;
    p.class_weight = h.class_weight;
    p.V = h.V;
    p.D = h.D;
    p.tiles = tiles_of(h.V);
    p.map = h.map;
    read_labels(h);
    p.n = int64_t(rows.size());
    p.rows = rows.data();
    p.label = label.data();
  }

  template <class T>
  std::vector<T> gather(const T* all) const {
    std::vector<T> out(rows.size());
    for (size_t i = 0; i < rows.size(); ++i) out[i] = all[rows[i]];
    return out;
  }
  // What rows that are not valid get: `other`.
  template <class T>
  void scatter(const std::vector<T>& valid, T* all, T other) const {
    std::fill(all, all + problem.e.rows, other);
    for (size_t i = 0; i < rows.size(); ++i) all[rows[i]] = valid[i];
  }

 private:
  void read_labels(const Head& h) {
    for (int64_t i = 0; i < h.N; ++i) {
      const int64_t at = i * h.target_stride;
      const int64_t target = h.wide_targets ? static_cast<const int64_t*>(h.targets)[at]
                                            : static_cast<const int32_t*>(h.targets)[at];
      if (target == h.ignore_index) continue;
      const bool inside = target >= 0 && target < h.V;
      if (!inside && !h.allow_missing) {
        status.bad_label_at = i;
        status.bad_label = target;
        return;
      }
      rows.push_back(i);
      label.push_back(inside ? target : -1);
    }
  }
};

// [n] each, compact.
struct RowResults {
  std::vector<float> nll, lse, lse_low, mean, class_sum, log_squares, average;
  std::vector<int64_t> argmax;

  explicit RowResults(int64_t n)
      : nll(n), lse(n), lse_low(n), mean(n), class_sum(n), log_squares(n), average(n), argmax(n) {}
};

// The rows from their strips, in a fixed order.
void combine(const Problem& p, const StripStats& stats, RowResults& out, Workers& workers);

// [tiles, n] -> [tiles, N] in place, zero behind n.
void spread(float* plane, int64_t tiles, int64_t n, int64_t N);

}  // namespace gemma_ext::cce::cpu
