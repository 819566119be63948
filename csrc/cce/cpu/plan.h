// SPDX-License-Identifier: Apache-2.0
// From tiles to whole tensors: the CPU forward, backward and fused step, without torch.
#pragma once

#include <functional>
#include <vector>

#include "../params.h"

namespace gemma_ext::cce {

inline const Kernels& kernels() { return *chosen_kernels(); }

// Deals tasks to torch's threads, one Scratch per thread. Every task writes memory of its own, so
// results do not depend on who ran it.
class Workers {
 public:
  using Range = std::function<void(int64_t, int64_t)>;
  using ParallelFor = std::function<void(int64_t, const Range&)>;

  Workers(int threads, ParallelFor parallel_for);
  ~Workers();
  Workers(const Workers&) = delete;
  Workers& operator=(const Workers&) = delete;

  void run(int64_t tasks, const std::function<void(int64_t, Scratch&)>& task);
  int threads() const { return static_cast<int>(scratch_.size()); }

 private:
  std::vector<Scratch> scratch_;
  ParallelFor parallel_for_;
};

// Per-row results, compact: [n] in the order of Problem::rows. Null where not wanted, but for lse
// and nll.
struct RowOutputs {
  float *nll, *lse, *mean, *class_sum;
  int64_t* argmax;
};

// What the filter keeps when every row has the same weight.
struct FilterReport {
  double kept = 1, dropped_mean = 0, dropped_max = 0, eps = 0;
};

constexpr double kAutoEps = -1;

constexpr int64_t kRowSpan = 256;  // rows that one elementwise task owns
inline int64_t spans(int64_t n) { return (n + kRowSpan - 1) / kRowSpan; }
inline int64_t tile_groups(const Problem& p) {
  return (p.tiles + kForwardTiles - 1) / kForwardTiles;
}

// Rows of [tiles, n] statistics inside one allocation: max, sum, slope, weighted (if want_mean).
constexpr int kStatPlanes = 3;
StripStats stat_planes(float* memory, const Problem& p);

void forward(const Problem& p, StripStats stats, const RowOutputs& out, Workers& workers);
// The rows from their strips, in a fixed order.
void combine(const Problem& p, const StripStats& stats, const RowOutputs& out, Workers& workers);
FilterReport report(const Problem& p, const StripStats& stats, const RowOutputs& rows, double eps,
                    Workers& workers);

// Gradients in the caller's memory; null where not wanted.
struct Gradients {
  void* de;      // [*, D] contiguous in e.dtype, zero where no row is valid
  void* dc;      // [V, D] contiguous
  float* dbias;  // [V]
};

// [n] each: the row's results and the coefficients of its gradient.
struct Upstream {
  const float *lse, *nll, *mean, *a, *b;
  const float *q, *class_coef;  // or null
};

void backward(const Problem& p, const StripStats& stats, const Upstream& up, const float* prob,
              double eps, const Gradients& out, Workers& workers);

// loss = sum_n nll_coef nll + lse2_coef lse^2 and its gradients, in three matrix products.
double fused(const Problem& p, const float* nll_coef, const float* lse2_coef,
             const RowOutputs& rows, const Gradients& out, Workers& workers);

void column_stats(const Problem& p, const float* lse, float eps, float* count, float* prob,
                  Workers& workers);

}  // namespace gemma_ext::cce
