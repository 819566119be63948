// SPDX-License-Identifier: Apache-2.0
#include "combine.cuh"
#include "forward_sm90.cuh"

namespace gemma_ext::cce::cuda {
namespace {

struct ForwardMemory {
  Rows rows;
  StripPlanes strips{};
  float* target;
  double* tallies;
  void *e = nullptr, *ordered = nullptr;  // copies of rows, for wgmma
  int tiles;
  int64_t blocks;

  ForwardMemory(Arena& memory, const Forward& f, int64_t copy_bytes)
      : rows(memory, f.head),
        target(memory.take<float>(f.head.N)),
        tiles(static_cast<int>(tiles_of(f.head.V))),
        blocks(ceil_div(f.head.N, kCombineRows)) {
    const int64_t plane = f.head.N * tiles;
    float* planes = f.stats ? f.stats : memory.take<float>((f.out.mean ? 4 : 3) * plane);
    strips.max = planes;
    strips.sum = planes + plane;
    strips.slope = planes + 2 * plane;
    if (f.out.mean) strips.weighted = planes + 3 * plane;
    if (f.out.class_sum) strips.class_sum = memory.take<float>(plane);
    if (f.out.argmax) strips.argmax = memory.take<int>(plane);
    if (by_wgmma(f.head)) {
      e = memory.take<uint16_t>(f.head.N * f.head.D);
      if (f.head.order) {
        const int64_t columns = int64_t{ordered_tiles(f.head, copy_bytes)} * kTile;
        ordered = memory.take<uint16_t>(columns * (f.head.D + 2));  // and the bias
      }
    }
    tallies = memory.take<double>(blocks * kValues);
  }
};

}  // namespace

int64_t workspace(const Forward& f, const Memory& memory) {
  Arena arena(nullptr);
  ForwardMemory all(arena, f, memory.copy_bytes);
  return arena.bytes();
}

Status run(const Forward& f, const Memory& memory, Stream stream) {
  return forward(f, memory, {}, stream);
}

Status forward(const Forward& f, const Memory& memory, const KeptStrips& kept, Stream stream) {
  Arena arena(memory.workspace);
  const ForwardMemory m(arena, f, memory.copy_bytes);
  const Head& h = f.head;
  Launches launches(stream);
  gather_rows(launches, h, m.rows);

  const int row_blocks = static_cast<int>(ceil_div(h.N, kBlockRows));
  const StripParams strips{h, m.rows, m.strips, m.target, m.tiles, row_blocks};
  by_dtype(h.dtype, [&](auto type) {
    using T = decltype(type);
    if constexpr (!std::is_same_v<T, float>) {
      if (by_wgmma(h))
        return add_strips_wgmma<T>(launches, strips, kept, m.e, m.ordered, memory.copy_bytes);
    }
    launches.add(strip_stats_kernel<T>, int64_t{row_blocks} * m.tiles, mma::kThreads,
                 kHeadSharedBytes<T>, strips);
  });

  const CombineParams rows{m.rows, m.strips, m.target, f.out, h.N, m.tiles};
  launches.add(clear_rows_kernel, ceil_div(h.N, kCombineThreads), kCombineThreads, 0, rows);
  launches.add(combine_kernel, m.blocks, kCombineThreads, sizeof(CombineShared), rows);

  const TallyParams tally{m.rows,    m.strips,  f.out,
                          m.tallies, f.summary, f.eps,
                          h.N,       m.tiles,   static_cast<int>(m.blocks)};
  if (f.stats && f.eps != 0) {
    launches.add(tally_kernel, m.blocks, kCombineThreads, sizeof(TallyShared), tally);
    launches.add(report_kernel, 1, kReportThreads, kValues * simt::kWarpSize * sizeof(double),
                 tally);
  } else {
    launches.add(keep_all_kernel, 1, simt::kWarpSize, 0, tally);
  }
  return launches.status();
}

const char* status_text(Status status) {
  return simt::status_text(static_cast<simt::Status>(status));
}

}  // namespace gemma_ext::cce::cuda
