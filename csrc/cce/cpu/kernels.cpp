// SPDX-License-Identifier: Apache-2.0
// Cut cross-entropy on the CPU, tile by tile: everything that runs inside a task.
//   s[n, v] = softcap(scale e_n . c_v + bias_v) / T
//   lse[n]  = log sum_v exp(s),   G = dloss/d(e.c),   dE = scale G C,   dC = scale G^T E
// The logits of a tile live in one worker's L2 as strips of 256 columns, never as an N x V matrix.
// Compiled once per instruction set; the namespace is the set's name.
#include "divergence_kernels.h"
#include "epilogue.h"

namespace gemma_ext::cce::GEMMA_EXT_ISA {
namespace {

int64_t strip_argmax(const Tile& tile, const float* s, float top) {
  for (int i = 0; i < tile.valid; ++i)
    if (s[i] == top) return tile.first + i;
  return -1;
}

void record(const Problem& p, const StripStats& out, const Tile& tile, int64_t index, int64_t row,
            const float* weights, float* s) {
  const int64_t at = index * p.n + row;
  const int target = target_in(p, tile, row);
  const StripSums sums = strip_sums(p.map, p.want_mean, target, s);
  out.max[at] = sums.max;
  out.sum[at] = sums.sum;
  if (out.slope) out.slope[at] = sums.slope;
  if (out.square) out.square[at] = sums.square;
  if (out.total) out.total[at] = strip_total(tile.valid, s);
  if (p.want_mean) out.weighted[at] = sums.weighted;
  if (p.class_weight) {
    float total = 0;
    for (int i = 0; i < tile.valid; ++i) total += weights[i] * s[i];
    out.class_sum[at] = total;
  }
  if (p.want_argmax) out.argmax[at] = strip_argmax(tile, s, sums.max);
  if (target >= 0) out.target[row] = s[target];
}

// The rows of several vocabulary tiles share their loads of e, but where the products are so fast that
// packed C must stay in L2: 1.2 MB each at D 2304.
template <class T>
constexpr int64_t kTilesAtOnce = kTiled<T> ? 1 : kForwardTiles;

template <class T>
void forward_rows(const Problem& p, const StripStats& out, int64_t tile0, int64_t tile1,
                  int64_t row0, int64_t row1, Scratch& s) {
  const TileRegisters<T> registers;
  const int64_t tiles = tile1 - tile0;
  const T* packed = pack_tiles<T>(p, tile0, tile1, kPacked, s);
  float* bias = scratch<float>(s, kSmall, 2 * tiles * kTile);
  float* weights = bias + tiles * kTile;
  for (int64_t t = 0; t < tiles; ++t) {
    gather(tile_at(p, tile0 + t), p.bias, bias + t * kTile);
    gather(tile_at(p, tile0 + t), p.class_weight, weights + t * kTile);
  }
  for (int64_t row = row0; row < row1; row += kBlockRows<T>) {
    const int64_t rows = least(kBlockRows<T>, row1 - row);
    float* strips =
        products<T>(p, packed, tiles, rows, [&](int64_t r) { return row + r; }, kStrips, s);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t t = 0; t < tiles; ++t) {
        float* x = strips + (r * tiles + t) * kTile;
        const Tile tile = tile_at(p, tile0 + t);
        strip_logits(p.map, bias + t * kTile, tile.valid, x);
        record(p, out, tile, tile0 + t, row + r, weights + t * kTile, x);
      }
  }
}

// Recompute the kept strips of a tile, turn them into gradients, finish the tile's dC and dbias.
template <class T, class S>
void grad_rows(const GradTask& task, int64_t index, Scratch& s) {
  const TileRegisters<T> registers;
  const Problem& p = *task.problem;
  const RowCoefficients& coef = task.coef;
  const Tile tile = tile_at(p, index);
  const int32_t* list = task.list + task.begin[index];
  const int64_t kept = task.begin[index + 1] - task.begin[index];
  const bool want_dc = task.dc || task.dc_sum;
  S* slots = static_cast<S*>(task.strips) + (task.begin[index] - task.slot0) * kTile;
  float* bias = scratch<float>(s, kSmall, 3 * kTile);
  float *weights = bias + kTile, *bias_sums = weights + kTile;
  gather(tile, p.bias, bias);
  gather(tile, p.class_weight, weights);
  memset(bias_sums, 0, kTile * sizeof(float));
  const T* packed = kept ? pack_tiles<T>(p, index, index + 1, kPacked, s) : nullptr;
  for (int64_t first = 0; first < kept; first += kBlockRows<T>) {
    const int64_t rows = least(kBlockRows<T>, kept - first);
    float* strips =
        products<T>(p, packed, 1, rows, [&](int64_t r) { return list[first + r]; }, kStrips, s);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t row = list[first + r];
      float* g = strips + r * kTile;
      strip_logits(p.map, bias, tile.valid, g);
      const float weight = task.weight[task.begin[index] + first + r];
      const StripCoefficients c{coef.lse[row],
                                coef.lse_low[row],
                                coef.a[row] * weight,
                                coef.at_label[row],
                                coef.mean ? coef.mean[row] : 0.0f,
                                coef.q ? coef.q[row] * weight : 0.0f,
                                coef.class_coef ? coef.class_coef[row] : 0.0f};
      strip_gradient(p.map, c, weights, target_in(p, tile, row), g);
      keep_strip(g, p.map.scale, bias_sums, slots + (first + r) * kTile);
    }
  }
  if (want_dc) write_dc<T>(task, index, slots, kept, [&](int64_t k) { return list[k]; }, s);
  if (task.dbias) write_dbias(task, index, bias_sums);
}

