// SPDX-License-Identifier: Apache-2.0
// Two heads, tile by tile: their logits live in one worker's L2, as strips of 256 columns side by side.
#pragma once

#include "divergence_epilogue.h"
#include "tiles.h"

namespace gemma_ext::cce::GEMMA_EXT_ISA {

// f(kind) with the kind as a constant.
template <class F>
GEMMA_EXT_INLINE void by_kind(Kind kind, F f) {
  switch (kind) {
    case Kind::kForwardKl: return f(Constant<int(Kind::kForwardKl)>());
    case Kind::kReverseKl: return f(Constant<int(Kind::kReverseKl)>());
    case Kind::kJsd: return f(Constant<int(Kind::kJsd)>());
    case Kind::kTvd: return f(Constant<int(Kind::kTvd)>());
  }
}

inline bool both_narrow(const ProblemPair& p) {
  return p.student->c.dtype == DType::kBFloat16 && p.teacher->c.dtype == DType::kBFloat16;
}

// A tile of both heads, packed once, and the logits of blocks of rows against it.
template <class T>
struct PairTile {
  const ProblemPair& p;
  const Tile tile;
  const T *packed, *teacher_packed;
  float *bias, *teacher_bias;

  PairTile(const ProblemPair& p, int64_t index, Scratch& s)
      : p(p),
        tile(tile_at(*p.student, index)),
        packed(pack_tiles<T>(*p.student, index, index + 1, kPacked, s)),
        teacher_packed(pack_tiles<T>(*p.teacher, index, index + 1, kTeacherPacked, s)),
        bias(scratch<float>(s, kSmall, 3 * kTile)),
        teacher_bias(bias + kTile) {
    gather(tile, p.student->bias, bias);
    gather(tile, p.teacher->bias, teacher_bias);
  }

  // f(r, s, t) for each of at most kBlockRows rows.
  template <class RowAt, class F>
  void each(int64_t rows, RowAt row_at, Scratch& s, F f) const {
    float* mine = products<T>(*p.student, packed, 1, rows, row_at, kStrips, s);
    float* theirs = products<T>(*p.teacher, teacher_packed, 1, rows, row_at, kTeacherStrips, s);
    for (int64_t r = 0; r < rows; ++r) {
      float *x = mine + r * kTile, *y = theirs + r * kTile;
      strip_logits(p.student->map, bias, tile.valid, x);
      strip_logits(p.teacher->map, teacher_bias, tile.valid, y);
      f(r, x, y);
    }
  }
};

template <class T>
void pair_rows(const ProblemPair& p, const PairStats& out, int64_t index, int64_t row0,
               int64_t row1, Scratch& s) {
  const TileRegisters<T> registers;
  const PairTile<T> tile(p, index, s);
  by_kind(p.kind, [&](auto kind) {
    for (int64_t row = row0; row < row1; row += kBlockRows<T>) {
      const int64_t rows = least(kBlockRows<T>, row1 - row);
      tile.each(
          rows, [&](int64_t r) { return row + r; }, s,
          [&](int64_t r, float* x, float* y) {
            const int target = target_in(*p.student, tile.tile, row + r);
            if (target >= 0) {
              out.target[row + r] = x[target];
              out.teacher_target[row + r] = y[target];
            }
            pair_sums<Kind(decltype(kind)::kValue)>(out, index * p.student->n + row + r, target, x,
                                                    y);
          });
    }
  });
}

template <class T>
void mean_rows(const ProblemPair& p, const MeanStats& out, int64_t index, int64_t row0,
               int64_t row1, Scratch& s) {
  const TileRegisters<T> registers;
  const PairTile<T> tile(p, index, s);
  by_kind(p.kind, [&](auto kind) {
    for (int64_t row = row0; row < row1; row += kBlockRows<T>) {
      const int64_t rows = least(kBlockRows<T>, row1 - row);
      tile.each(
          rows, [&](int64_t r) { return row + r; }, s,
          [&](int64_t r, float* x, float* y) {
            const int64_t at = row + r;
            const PairLogs logs{out.lse[at], out.lse_low[at], out.teacher_lse[at],
                                out.teacher_low[at]};
            mean_sums<Kind(decltype(kind)::kValue)>(out, logs, p.beta, index * p.student->n + at, x,
                                                    y);
          });
    }
  });
}

// As grad_rows, with logits from products of L and gradients in products of T.
template <class L, class T, class S>
void pair_grad_rows(const GradTask& task, const ProblemPair& p, const PairCoefficients& coef,
                    int64_t index, Scratch& s) {
  const TileRegisters<T> registers;
  const Problem& student = *p.student;
  const int32_t* list = task.list + task.begin[index];
  const int64_t kept = task.begin[index + 1] - task.begin[index];
  S* slots = static_cast<S*>(task.strips) + (task.begin[index] - task.slot0) * kTile;
  float* bias_sums = scratch<float>(s, kSmall, 3 * kTile) + 2 * kTile;
  memset(bias_sums, 0, kTile * sizeof(float));
  if (kept) {
    const PairTile<L> tile(p, index, s);
    by_kind(p.kind, [&](auto kind) {
      for (int64_t first = 0; first < kept; first += kBlockRows<L>) {
        const int64_t rows = least(kBlockRows<L>, kept - first);
        tile.each(
            rows, [&](int64_t r) { return list[first + r]; }, s,
            [&](int64_t r, float* x, float* y) {
              const int64_t row = list[first + r];
              const float weight = task.weight[task.begin[index] + first + r];
              const PairCoefficient c{
                  {coef.lse[row], coef.lse_low[row], coef.teacher_lse[row], coef.teacher_low[row]},
                  coef.mean[row],
                  coef.a[row] * weight,
                  coef.at_label[row],
                  coef.d[row] * weight};
              pair_gradient<Kind(decltype(kind)::kValue)>(student.map, c, p.beta,
                                                          target_in(student, tile.tile, row), x, y);
              keep_strip(x, student.map.scale, bias_sums, slots + (first + r) * kTile);
            });
      }
    });
  }
  if (task.dc) write_dc<T>(task, index, slots, kept, [&](int64_t k) { return list[k]; }, s);
  if (task.dbias) write_dbias(task, index, bias_sums);
}

}  // namespace gemma_ext::cce::GEMMA_EXT_ISA
