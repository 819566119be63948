// SPDX-License-Identifier: Apache-2.0
#include "combine.cuh"
#include "sm90/forward.cuh"

namespace gemma_ext::cce::cuda {
namespace {

struct ForwardMemory {
  Rows rows;
  StripPlanes strips{};
  float* target;
  double* tallies;
  void* e;  // a copy of the valid rows, for wgmma
  int tiles;
  int64_t blocks;

  ForwardMemory(Arena& memory, const Forward& f)
      : rows(memory, f.head),
        target(memory.take<float>(f.head.N)),
        e(memory.take<uint16_t>(by_wgmma(f.head) ? f.head.N * f.head.D : 0)),
        tiles(static_cast<int>(tiles_of(f.head.V))),
        blocks(ceil_div(f.head.N, kCombineRows)) {
    const int64_t plane = f.head.N * tiles;
    strips.max = memory.take<float>(plane);
    strips.sum = memory.take<float>(plane);
    strips.slope = f.masses;
    if (f.masses) strips.square = memory.take<float>(plane);
    if (f.out.mean) strips.weighted = memory.take<float>(plane);
    if (f.out.class_sum) strips.class_sum = memory.take<float>(plane);
    if (f.out.argmax) strips.argmax = memory.take<int>(plane);
    tallies = memory.take<double>(f.masses ? blocks * kValues : 0);
  }
};

// Above this share of strips the exact form costs less. On Hopper its products run by wgmma, twice as fast
// as the lists', and it sums dE without parts; elsewhere both run by mma.sync and the lists only lose what
// fills their last 128 rows.
double break_even(const Head& h) { return by_wgmma(h) ? kListedShare : 0.6; }

}  // namespace

int64_t workspace(const Forward& f, const Memory&) {
  Arena arena(nullptr);
  ForwardMemory all(arena, f);
  return arena.bytes();
}

Status run(const Forward& f, const Memory& memory, Stream stream) {
  return forward(f, memory, {}, stream);
}

Status forward(const Forward& f, const Memory& memory, const KeptStrips& kept, Stream stream) {
  Arena arena(memory.workspace);
  ForwardMemory m(arena, f);
  const Head& h = f.head;
  Launches launches(stream);
  gather_rows(launches, h, m.rows);
  if (kept.strips) {
    m.strips.max = kept.max;
    m.target = kept.target;
  }

  const int row_blocks = static_cast<int>(ceil_div(h.N, kBlockRows));
  const StripParams strips{h, m.rows, m.strips, m.target, m.tiles, row_blocks};
  by_dtype(h.dtype, [&](auto type) {
    using T = decltype(type);
    if constexpr (!std::is_same_v<T, float>) {
      if (by_wgmma(h)) {
        const StripTmaParams p{strips, gather_e<T>(launches, h, m.rows, m.e), kept.strips,
                               static_cast<int>(kept.rows)};
        const Sums sums = sums_of(m.strips);
        const auto kernel = kept.strips            ? keep_strips_wgmma_kernel<T>
                            : sums == Sums::kPlain ? strip_stats_wgmma_kernel<T, Sums::kPlain>
                            : sums == Sums::kDrawn ? strip_stats_wgmma_kernel<T, Sums::kDrawn>
                                                   : strip_stats_wgmma_kernel<T, Sums::kAll>;
        return add_wgmma(launches, kernel, ceil_div(h.N, kPairRows) * m.tiles, p);
      }
    }
    launches.add(strip_stats_kernel<T>, int64_t{row_blocks} * m.tiles, mma::kThreads,
                 kHeadSharedBytes<T>, strips);
  });

  const CombineParams rows{m.rows, m.strips, m.target, h.class_weight, f.out, h.N, m.tiles};
  launches.add(clear_rows_kernel, ceil_div(h.N, kCombineThreads), kCombineThreads, 0, rows);
  launches.add(combine_kernel, m.blocks, kCombineThreads, sizeof(CombineShared), rows);

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
                          static_cast<int>(m.blocks)};
  if (f.masses && f.eps != 0) {
    launches.add(mass_kernel, m.blocks, kCombineThreads, sizeof(MassShared), masses);
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
