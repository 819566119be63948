// SPDX-License-Identifier: Apache-2.0
// Forward of a divergence as a chain of launches: one sweep over both heads for either KL, two for JSD and TVD.
// Part of forward.cu, whose kernels it launches too: a kernel lives in one translation unit.
#pragma once

#include "divergence_rows.cuh"

namespace gemma_ext::cce::cuda {
namespace {

// The exact form computes the same strips by the same kernels.
constexpr double kPairBreakEven = 0.9;

struct PairForwardMemory {
  Rows rows;
  int tiles, row_blocks;
  int64_t blocks;
  PairPlanes planes{};
  float *target, *teacher_target, *mean_size;
  double* tallies;

  PairForwardMemory(Arena& memory, const DivergenceForward& f)
      : rows(memory, f.heads.student),
        tiles(static_cast<int>(tiles_of(f.heads.student.V))),
        row_blocks(static_cast<int>(ceil_div(f.heads.student.N, kBlockRows))),
        blocks(ceil_div(f.heads.student.N, kCombineRows)),
        target(memory.take<float>(f.heads.student.N)),
        teacher_target(memory.take<float>(f.heads.student.N)),
        mean_size(memory.take<float>(1)),
        tallies(memory.take<double>(f.masses ? blocks * kValues : 0)) {
    const int64_t plane = f.heads.student.N * tiles;
    for (float** to : {&planes.max, &planes.sum, &planes.teacher_max, &planes.teacher_sum}) {
      *to = memory.take<float>(plane);
    }
    if (needs_lse(f.heads.kind)) {
      planes.value = memory.take<float>(plane);
      planes.mean = memory.take<float>(plane);
    } else {
      planes.cross = memory.take<float>(plane);
    }
    for (float*& moment : planes.moment) {
      if (f.masses) moment = memory.take<float>(plane);
    }
  }
};

// lse and nll of one of the two heads.
void add_combine(Launches& launches, const PairForwardMemory& m, float* max, float* sum,
                 const float* target, const RowOutputs& out, const Head& h) {
  StripPlanes planes{};
  planes.max = max;
  planes.sum = sum;
  const CombineParams p{m.rows, planes,  target,  nullptr, out, h.N,
                        h.V,    m.tiles, nullptr, true,    true};
  launches.add(combine_kernel, m.blocks, kCombineThreads, sizeof(CombineShared), p);
}

}  // namespace

int64_t workspace(const DivergenceForward& f, const Memory&) {
  Arena arena(nullptr);
  PairForwardMemory all(arena, f);
  return arena.bytes();
}

Status run(const DivergenceForward& f, const Memory& memory, Stream stream) {
  Arena arena(memory.workspace);
  const PairForwardMemory m(arena, f);
  const Head& h = f.heads.student;
  Launches launches(stream);
  gather_rows(launches, h, m.rows);
  const PairRowsParams rows{m.rows, f.heads.kind, m.planes, m.target,    m.teacher_target, f.out,
                            h.N,    m.tiles,      f.masses, m.mean_size, m.tallies,        f.eps};
  launches.add(clear_pair_rows_kernel, ceil_div(h.N, kCombineThreads), kCombineThreads, 0, rows);
  const PairParams pair{f.heads,          m.rows,  m.planes,     m.target,
                        m.teacher_target, m.tiles, m.row_blocks, f.out};
  by_dtype(h.dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t grid = int64_t{m.row_blocks} * m.tiles;
    launches.add(pair_sums_kernel<T>, grid, mma::kThreads, kHeadSharedBytes<T>, pair);
    RowOutputs mine{}, theirs{};
    mine.nll = f.out.nll;
    mine.lse = f.out.lse;
    mine.lse_low = f.out.lse_low;
    theirs.nll = f.out.teacher_nll;
    theirs.lse = f.out.teacher_lse;
    theirs.lse_low = f.out.teacher_low;
    add_combine(launches, m, m.planes.max, m.planes.sum, m.target, mine, h);
    add_combine(launches, m, m.planes.teacher_max, m.planes.teacher_sum, m.teacher_target, theirs,
                h);
    if (needs_lse(f.heads.kind)) {
      launches.add(pair_means_kernel<T>, grid, mma::kThreads, kMeansSharedBytes<T>, pair);
    }
  });
  launches.add(pair_rows_kernel, m.blocks, kCombineThreads, sizeof(PairRowShared), rows);

  const MassParams report{m.rows,
                          {},
                          {},
                          nullptr,
                          m.tallies,
                          f.summary,
                          f.eps,
                          kPairBreakEven,
                          h.N,
                          m.tiles,
                          static_cast<int>(m.blocks),
                          {},
                          m.tiles};
  if (!f.masses) {
    launches.add(keep_all_kernel, 1, simt::kWarpSize, 0, report);
    return launches.status();
  }
  launches.add(pair_shares_kernel, m.blocks, kCombineThreads, sizeof(PairRowShared), rows);
  launches.add(mean_size_kernel, 1, kCombineThreads, kCombineThreads * sizeof(double), rows);
  launches.add(pair_tally_kernel, m.blocks, kCombineThreads, sizeof(MassShared), rows);
  launches.add(report_kernel, 1, kReportThreads, kValues * simt::kWarpSize * sizeof(double),
               report);
  return launches.status();
}

}  // namespace gemma_ext::cce::cuda
