// SPDX-License-Identifier: Apache-2.0
// Two heads over the same rows and columns (divergence.h): a block has 128 rows against half a tile of both, and
// the logits of either never leave its registers.
#pragma once

#include "../divergence.h"
#include "head.cuh"

namespace gemma_ext::cce::cuda {

// log q and log p of one row.
struct PairLogs {
  float lse, lse_low, teacher_lse, teacher_low;

  DEVICE float q(float s) const { return (s - lse) - lse_low; }
  DEVICE float p(float t) const { return (t - teacher_lse) - teacher_low; }
};

// The names of rows and columns; in place of class weights the teacher's bias.
template <class T>
struct SharedPair {
  SharedHead<T> student, teacher;

  DEVICE SharedPair() : teacher(student) { teacher.bias = student.weight; }

  DEVICE void name_columns(const TwoHeads& h, int64_t first) const {
    cuda::name_columns(student, h.student, first);
    const int t = simt::thread_idx() - kBlockRows;
    if (t < 0 || t >= kHalf) return;
    const int64_t id = first + t;
    teacher.bias[t] = id < h.student.V && h.teacher.bias ? h.teacher.bias[id] : 0.0f;
  }
};

template <class T>
struct PairTiles {
  mma::Tile<T> student, teacher;

  // The caller has synchronised after naming rows and columns.
  DEVICE void multiply(const SharedPair<T>& s, const TwoHeads& h, int64_t first_column) {
    head_logits(student, s.student, h.student, first_column);
    head_logits(teacher, s.teacher, h.teacher, first_column);
  }
};

// h of the kinds that have one, 0 where q is; and, of those that ask for lse, a column's share of the divergence.
struct Score {
  float h, value;
};
DEVICE Score score(Kind kind, float beta, float log_q, float log_p, float q, float p) {
  if (kind == Kind::kReverseKl) return {q > 0.0f ? log_q - log_p : 0.0f, 0.0f};
  if (kind == Kind::kTvd) {
    const float d = q - p;
    return {d > 0.0f ? 0.5f : d < 0.0f ? -0.5f : d, 0.5f * fabsf(d)};
  }
  // log(m / q) and log(m / p) from the larger of the two
  const float distance = log_p - log_q, r = exp_of(-fabsf(distance)), rest = 1.0f - beta;
  const bool above = distance > 0.0f;
  const float m = logf(above ? beta + rest * r : beta * r + rest);
  const float over_q = above ? m + distance : m, over_p = above ? m : m - distance;
  const float h = q > 0.0f ? -rest * over_q : 0.0f;
  return {h, q * h - (p > 0.0f ? beta * p * over_p : 0.0f)};
}

}  // namespace gemma_ext::cce::cuda
