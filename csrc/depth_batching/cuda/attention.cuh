// SPDX-License-Identifier: Apache-2.0
// What the kernels of attention share. A block computes one split of up to 8 heads that share K; scores are in units
// of log2 e, so that weights are powers of two.
#pragma once

#include "launches.h"

namespace gemma_ext::depth_batching::cuda {

constexpr int kHeads = 8;  // of a block
constexpr float kLog2e = 1.44269504f, kNothing = -__builtin_inff();

// Floats before a part's sums: the maximum of its scores, the sum of its weights; the rest aligns.
constexpr int kPartHead = 4;

struct AttendParams {
  Attention call;
  int64_t row0, rows;  // of this launch
  int splits;          // that a request may have
  float* parts;        // [rows, q_heads, splits, kPartHead + width]
};

DEVICE int group_of(const Attention& a) { return static_cast<int>(a.q_heads / a.pool.heads); }

DEVICE float* part_of(const AttendParams& p, int64_t row, int64_t head, int split) {
  const Attention& a = p.call;
  return p.parts +
         (((row - p.row0) * a.q_heads + head) * p.splits + split) * (kPartHead + a.pool.width);
}

DEVICE bool is_row(const Attention& a, int64_t i) {
  if (!is_place(a.places, i)) return false;
  const int32_t depth = a.depth_of[a.places.loop[i]];
  return depth >= 0 && depth < a.pool.depths;
}

// What block_idx stands for: the splits of a row's head lie side by side.
struct Unit {
  int64_t row;
  int head, first, heads, split;  // of K; heads first .. first + heads of q
};

DEVICE Unit unit_of(const AttendParams& p) {
  const int group = group_of(p.call), chunks = static_cast<int>(ceil_div(group, kHeads));
  int64_t at = simt::block_idx();
  Unit u;
  u.split = static_cast<int>(at % p.splits);
  at /= p.splits;
  const int chunk = static_cast<int>(at % chunks);
  at /= chunks;
  u.head = static_cast<int>(at % p.call.pool.heads);
  u.row = p.row0 + at / p.call.pool.heads;
  u.first = u.head * group + chunk * kHeads;
  u.heads = group - chunk * kHeads < kHeads ? group - chunk * kHeads : kHeads;
  return u;
}

// The 16 tokens of a page of row i's request, K (half 0) or V (1) of a head; null if its page is none.
template <class T>
DEVICE const T* page_of(const Attention& a, int64_t i, int page, int64_t half, int head) {
  const Places& p = a.places;
  const int64_t id = p.block_tables[p.req[i] * p.max_pages + page];
  if (id < 0 || id >= a.pool.pages) return nullptr;
  return static_cast<const T*>(a.pool.data) +
         page_at(a.pool, a.depth_of[p.loop[i]], id, half, head);
}

// Within 3e-7 relative; the polynomial of common/cpu/vec.h where 1 - 2 / (e^2x + 1) cancels.
DEVICE float tanh_of(float x) {
  const float y = x * x;
  float p = y * 0.0017059356f + -0.0076093664f;
  p = p * y + 0.021424724f;
  p = p * y + -0.053885721f;
  p = p * y + 0.13332616f;
  p = p * y + -0.33333313f;
  const float e = simt::exp2_approx(x * (2 * kLog2e));
  return y <= 0.5625f ? p * (y * x) + x : 1.0f - 2.0f * simt::rcp_approx(e + 1.0f);
}

// scale s, capped, in units of log2 e.
DEVICE float score_of(const Attention& a, float s) {
  s *= a.scale;
  if (a.softcap > 0) s = a.softcap * tanh_of(s / a.softcap);
  return s * kLog2e;
}

// Of scores that are all -inf nothing is left, as of no token; NaN, which no maximum sees, stays.
DEVICE float weight_of(float score, float most) {
  if (most == kNothing) return score == kNothing ? 0.0f : score;
  return simt::exp2_approx(score - most);
}

}  // namespace gemma_ext::depth_batching::cuda