// dE[kept rows, 128 columns] += G C for the tiles of one batch.
template <class T, class S>
void grad_block(const GradTask& task, int64_t tile0, int64_t tile1, int64_t column, float* de,
                Scratch& s) {
  const TileRegisters<T> registers;
  const Problem& p = *task.problem;
  float* sums = scratch<float>(s, kSums, kBlockRows<T> * kColumns);
  // with every row kept, their 128 x 4 B of sums stay in L2 while the tiles pass; fast products must
  // not pack C once per 512 of them
  const int64_t span = task.list ? p.n : kTiled<T> ? 2048 : 512;
  for (int64_t row0 = 0; row0 < p.n; row0 += span)
    for (int64_t index = tile0; index < tile1; ++index) {
      const int64_t begin = task.begin[index];
      const int64_t last = least(task.begin[index + 1] - begin, row0 + span);
      if (last <= row0) continue;
      const Tile tile = tile_at(p, index);
      const T* b = pack_block<T>(
          p.c, column, kTile, [&](int64_t v) { return v < tile.valid ? tile.first + v : -1; }, s);
      const S* g = static_cast<const S*>(task.strips) + (begin - task.slot0) * kTile;
      for (int64_t first = row0; first < last; first += kBlockRows<T>) {
        const int64_t rows = least(kBlockRows<T>, last - first);
        const T* a = widen_strips<T>(g + first * kTile, rows, s);
        // in place where the strips' own rounding hides that of one sum over all of V
        if (!task.list && sizeof(S) == 2) {
          const T* next = sizeof(T) == sizeof(S) ? a + rows * kTile : nullptr;
          block_product<T>(rows, kColumns / kSlice, kTile, a, b, kSlice * kTile,
                           de + first * kColumns, kColumns, true, next);
          continue;
        }
        block_product<T>(rows, kColumns / kSlice, kTile, a, b, kSlice * kTile, sums, kColumns,
                         false);
        for (int64_t r = 0; r < rows; ++r) {
          const int64_t row = task.list ? task.list[begin + first + r] : first + r;
          float* to = de + row * kColumns;
          for (int i = 0; i < kColumns; i += kLanes)
            store(to + i, load(to + i) + load(sums + r * kColumns + i));
        }
      }
    }
}

// First half of the three-product form: strips hold exp(s - max) ds/da before lse is known.
template <class T, class S>
void fused_rows(const Problem& p, const StripStats& out, void* all, int64_t tile0, int64_t tile1,
                Scratch& s) {
  const TileRegisters<T> registers;
  const int64_t tiles = tile1 - tile0;
  const T* packed = pack_tiles<T>(p, tile0, tile1, kPacked, s);
  float* bias = scratch<float>(s, kSmall, tiles * kTile);
  for (int64_t t = 0; t < tiles; ++t) gather(tile_at(p, tile0 + t), p.bias, bias + t * kTile);
  for (int64_t row = 0; row < p.n; row += kBlockRows<T>) {
    const int64_t rows = least(kBlockRows<T>, p.n - row);
    float* strips =
        products<T>(p, packed, tiles, rows, [&](int64_t r) { return row + r; }, kStrips, s);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t t = 0; t < tiles; ++t) {
        float* x = strips + (r * tiles + t) * kTile;
        const Tile tile = tile_at(p, tile0 + t);
        const int64_t at = (tile0 + t) * p.n + row + r;
        strip_logits(p.map, bias + t * kTile, tile.valid, x);
        record(p, out, tile, tile0 + t, row + r, nullptr, x);
        const float base = out.max[at] == -kInfinity ? 0.0f : out.max[at];
        S* slot = static_cast<S*>(all) + at * kTile;
        for (int i = 0; i < kTile; i += kLanes) {
          const Vf v = load(x + i), u = v * p.map.t_over_cap, e = exp(v - base);
          store(slot + i, e > 0.0f || e != e ? e * (1.0f - u * u) * p.map.inv_t : Vf{});
        }
      }
  }
}

