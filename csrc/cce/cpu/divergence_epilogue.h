// SPDX-License-Identifier: Apache-2.0
// Two strips of logits, the student's s and the teacher's t, while they are in L1: sums and gradients of the
// divergences of divergence.h. A column that both mask by -inf takes no part.
#pragma once

#include "epilogue.h"
#include "kernels.h"

namespace gemma_ext::cce::GEMMA_EXT_ISA {

// log x of positive normal x and NaN, within 2 ulp where x is not near 1 and 6e-8 where it is: x = 2^k m,
// sqrt(1/2) <= m < sqrt 2, and the polynomial of Cephes' logf for log m.
GEMMA_EXT_INLINE Vf log(Vf x) {
  const Vi bits = (Vi)x, k = (bits - 0x3f3504f3) >> 23;
  const Vf f = (Vf)(bits - (k << 23)) - 1.0f, z = f * f;
  Vf p = f * 7.0376836292e-2f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const Vf n = __builtin_convertvector(k, Vf);
  const Vf y = n * 0.693359375f + (f + (p * f * z - 0.5f * z - n * 2.12194440e-4f));
  return x == x ? y : x;
}

// log(m / q) and log(m / p) of m = beta p + (1 - beta) q, from log p - log q.
struct Mixture {
  Vf over_q, over_p;
};
GEMMA_EXT_INLINE Mixture mixture(float beta, Vf distance) {
  const Vi above = distance > 0.0f;  // the smaller of p, q over the larger is exp of -|distance|
  const Vf r = exp(above ? -distance : distance), rest = set1(1.0f - beta), share = set1(beta);
  const Vf m = log(above ? share + rest * r : share * r + rest);
  return {above ? m + distance : m, above ? m : m - distance};
}

template <Kind kKind>
struct PairAdder {
  Vf s{}, t{}, cross{}, moment[4]{};

  // x = s - max s, y = t - max t
  GEMMA_EXT_INLINE void operator()(Vf x, Vf y, bool moments) {
    const Vf es = exp(x), et = exp(y);
    s += es;
    t += et;
    if constexpr (kKind == Kind::kForwardKl) {
      cross += et > 0.0f ? et * (y - x) : Vf{};
      if (!moments) return;
      moment[0] += es * es;
      moment[1] += es * et;
      moment[2] += et * et;
    }
    if constexpr (kKind == Kind::kReverseKl) {
      const Vf d = es > 0.0f ? x - y : Vf{};
      cross += es * d;
      if (!moments) return;
      moment[0] += es * d * d;
      moment[1] += es * es;
      moment[2] += es * es * d;
      moment[3] += es * es * d * d;
    }
  }
};

// Without the label's column, as the loss's sums (epilogue.h).
template <Kind kKind>
GEMMA_EXT_INLINE void pair_sums(const PairStats& out, int64_t at, int target, float* s, float* t) {
  const float top = strip_max(s), teacher_top = strip_max(t);
  const float base = top == -kInfinity ? 0.0f : top;
  const float teacher_base = teacher_top == -kInfinity ? 0.0f : teacher_top;
  if (target >= 0) s[target] = t[target] = -kInfinity;
  const bool moments = out.moment[0];
  PairAdder<kKind> sums;
  for (int i = 0; i < kTile; i += kLanes)
    sums(load(s + i) - base, load(t + i) - teacher_base, moments);
  out.max[at] = top;
  out.teacher_max[at] = teacher_top;
  out.sum[at] = sum(sums.s);
  out.teacher_sum[at] = sum(sums.t);
  if (out.cross) out.cross[at] = sum(sums.cross);
  for (int i = 0; moments && i < 4; ++i) out.moment[i][at] = sum(sums.moment[i]);
}

// log of q and of p of one row.
struct PairLogs {
  float lse, lse_low, teacher_lse, teacher_low;

  GEMMA_EXT_INLINE Vf q(Vf s) const { return (s - lse) - lse_low; }
  GEMMA_EXT_INLINE Vf p(Vf t) const { return (t - teacher_lse) - teacher_low; }
};

// h of the kinds that have one, 0 where q is; and, of those that ask for lse, a column's share of the divergence.
struct Score {
  Vf h, value;
};
template <Kind kKind>
GEMMA_EXT_INLINE Score score(float beta, Vf log_q, Vf log_p, Vf q, Vf p) {
  if constexpr (kKind == Kind::kJsd) {
    const Mixture m = mixture(beta, log_p - log_q);
    const float rest = 1.0f - beta;
    const Vf h = q > 0.0f ? m.over_q * -rest : Vf{};
    return {h, q * h - (p > 0.0f ? p * m.over_p * beta : Vf{})};
  } else if constexpr (kKind == Kind::kTvd) {
    const Vf d = q - p, none{};
    return {d > 0.0f ? set1(0.5f) : d < 0.0f ? set1(-0.5f) : d, 0.5f * (d < 0.0f ? none - d : d)};
  } else {
    return {q > 0.0f ? log_q - log_p : Vf{}, Vf{}};
  }
}

template <Kind kKind>
GEMMA_EXT_INLINE void mean_sums(const MeanStats& out, const PairLogs& logs, float beta, int64_t at,
                                const float* s, const float* t) {
  Vf value{}, mean{}, moment[4]{};
  for (int i = 0; i < kTile; i += kLanes) {
    const Vf log_q = logs.q(load(s + i)), log_p = logs.p(load(t + i));
    const Vf q = exp(log_q), p = exp(log_p);
    const Score x = score<kKind>(beta, log_q, log_p, q, p);
    const Vf qh = q * x.h;
    value += x.value;
    mean += qh;
    moment[0] += qh * x.h;
    moment[1] += q * q;
    moment[2] += q * qh;
    moment[3] += qh * qh;
  }
  out.value[at] = sum(value);
  out.mean[at] = sum(mean);
  for (int i = 0; out.moment[0] && i < 4; ++i) out.moment[i][at] = sum(moment[i]);
}

struct PairCoefficient {
  PairLogs logs;
  float mean, a, at_label, d;
};

// G in place of s for one row; a and d hold the weight of the strip.
template <Kind kKind>
GEMMA_EXT_INLINE void pair_gradient(const LogitMap& map, const PairCoefficient& c, float beta,
                                    int target, float* s, const float* t) {
  const float at_target = target >= 0 ? s[target] : 0.0f;
  const float correction = target >= 0 ? c.at_label : 0.0f;
  float of_label = 0;
  for (int i = 0; i < kTile; i += kLanes) {
    const Vf x = load(s + i), log_q = c.logs.q(x), log_p = c.logs.p(load(t + i));
    const Vf q = exp(log_q), p = exp(log_p), u = x * map.t_over_cap;
    Vf g{};
    if constexpr (kKind == Kind::kForwardKl)
      g = q - p;
    else
      g = q * (score<kKind>(beta, log_q, log_p, q, p).h - c.mean);
    g *= c.d;
    if (target >= i && target < i + kLanes) of_label = g[target - i];
    g += q * c.a;
    g *= (1.0f - u * u) * map.inv_t;
    store(s + i, x == -kInfinity ? Vf{} : g);
  }
  if (target >= 0) {
    const float u = at_target * map.t_over_cap;
    s[target] = (of_label + correction) * (1.0f - u * u) * map.inv_t;
  }
}

}  // namespace gemma_ext::cce::GEMMA_EXT_ISA
