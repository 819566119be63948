// SPDX-License-Identifier: Apache-2.0
// A row's heads: norm, rotation, one rounding.
#pragma once

#include "vectors.h"

namespace gemma_ext::depth_batching::GEMMA_EXT_ISA {
namespace {

// x [width], 0 up to whole vectors.
inline void norm_head(float* x, const float* weight, int64_t width, float eps, bool plus_one) {
  Vf squares{};
  for (int64_t d = 0; d < width; d += kLanes) {
    const Vf v = load(x + d);
    squares += v * v;
  }
  const float r = 1.0f / __builtin_sqrtf(tree_sum(squares) / float(width) + eps);
  for (int64_t d = 0; d < width; ++d) x[d] = x[d] * r * (plus_one ? weight[d] + 1.0f : weight[d]);
}

inline void rotate_head(float* x, const float* table, int64_t half) {
  for (int64_t i = 0; i < half; ++i) {
    const float a = x[i], b = x[i + half], cos = table[i], sin = table[half + i];
    x[i] = a * cos - b * sin;
    x[i + half] = b * cos + a * sin;
  }
}

void rope_write(const RopeWrite& c, int64_t row, Scratch& s) {
  const Pool& pool = c.pool;
  const int64_t width = pool.width, bytes = size_of(pool.type);
  const Places& p = c.places;
  char* out = static_cast<char*>(c.out) + row * c.q_heads * width * bytes;
  if (p.req[row] < 0) {
    memset(out, 0, c.q_heads * width * bytes);
    return;
  }
  const int32_t loop = p.loop[row], pos = p.pos[row];
  const int32_t page = p.block_tables[p.req[row] * p.max_pages + pos / kPage];
  float* x = floats_of(s, kHeadSlot, width);
  const int64_t setting = c.rope_of ? c.rope_of[loop] : 0;
  const float* table = c.rope ? c.rope + (setting * c.positions + pos) * 2 * c.half : nullptr;
  const auto turned = [&](const Rows& rows, int64_t head, const Norm& norm) {
    widen(row_of(rows, pool.type, row) + head * width * bytes, pool.type, width, x);
    if (norm.weight) norm_head(x, norm.weight + loop * norm.stride, width, c.eps, c.plus_one);
    if (table) rotate_head(x, table, c.half);
  };
  for (int64_t head = 0; head < c.q_heads; ++head) {
    turned(c.q, head, c.q_norm);
    store_row(out + head * width * bytes, pool.type, x, width);
  }
  for (int64_t head = 0; head < pool.heads; ++head) {
    const auto token = [&](int64_t half) {
      const int64_t begin = page_at(pool, c.depth_of[loop], page, half, head);
      return static_cast<char*>(pool.data) + (begin + pos % kPage * width) * bytes;
    };
    turned(c.k, head, c.k_norm);
    store_row(token(0), pool.type, x, width);
    memcpy(token(1), row_of(c.v, pool.type, row) + head * width * bytes, width * bytes);
  }
  uint8_t* mark = c.marks ? c.marks + page * int64_t{kPage} + pos % kPage : nullptr;
  if (mark && *mark < loop + 1) *mark = uint8_t(loop + 1);
}

}  // namespace
}  // namespace gemma_ext::depth_batching::GEMMA_EXT_ISA
