// SPDX-License-Identifier: Apache-2.0
// The arithmetic of one element, for both engines: every operation rounds once, in the order written, so a build
// that uses it may not contract a * b + c. A is float, or double where results are wide, or a vector of either; K is
// what comparing them gives. Free of branches that depend on values, so that loops over elements become vectors.
#pragma once

#include <math.h>

#include "common/random.h"
#include "contract.h"

#if defined(__CUDACC__)
#define SOUP_FN static __host__ __device__ __forceinline__
#else
// internal linkage: compiled once per instruction set
#define SOUP_FN static inline __attribute__((always_inline, unused))
#endif

namespace gemma_ext::souping {

// Bits.

union FloatBits {
  float value;
  uint32_t bits;
};
SOUP_FN uint32_t to_bits(float x) {
  FloatBits u;
  u.value = x;
  return u.bits;
}
SOUP_FN float from_bits(uint32_t bits) {
  FloatBits u;
  u.bits = bits;
  return u.value;
}

constexpr uint32_t kInfinite = 0x7f800000u, kSign = 0x80000000u, kNan = 0x7fc00000u;

// Random numbers: Philox4x32-10 (Salmon et al. 2011). Position p of a tensor takes word p % 4 of the counter
// (p / 4, model, purpose).

enum Purpose : uint32_t { kDrop, kRound, kGene, kNoise, kChoice };

SOUP_FN void philox(uint64_t key, uint64_t quad, uint32_t model, uint32_t purpose,
                    uint32_t* words) {
  words[0] = (uint32_t)quad;
  words[1] = (uint32_t)(quad >> 32);
  words[2] = model;
  words[3] = purpose;
  philox_words<WordProduct>((uint32_t)key, (uint32_t)(key >> 32), words);
}

// u = (word >> 8) 2^-24; u < p is draw < reach(p).
SOUP_FN uint32_t draw(uint32_t word) { return word >> 8; }
SOUP_FN float uniform(uint32_t word) { return (float)(word >> 8) * 0x1p-24f; }
SOUP_FN uint32_t reach(double p) {
  const double steps = p * 0x1p24;
  if (!(steps > 0)) return 0;
  return steps >= 0x1p24 ? 1u << 24 : (uint32_t)ceil(steps);
}

// log((2 k + 1) 2^-25) of k < 2^24.
SOUP_FN float log_uniform(uint32_t k) {
  const uint32_t odd = 2 * k + 1, missing = (1u << 25) - odd;
  const uint32_t bits = to_bits((float)odd * 0x1p-25f) - kRootHalf;
  const bool near_one = missing < (1u << 23);  // there `odd` has a bit too many
  const float e = near_one ? 0.0f : (float)((int32_t)bits >> 23);
  const float m =
      near_one ? (float)missing * -0x1p-25f : from_bits((bits & 0x7fffffu) + kRootHalf) - 1.0f;
  return log_of_parts(e, m);
}

// e^x within 2 ulp for x <= 0; 0 below -87.
SOUP_FN float exp_of(float x) {
  const float clamped = x < -87.0f ? -87.0f : x;
  const float shifted = clamped * 1.44269504f + 0x1.8p23f;  // the rounded integer in its low bits
  const float n = shifted - 0x1.8p23f;
  const float r = (clamped - n * 0x1.62e400p-1f) - n * 0x1.7f7d1cp-20f;
  float p = r * 1.38888889e-3f + 8.33333333e-3f;
  p = p * r + 4.16666667e-2f;
  p = p * r + 1.66666667e-1f;
  p = p * r + 0.5f;
  p = p * (r * r) + (r + 1.0f);
  const float scale = from_bits((to_bits(shifted) + 127u) << 23);
  return x < -87.0f ? 0.0f : p * scale;
}

// Two standard normal numbers (Box and Muller) of two words, for positions 2i and 2i + 1.
SOUP_FN void normal_pair(uint32_t word0, uint32_t word1, float* first, float* second) {
  const float radius = sqrtf(-2.0f * log_uniform(word0 >> 8));
  const uint32_t turn = word1 >> 8;  // of 2^24
  const uint32_t quadrant = (turn + (1u << 21)) >> 22;
  const float t = (float)((int32_t)turn - (int32_t)(quadrant << 22)) * (6.2831853f * 0x1p-24f);
  const float z = t * t;
  float s = -1.9515295891e-4f * z + 8.3321608736e-3f;  // Cephes' sinf and cosf
  s = s * z + -1.6666654611e-1f;
  s = s * z * t + t;
  float c = 2.4433157118e-5f * z + -1.3887316255e-3f;
  c = c * z + 4.1666645683e-2f;
  c = c * z * z + (z * -0.5f + 1.0f);
  const bool odd = (quadrant & 1) != 0;
  const float across = odd ? s : c, up = odd ? c : s;
  const uint32_t minus_across = ((quadrant + 1) & 2) << 30, minus_up = (quadrant & 2) << 30;
  *first = radius * from_bits(to_bits(across) ^ minus_across);
  *second = radius * from_bits(to_bits(up) ^ minus_up);
}

// Sums over models: of terms in ascending order, so that the order of the models changes no bit. What adds nothing
// is -0, which leaves every number as it is.

template <class A>
SOUP_FN A nothing() {
  return -A{};
}

// Both stay, NaN too.
template <class A>
SOUP_FN void exchange(A* low, A* high) {
  const A x = *low, y = *high;
  const auto less = x < y;
  *low = less ? x : y;
  *high = less ? y : x;
}
template <int kLow, int kHigh, int... kRest, class A>
SOUP_FN void exchanges(A* x) {
  exchange(x + kLow, x + kHigh);
  if constexpr (sizeof...(kRest) > 0) exchanges<kRest...>(x);
}

// Sorting networks: of kM terms, or of `count` where kM is 0 (Batcher 1968).
template <int kM, class A>
SOUP_FN void sort_terms(A* x, int count) {
  static_assert(kM <= 4 || kM == 8);
  if constexpr (kM == 2) {
    exchanges<0, 1>(x);
  } else if constexpr (kM == 3) {
    exchanges<0, 2, 0, 1, 1, 2>(x);
  } else if constexpr (kM == 4) {
    exchanges<0, 2, 1, 3, 0, 1, 2, 3, 1, 2>(x);
  } else if constexpr (kM == 8) {
    exchanges<0, 2, 1, 3, 4, 6, 5, 7, 0, 4, 1, 5, 2, 6, 3, 7, 0, 1, 2, 3, 4, 5, 6, 7, 2, 4, 3, 5, 1,
              4, 3, 6, 1, 2, 3, 4, 5, 6>(x);
  } else if constexpr (kM == 0) {
    for (int p = 1; p < count; p += p)
      for (int k = p; k > 0; k /= 2)
        for (int j = k % p; j + k < count; j += 2 * k)
          for (int i = j; i < j + k && i + k < count; ++i)
            if ((i ^ (i + k)) < 2 * p) exchange(x + i, x + i + k);
  }
}

template <int kM, class A>
SOUP_FN A sum_sorted(const A* x, int count) {
  A total = nothing<A>();
  for (int m = 0; m < (kM ? kM : count); ++m) total = total + x[m];
  return total;
}

template <int kM, class A>
SOUP_FN A sum_terms(A* x, int count) {
  sort_terms<kM>(x, count);
  return sum_sorted<kM>(x, count);
}

// w x; of a weight of 0 nothing, or NaN where x is not finite.
template <class W, class A>
SOUP_FN A weighted(W w, A x) {
  const A y = w * x;
  return w == 0 ? -(y * y) : y;
}

// Magnitudes: |x| in 31 bits that order like it; kNoKey for NaN, which no cut takes.

constexpr uint32_t kNoKey = 0xffffffffu;

SOUP_FN uint32_t magnitude(float x) {
  const uint32_t bits = to_bits(x) & ~kSign;
  return bits > kInfinite ? kNoKey : bits;
}

// The bins that the coarse survey tells apart.
SOUP_FN Window checked_window(const int64_t* given) {
  if (!given) return kWidest;
  const int64_t below = given[0] < -1 ? -1 : given[0] > kCoarse - 2 ? kCoarse - 2 : given[0];
  const int64_t above = given[1] <= below        ? below + 1
                        : given[1] > kCoarse - 1 ? kCoarse - 1
                                                 : given[1];
  return {below, above};
}

// Population variance of d[0 .. models), which it sorts.
template <int kM, class A>
SOUP_FN A variance(A* d, int models) {
  sort_terms<kM>(d, models);
  const A mean = sum_sorted<kM>(d, models) / (float)models;
  A total = A{};
  for (int m = 0; m < (kM ? kM : models); ++m) {
    const A away = d[m] - mean;
    total = total + away * away;
  }
  return total / (float)models;
}

// `rank` elements of the same key come before.
SOUP_FN bool in_cut(uint32_t key, uint32_t bits, int64_t rank, int64_t ties) {
  return (key > bits && key != kNoKey) || (key == bits && rank < ties);
}

// Keep probability at place `at` of c, 0 for the smallest.
SOUP_FN float rank_probability(float low, float spread, int64_t at, int64_t c) {
  const float share = c > 1 ? (float)at / (float)(c - 1) : 0.5f;
  return low + spread * share;
}
SOUP_FN float value_probability(float low, float spread, float size, float least, float most) {
  const float range = most - least;
  const float share = range > 0 ? (size - least) / range : 0.5f;
  return low + spread * share;
}

// Terms, election, combination. Per element, models in order:
//   d = x - base;  term = kept ? coefficient d [/ p] : -0,  coefficient = w / divide;  plain: 1 / divide for it
//   total = sum of votes;  value, count, weight = sums over who agrees;  out = base + scale result
// A NaN in any d makes out NaN, kept or not.

template <class K, class A>
SOUP_FN A term(K kept, A coefficient, A delta) {
  const A x = coefficient * delta;
  return kept ? x : nothing<A>();
}

template <class A>
SOUP_FN A elected_sign(A total, int zero) {
  const A below = total < 0.0f ? A{} - 1.0f : A{} + (float)zero;
  return total > 0.0f ? A{} + 1.0f : below;
}

template <class A>
SOUP_FN A vote(Election election, A x) {
  return election == Election::kCount ? elected_sign(x, 0) : x;
}

// `elected` is 1, -1 or 0, and a term that is not kept is 0: neither agrees with 0.
template <class A>
SOUP_FN auto agrees(A x, A elected) {
  return x * elected > 0.0f;
}

template <class A>
struct Combined {
  A value, count, weight, alone;  // sums over A; with kMax value is the largest term
};

// All but the sums of terms and of weights.
template <class K, class A>
SOUP_FN void combine(Combine how, K agree, A x, A alone, Combined<A>* c) {
  if (how == Combine::kMax) {
    const A size = x < 0.0f ? -x : x, held = c->value < 0.0f ? -c->value : c->value;
    const A larger = size > held ? x : c->value;
    const A next = size == held && x > c->value ? x : larger;  // of two equals the positive one
    c->value = agree ? next : c->value;
  }
  c->count = agree ? c->count + 1.0f : c->count;
  c->alone = agree ? c->alone + alone : c->alone;
}

template <class A>
SOUP_FN A combined(Combine how, bool has_alone, const Combined<A>& c) {
  const A one = A{} + 1.0f;
  A result = c.value;
  if (how == Combine::kMean) result = result / (c.count > 1.0f ? c.count : one);
  if (how == Combine::kWeightedMean) result = result / (c.weight == 0.0f ? one : c.weight);
  if (has_alone) result = c.count == 1.0f ? c.alone * result : result;
  return result;
}

// base + scale result, of a scale of 0 the base; without a base scale result.
template <class A, class S>
SOUP_FN A moved(bool based, A base, S scale, A result) {
  return based ? base + weighted(scale, result) : scale * result + 0.0f;
}

// Other rules.

template <class A>
SOUP_FN A fisher_weight(A coefficient, A f, A floor, A add) {
  return coefficient * ((f > floor ? f : floor) + add);
}

template <class A>
SOUP_FN A nearswap(A base, A delta, A t) {
  const A size = fabs(delta), wide = size > (A)1e-6 ? size : (A)1e-6;
  const A ratio = t / wide;
  const A w = ratio < 0 ? (A)0 : ratio > 1 ? (A)1 : ratio;
  return base + w * delta;
}

template <class A>
SOUP_FN A clamped(A x, A low, A high) {
  return x < low ? low : x > high ? high : x;
}

// The sum of `terms` no further outside of where the x lie than alpha of their range; both are sorted.
template <int kM, class A>
SOUP_FN A blended(A* x, A* terms, int models, A alpha) {
  sort_terms<kM>(x, models);
  const A low = x[0], high = x[models - 1], away = alpha * (high - low);
  return clamped(sum_terms<kM>(terms, models), low - away, high + away);
}

template <class A>
SOUP_FN A swarm_velocity(const A* c, A x, A v, A best, A group_best, A group_worst) {
  return ((c[0] * v + c[1] * (best - x)) + c[2] * (group_best - x)) - c[3] * (group_worst - x);
}

// Rounding. NaN has one form.

SOUP_FN uint16_t round_bf16(float x) {
  const uint32_t bits = to_bits(x), up = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return (uint16_t)(x == x ? up : kNan >> 16);
}

SOUP_FN uint16_t round_half(float x) {
  const uint32_t bits = to_bits(x), sign = (bits >> 16) & 0x8000, size = bits & ~kSign;
  const uint32_t normal = (size + 0xfff + ((size >> 13) & 1) - 0x38000000u) >> 13;
  const uint32_t small =
      to_bits(from_bits(size) + 0.5f) - 0x3f000000u;  // 0.5 lines up its last bit
  uint32_t half = size < 0x38800000u ? small : normal;
  half = size >= 0x477ff000u ? 0x7c00u : half;
  half = size > kInfinite ? 0x7e00u : half;
  return (uint16_t)(size > kInfinite ? half : sign | half);
}

// To one of the two neighbours, to each in proportion to how near it is; `word` is of kRound.
SOUP_FN uint16_t stochastic_bf16(float x, uint32_t word) {
  const uint32_t bits = to_bits(x), size = bits & ~kSign;
  const uint32_t up = (bits + (word & 0xffff)) >> 16;
  return (uint16_t)(size > kInfinite ? kNan >> 16 : size == kInfinite ? bits >> 16 : up);
}

SOUP_FN uint16_t stochastic_half(float x, uint32_t word) {
  const uint32_t bits = to_bits(x), sign = (bits >> 16) & 0x8000, size = bits & ~kSign;
  const uint32_t exponent = size >> 23, e = exponent > 1 ? exponent : 1;
  const uint32_t mantissa = (size & 0x7fffff) | (exponent > 0 ? 0x800000u : 0);
  const uint32_t shift = 13 + (e < 113 ? 113 - e : 0);  // float16 has fewer bits below 2^-14
  const uint32_t extra = shift > 32 ? shift - 32 : 0, lost = extra < 31 ? extra : 31;
  const uint32_t kept = shift - extra;
  const uint64_t noise = word & (((uint64_t)1 << kept) - 1);
  const uint32_t steps = (uint32_t)(((uint64_t)(mantissa >> lost) + noise) >> kept);
  uint32_t half = steps + ((e > 113 ? e - 113 : 0) << 10);
  half = half > 0x7c00u || size == kInfinite ? 0x7c00u : half;
  return (uint16_t)(size > kInfinite ? 0x7e00u : sign | half);
}

SOUP_FN float round_float(float x) { return x == x ? x : from_bits(kNan); }
SOUP_FN double one_nan(double x) { return x == x ? x : (double)from_bits(kNan); }

// float64 to float32 so that a further rounding to 16 bits is the only one: to odd where it is not exact.
SOUP_FN float to_odd(double x) {
  const float near = (float)x;
  const double back = (double)near;
  const uint32_t bits = to_bits(near);
  const uint32_t down = fabs(back) > fabs(x) ? bits - 1 : bits;
  return back == x || !(fabs(back) <= 3.4028234663852886e38) ? near : from_bits(down | 1);
}
SOUP_FN float to_odd(float x) { return x; }

}  // namespace gemma_ext::souping
