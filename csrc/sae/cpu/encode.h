// SPDX-License-Identifier: Apache-2.0
// Pre-activations of some rows and features, a strip of at most 512 features at a time:
//   p[n, f] = x_n . w_f + bias_f
#pragma once

#include <string.h>

#include "../../common/cpu/gemm.h"
#include "encode_strips.h"

namespace gemma_ext::sae::GEMMA_EXT_ISA {

// What bfloat16 is multiplied in.
#if defined(__AVX512BF16__) || defined(GEMMA_EXT_TILES)
using Narrow = bf16;
#else
using Narrow = float;
#endif

// Panels that share the loads of x; where products are fast, one that stays in L2.
template <class T>
constexpr int64_t kTilesAtOnce = kTiled<T> ? 1 : 2;

template <class T>
T* scratch(Scratch& s, Slot slot, int64_t count) {
  return static_cast<T*>(s.part(slot, count * sizeof(T)));
}

GEMMA_EXT_INLINE Matrix rows_of_x(const Encoder& e) {
  return {e.x, e.dtype, e.N, e.D, e.x_stride, e.x_step};
}

GEMMA_EXT_INLINE Matrix rows_of_weight(const Encoder& e) {
  return {e.weight, e.dtype, e.F, e.D, e.weight_stride, e.weight_step};
}

// The task's rows as the A of all its products: [K-block][rows, kDepth].
template <class T>
const T* pack_x(const EncodeTask& task, int64_t rows, Scratch& s) {
  const Encoder& e = *task.encoder;
  const Matrix x = rows_of_x(e);
  T* packed = scratch<T>(s, kBlock, (e.D + kDepth - 1) / kDepth * rows * kDepth);
  T* to = packed;
  for (int64_t k = 0; k < e.D; k += kDepth) {
    const int64_t step = least(kDepth, e.D - k);
    for (int64_t r = 0; r < rows; ++r, to += kDepth) {
      const int64_t valid = r < task.rows ? step : 0;
      if (valid) load_row<T>(x, task.row0 + r, k, step, to);
      for (int64_t i = valid; i < depth<T>(step); ++i) put(to + i, 0.0f);
    }
  }
  return packed;
}

// Features side by side in memory, as in a transposed weight, are columns of a panel already.
template <class T>
void pack_side_by_side(const Encoder& e, int64_t feature, int64_t width, T* packed, T* spare) {
  const Matrix columns = {e.weight, e.dtype, e.D, e.F, e.weight_step, e.weight_stride};
  const int64_t d = depth<T>(e.D);
  for (int64_t v = 0; v < width; v += kSlice) {
    const int64_t valid = least(kSlice, e.F - feature - v);
    const bool plain = is_plain<T>(columns) && valid == kSlice;
    const auto row = [&](int64_t k, T* spare_row) -> const T* {
      if (k < e.D && plain)
        return static_cast<const T*>(e.weight) + k * e.weight_step + feature + v;
      memset(spare_row, 0, kSlice * sizeof(T));
      if (k < e.D && valid > 0) load_row<T>(columns, k, feature + v, valid, spare_row);
      return spare_row;
    };
    for (int64_t k = 0; k < d; k += kPair<T>)
      interleave(row(k, spare), kPair<T> == 2 ? row(k + 1, spare + kSlice) : nullptr,
                 packed + v * d + k * kSlice);
  }
}

template <class T>
const T* pack_weight(const Encoder& e, int64_t feature, int64_t width, Scratch& s) {
  const int64_t d = depth<T>(e.D);
  T* packed = scratch<T>(s, kPanel, d * width);
  T* spare = scratch<T>(s, kSpare, kLanes * d + 2 * kSlice);
  if (e.weight_stride == 1 && e.weight_step != 1) {
    pack_side_by_side<T>(e, feature, width, packed, spare);
  } else {
    const auto id = [&](int v) { return feature + v < e.F ? feature + v : -1; };
    pack_rows<T>(rows_of_weight(e), int(width), id, packed, spare);
  }
  return packed;
}

// A strip's vectors, copied to where whole vectors may be read.
inline Strip strip_at(const EncodeTask& task, int64_t feature, int64_t width, Scratch& s) {
  const Encoder& e = *task.encoder;
  constexpr int64_t kWidest = 2 * kTile;
  float* room = scratch<float>(s, kSmall, 4 * kWidest);
  int64_t used = 0;
  const auto copy = [&](const float* from) -> const float* {
    if (!from) return nullptr;
    float* to = room + kWidest * used++;
    memset(to, 0, kWidest * sizeof(float));
    memcpy(to, from + feature, width * sizeof(float));
    return to;
  };
  Strip strip{feature, width, copy(e.bias), copy(e.scale), nullptr, nullptr};
  if (task.above) strip.limits = copy(task.above->limits);
  if (task.aux) {
    int32_t* to = reinterpret_cast<int32_t*>(room + kWidest * used);
    for (int64_t i = 0; i < width; ++i) to[i] = task.aux->mask[feature + i] ? -1 : 0;
    strip.allowed = to;
  }
  return strip;
}

inline void keep(const EncodeTask& task, const Strip& strip, int64_t r, float* p) {
  if (strip.bias) add_bias(strip, p);
  if (task.top) keep_top(*task.top, strip, r, p);
  if (task.aux) keep_top(*task.aux, strip, r, p);
  if (task.groups) keep_best(*task.groups, strip, task.row0 + r, p);
  if (task.above) keep_above(*task.above, strip, r, task.row0 + r, p);
}

template <class T>
void encode_rows(const EncodeTask& task, Scratch& s) {
  const TileRegisters<T> registers;
  const Encoder& e = *task.encoder;
  const int64_t rows = whole_rows<T>(task.rows), d = depth<T>(e.D);
  const T* x = pack_x<T>(task, rows, s);
  constexpr int64_t kWide = kTilesAtOnce<T> * kTile;
  // whole vectors are read at the end of the last strip
  float* p = scratch<float>(s, kStrips, kBlockRows<T> * kWide + kLanes);
  for (int64_t feature = task.feature0; feature < task.feature1; feature += kWide) {
    const int64_t width = least(kWide, task.feature1 - feature);
    const int64_t slices = (width + kSlice - 1) / kSlice, wide = slices * kSlice;
    const T* weight = pack_weight<T>(e, feature, wide, s);
    const Strip strip = strip_at(task, feature, width, s);
    for (int64_t row = 0; row < task.rows; row += kBlockRows<T>) {
      const int64_t block = least(kBlockRows<T>, rows - row);
      for (int64_t k = 0; k < e.D; k += kDepth) {
        const T* a = x + (k / kDepth * rows + row) * kDepth;
        const T* next = k + kDepth < e.D ? a + rows * kDepth : nullptr;
        block_product<T>(block, int(slices), least(kDepth, e.D - k), a, weight + k * kSlice,
                         d * kSlice, p, wide, k > 0, next);
      }
      if (e.D == 0) memset(p, 0, block * wide * sizeof(float));
      for (int64_t r = 0; r < least(block, task.rows - row); ++r)
        keep(task, strip, row + r, p + r * wide);
      if (task.above && task.above->spans) settle(*task.above);
    }
  }
}

inline void encode(const EncodeTask& task, Scratch& s) {
  if (task.encoder->dtype == DType::kBFloat16)
    encode_rows<Narrow>(task, s);
  else
    encode_rows<float>(task, s);
}

inline Compute compute(DType storage) {
  if (storage == DType::kBFloat16) return {sizeof(Narrow), kBlockRows<Narrow>};
  return {sizeof(float), kBlockRows<float>};
}

}  // namespace gemma_ext::sae::GEMMA_EXT_ISA