// Second half: lse is known, so scale the strips to G in place, then dC and dbias of the tile.
template <class T, class S>
void fused_grad_rows(const GradTask& task, const StripStats& stats, int64_t index, Scratch& s) {
  const TileRegisters<T> registers;
  const Problem& p = *task.problem;
  const RowCoefficients& coef = task.coef;
  const Tile tile = tile_at(p, index);
  const bool want_dc = task.dc || task.dc_sum;
  S* slots = static_cast<S*>(task.strips) + index * p.n * kTile;
  float* bias_sums = scratch<float>(s, kSmall, kTile);
  memset(bias_sums, 0, kTile * sizeof(float));
  const float inv_scale = 1.0f / p.map.scale;
  for (int64_t row = 0; row < p.n; ++row) {
    S* slot = slots + row * kTile;
    const float top = stats.max[index * p.n + row], base = top == -kInfinity ? 0.0f : top;
    const Vf factor =
        exp(set1((base - coef.lse[row]) - coef.lse_low[row])) * coef.a[row] * p.map.scale;
    const int target = target_in(p, tile, row);
    for (int i = 0; i < kTile; i += kLanes) store(slot + i, load(slot + i) * factor);
    if (target >= 0) {
      const float t = stats.target[row] * p.map.t_over_cap;
      put(slot + target, coef.at_label[row] * (1.0f - t * t) * p.map.inv_t * p.map.scale);
    }
    if (task.dbias)
      for (int i = 0; i < kTile; i += kLanes)
        store(bias_sums + i, load(bias_sums + i) + load(slot + i) * inv_scale);
  }
  if (want_dc) write_dc<T>(task, index, slots, p.n, [](int64_t k) { return k; }, s);
  if (task.dbias) write_dbias(task, index, bias_sums);
}

// What bfloat16 is multiplied in; strips are kept as strip_type says.
#if defined(__AVX512BF16__) || defined(GEMMA_EXT_TILES)
using Narrow = bf16;
#else
using Narrow = float;
#endif
#define GEMMA_EXT_COMPUTE(storage, call) \
  ((storage) == DType::kBFloat16 ? (call<Narrow>) : (call<float>))
#define GEMMA_EXT_STRIPS(storage, call) \
  ((storage) == DType::kBFloat16 ? (call<Narrow, bf16>) : (call<float, float>))

}  // namespace

extern const Kernels kKernels;
const Kernels kKernels = {
    [](const Problem& p, const StripStats& out, int64_t tile0, int64_t tile1, int64_t row0,
       int64_t row1, Scratch& s) {
      const int64_t step = GEMMA_EXT_COMPUTE(p.c.dtype, kTilesAtOnce);
      for (int64_t t = tile0; t < tile1; t += step)
        GEMMA_EXT_COMPUTE(p.c.dtype, forward_rows)(p, out, t, least(tile1, t + step), row0, row1,
                                                   s);
    },
    [](const GradTask& t, int64_t tile, Scratch& s) {
      GEMMA_EXT_STRIPS(t.problem->c.dtype, grad_rows)(t, tile, s);
    },
    [](const GradTask& t, int64_t tile0, int64_t tile1, int64_t column, float* de, Scratch& s) {
      GEMMA_EXT_STRIPS(t.problem->c.dtype, grad_block)(t, tile0, tile1, column, de, s);
    },
    [](const Problem& p, const StripStats& out, void* strips, int64_t tile0, int64_t tile1,
       Scratch& s) {
      const int64_t step = GEMMA_EXT_COMPUTE(p.c.dtype, kTilesAtOnce);
      for (int64_t t = tile0; t < tile1; t += step)
        GEMMA_EXT_STRIPS(p.c.dtype, fused_rows)(p, out, strips, t, least(tile1, t + step), s);
    },
    [](const GradTask& t, const StripStats& stats, int64_t tile, Scratch& s) {
      GEMMA_EXT_STRIPS(t.problem->c.dtype, fused_grad_rows)(t, stats, tile, s);
    },
    [](const ProblemPair& p, const PairStats& out, int64_t tile, int64_t row0, int64_t row1,
       Scratch& s) {
      (both_narrow(p) ? pair_rows<Narrow> : pair_rows<float>)(p, out, tile, row0, row1, s);
    },
    [](const ProblemPair& p, const MeanStats& out, int64_t tile, int64_t row0, int64_t row1,
       Scratch& s) {
      (both_narrow(p) ? mean_rows<Narrow> : mean_rows<float>)(p, out, tile, row0, row1, s);
    },
    [](const GradTask& t, const ProblemPair& p, const PairCoefficients& coef, int64_t tile,
       Scratch& s) {
      if (both_narrow(p))
        pair_grad_rows<Narrow, Narrow, bf16>(t, p, coef, tile, s);
      else
        (t.problem->c.dtype == DType::kBFloat16
             ? pair_grad_rows<float, Narrow, bf16>
             : pair_grad_rows<float, float, float>)(t, p, coef, tile, s);
    },
};

}  // namespace gemma_ext::cce::GEMMA_EXT_ISA
