// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <optional>

#include "combine.cuh"
#include "divergence_forward.cuh"
#include "sm90/forward.cuh"

namespace gemma_ext::cce::cuda {
namespace {

struct ForwardMemory {
  Rows rows;
  StripPlanes strips{};
  float* target;
  double* tallies;
  void* e;  // a copy of the valid rows, for wgmma
  int tiles, part_tiles;
  int64_t blocks;
  RowState* state{};
  Remembered remembered{};

  ForwardMemory(Arena& memory, const Forward& f, int64_t plane_bytes)
      : rows(memory, f.head),
        target(memory.take<float>(f.head.N)),
        e(memory.take<uint16_t>(by_wgmma(f.head) ? f.head.N * f.head.D : 0)),
        tiles(static_cast<int>(tiles_of(f.head.V))),
        part_tiles(f.lean ? lean_part(f, plane_bytes) : tiles),
        blocks(ceil_div(f.head.N, kCombineRows)) {
    const int64_t plane = f.head.N * part_tiles;
    strips.max = memory.take<float>(plane);
    strips.sum = memory.take<float>(plane);
    if (f.masses) {
      strips.slope = f.lean ? memory.take<float>(plane) : static_cast<float*>(f.masses);
    }
    if (f.masses || f.out.log_squares) strips.square = memory.take<float>(plane);
    if (f.out.mean) strips.weighted = memory.take<float>(plane);
    if (f.out.class_sum) strips.class_sum = memory.take<float>(plane);
    if (f.out.argmax) strips.argmax = memory.take<int>(plane);
    if (f.out.average) strips.total = memory.take<float>(plane);
    tallies = memory.take<double>(f.masses ? blocks * kValues : 0);
    if (!f.lean) return;
    state = memory.take<RowState>(f.head.N);
    if (!f.masses) return;
    remembered.top = memory.take<float>(ceil_div(tiles, part_tiles) * f.head.N);
    remembered.spread = memory.take<simt::bf16>(tiles * f.head.N);
  }

  // Tiles of a part.
  static int lean_part(const Forward& f, int64_t plane_bytes) {
    const bool moments = f.out.average;
    const int64_t planes = 2 + (f.masses != nullptr) + (f.masses || moments) + moments +
                           (f.out.mean != nullptr) + (f.out.class_sum != nullptr) +
                           (f.out.argmax != nullptr);
    const int64_t row = planes * static_cast<int64_t>(sizeof(float));
    return static_cast<int>(std::clamp<int64_t>(
        plane_bytes / (row * std::max<int64_t>(f.head.N, 1)), 1, tiles_of(f.head.V)));
  }
};

// Above this share of strips the exact form costs less. On Hopper its products run by wgmma, twice as fast
// as the lists', and it sums dE without parts; elsewhere both run by mma.sync and the lists only lose what
// fills their last 128 rows.
double break_even(const Head& h) { return by_wgmma(h) ? kListedShare : 0.6; }

}  // namespace

int64_t workspace(const Forward& f, const Memory& memory) {
  Arena arena(nullptr);
  ForwardMemory all(arena, f, memory.plane_bytes);
  return arena.bytes();
}

Status run(const Forward& f, const Memory& memory, Stream stream) {
  return forward(f, memory, {}, stream);
}

Status forward(const Forward& f, const Memory& memory, const KeptStrips& kept, Stream stream) {
  Arena arena(memory.workspace);
  ForwardMemory m(arena, f, memory.plane_bytes);
  const Head& h = f.head;
  Launches launches(stream);
  gather_rows(launches, h, m.rows);
  if (kept.strips) {
    m.strips.max = kept.max;
    m.target = kept.target;
  }

  const int row_blocks = static_cast<int>(ceil_div(h.N, kBlockRows));
  const bool draws = f.masses && f.eps != 0;
  CombineParams rows{m.rows, m.strips, m.target, h.class_weight, f.out, h.N,
                     h.V,    0,        m.state,  false,          false};
  by_dtype(h.dtype, [&](auto type) {
    using T = decltype(type);
    StripParams strips{h, m.rows, m.strips, m.target, 0, row_blocks, 0};
    const auto add_strips = [&](const HeadTma* tma) {
      if constexpr (!std::is_same_v<T, float>) {
        if (tma) {
          const StripTmaParams p{strips, *tma, kept.strips, static_cast<int>(kept.rows)};
          const Sums sums = sums_of(m.strips);
          const auto kernel = kept.strips            ? keep_strips_wgmma_kernel<T>
                              : sums == Sums::kPlain ? strip_stats_wgmma_kernel<T, Sums::kPlain>
                              : sums == Sums::kDrawn ? strip_stats_wgmma_kernel<T, Sums::kDrawn>
                                                     : strip_stats_wgmma_kernel<T, Sums::kAll>;
          return add_wgmma(launches, kernel, ceil_div(h.N, kPairRows) * strips.tiles, p);
        }
      }
      launches.add(strip_stats_kernel<T>, int64_t{row_blocks} * strips.tiles, mma::kThreads,
                   kHeadSharedBytes<T>, strips);
    };
    std::optional<HeadTma> tma;
    if constexpr (!std::is_same_v<T, float>) {
      if (by_wgmma(h)) tma = gather_e<T>(launches, h, m.rows, m.e);
    }
    for (int tile = 0; tile < m.tiles; tile += m.part_tiles) {
      strips.first_tile = tile;
      strips.tiles = rows.tiles = std::min(m.part_tiles, m.tiles - tile);
      rows.first = tile == 0;
      rows.last = tile + strips.tiles == m.tiles;
      add_strips(tma ? &*tma : nullptr);
      if (rows.first) {
        launches.add(clear_rows_kernel, ceil_div(h.N, kCombineThreads), kCombineThreads, 0, rows);
      }
      launches.add(combine_kernel, m.blocks, kCombineThreads, sizeof(CombineShared), rows);
      if (!draws || !f.lean) continue;
      launches.add(remember_kernel, strips.tiles * ceil_div(h.N, kRememberThreads),
                   kRememberThreads, 0,
                   {m.rows, m.strips, m.state, m.remembered, static_cast<simt::bf16*>(f.masses),
                    f.out.mean != nullptr, h.N, m.tiles, tile / m.part_tiles, tile});
    }
  });

  const MassParams masses{m.rows,
                          m.strips,
                          f.out,
                          f.masses,
                          m.tallies,
                          f.summary,
                          f.eps,
                          break_even(h),
                          h.N,
                          m.tiles,
                          static_cast<int>(m.blocks),
                          m.remembered,
                          m.part_tiles};
  if (draws) {
    launches.add(f.lean ? mass_kernel<simt::bf16> : mass_kernel<float>, m.blocks, kCombineThreads,
                 sizeof(MassShared), masses);
    launches.add(report_kernel, 1, kReportThreads, kValues * simt::kWarpSize * sizeof(double),
                 masses);
  } else {
    launches.add(keep_all_kernel, 1, simt::kWarpSize, 0, masses);
  }
  return launches.status();
}

const char* status_text(Status status) {
  return simt::status_text(static_cast<simt::Status>(status));
}

}  // namespace gemma_ext::cce::cuda
