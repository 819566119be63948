// SPDX-License-Identifier: Apache-2.0
// Backward of a divergence as a chain of launches: the strips it keeps, of both heads once more, and on as the
// loss's. Part of backward.cu, whose kernels it launches too.
#pragma once

#include "divergence_gradients.cuh"
#include "lists.cuh"

namespace gemma_ext::cce::cuda {
namespace {

struct PairBackwardMemory {
  Plan plan;
  PairLogs* logs;
  DeSums sums{};

  PairBackwardMemory(Arena& memory, const DivergenceBackward& b, int64_t strip_bytes)
      : plan(memory, b.heads.student, strip_bytes, b.out.de != nullptr, 0),
        logs(memory.take<PairLogs>(b.heads.student.N)) {
    const Head& h = b.heads.student;
    sums.whole = memory.take<float>(b.out.de ? h.N * h.D : 0);
  }
};

}  // namespace

int64_t workspace(const DivergenceBackward& b, const Memory& memory) {
  Arena arena(nullptr);
  PairBackwardMemory all(arena, b, memory.strip_bytes);
  return arena.bytes();
}

Status run(const DivergenceBackward& b, const Memory& memory, Stream stream) {
  Arena arena(memory.workspace);
  const PairBackwardMemory m(arena, b, memory.strip_bytes);
  const Head& h = b.heads.student;
  const Plan& plan = m.plan;
  Launches launches(stream);
  gather_rows(launches, h, plan.rows);
  launches.add(pair_coefficients_kernel, ceil_div(h.N, kPlanThreads), kPlanThreads, 0,
               {plan.rows, plan.row, m.logs, b.rows, b.d_divergence, b.d_nll, b.d_lse});
  launches.add(unit_kernel, 1, kPlanThreads, kUnitSharedBytes,
               {plan.rows, plan.row, plan.unit, {}, nullptr});
  const PlanParams planning{h, plan, false, b.masses, true, b.summary, b.seed, 0};
  by_dtype(h.dtype, [&](auto type) {
    using T = decltype(type);
    if (b.out.de) {
      launches.add(clear_kernel<T>, ceil_div(h.N * h.D, 2 * kPlanThreads), kPlanThreads, 0,
                   {b.out.de, h.N * h.D});
    }
    add_drawn<T, false>(launches, planning, m.sums, b.out, [&](const PlanParams& p, int64_t grid) {
      launches.add(pair_gradient_kernel<T>, grid, mma::kThreads, kPairSharedBytes<T>,
                   {p, b.heads, m.logs});
    });
  });
  return launches.status();
}

}  // namespace gemma_ext::cce::cuda
