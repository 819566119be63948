// SPDX-License-Identifier: Apache-2.0
// RMS norms of rows of the hidden bank.
#pragma once

#include "linear_table.h"
#include "rows.h"

namespace gemma_ext::depth_batching::GEMMA_EXT_ISA {
namespace {

// 1 / sqrt(mean x^2 + eps)
template <class T>
float inverse_rms(const T* x, int64_t D, float eps) {
  Vf squares{};
  each_vector(x, D, [&](int64_t, Vf v, int) __attribute__((always_inline)) { squares += v * v; });
  return 1.0f / __builtin_sqrtf(sum(squares) / float(D) + eps);
}

GEMMA_EXT_INLINE Vf normed(Vf x, float inverse, Vf weight, bool plus_one) {
  return x * inverse * (plus_one ? 1.0f + weight : weight);
}

template <class T, class W, class O>
void norm_row(const T* x, const W* weight, int64_t D, const NormRule& rule, O* out) {
  const float inverse = inverse_rms(x, D, rule.eps);
  each_vector(weight, D, [&](int64_t i, Vf w, int count) __attribute__((always_inline)) {
    const Vf v = count == kLanes ? load_row(x + i) : some_of(x + i, count);
    put_some(out + i, normed(v, inverse, w, rule.plus_one), count);
  });
}

void gather(const Gather& call, int64_t row) {
  const int64_t slot = call.slots[row], D = call.D;
  with_type(call.out_type, [&](auto like) {
    using O = decltype(like);
    O* out = static_cast<O*>(call.out) + row * D;
    if (slot < 0) {
      memset(out, 0, D * sizeof(O));
      return;
    }
    with_type(call.bank_type, [&](auto of_bank) {
      using T = decltype(of_bank);
      with_type(call.type, [&](auto of_weight) {
        using W = decltype(of_weight);
        norm_row(static_cast<const T*>(call.bank) + slot * D, static_cast<const W*>(call.weight), D,
                 call.norm, out);
      });
    });
  });
}

void scatter(const Scatter& call, int64_t row, Scratch& s) {
  const int64_t slot = call.slots[row], D = call.D;
  float* step = strip_of(s, kWide, D + kLanes);
  if (slot >= 0) {
    with_type(call.y_type, [&](auto like) {
      using Y = decltype(like);
      const Y* y = static_cast<const Y*>(call.y) + row * call.y_stride;
      const auto keep = [&](int64_t i, Vf v, int) { store(step + i, v); };
      if (!call.weight) return each_vector(y, D, keep);
      const float inverse = inverse_rms(y, D, call.norm.eps);
      each_vector(y, D, keep);
      with_type(call.weight_type, [&](auto of_weight) {
        using W = decltype(of_weight);
        each_vector(static_cast<const W*>(call.weight), D, [&](int64_t i, Vf w, int) {
          store(step + i, normed(load(step + i), inverse, w, call.norm.plus_one));
        });
      });
    });
    with_type(call.bank_type, [&](auto like) {
      using T = decltype(like);
      T* bank = static_cast<T*>(call.bank) + slot * D;
      each_vector(bank, D, [&](int64_t i, Vf v, int count) {
        put_some(bank + i, v + load(step + i), count);
      });
    });
  }
  if (!call.next_weight) return;
  Gather after{call.bank,        call.bank_type, call.S,    D,         call.n,        call.slots,
               call.next_weight, call.next_type, call.norm, call.next, call.next_type};
  gather(after, row);
}

}  // namespace
}  // namespace gemma_ext::depth_batching::GEMMA_EXT_ISA
