// SPDX-License-Identifier: Apache-2.0
// The backward as a chain of launches, and the fused step: a forward, then the backward with every strip
// kept. Where all strips fit the workspace, the forward leaves them there: three products instead of four.
#include <algorithm>

#include "dense_sm90.cuh"
#include "gradients.cuh"

namespace gemma_ext::cce::cuda {
namespace {

// Whether exact gradients go by wgmma.
bool is_dense(const Head& h) { return by_wgmma(h) && !h.order; }

struct BackwardMemory {
  Plan plan;
  void *mean, *e;
  float *profile, *push, *de_sum;

  BackwardMemory(Arena& memory, const Backward& b, int64_t strip_bytes)
      : plan(memory, b.head, strip_bytes, b.out.de != nullptr,
             is_dense(b.head) ? DenseChunk(b.head, strip_bytes).bytes : 0) {
    const Head& h = b.head;
    const int64_t size = size_of(h.dtype), tiles = plan.tiles;
    const bool filtered = b.summary != nullptr;
    mean = memory.take<char>(filtered && b.out.de ? tiles * h.D * size : 0);
    profile = memory.take<float>(filtered ? tiles * kTile : 0);
    push = memory.take<float>(filtered && b.out.dc ? tiles * h.D : 0);
    de_sum = memory.take<float>(b.out.de ? h.N * h.D : 0);
    e = memory.take<char>(is_dense(h) ? h.N * h.D * size : 0);
  }
};

// Where the forward's summary says on the device what is kept, both this and the dense kernels are
// launched, and one of them leaves at once.
template <class T>
void add_lists(Launches& launches, const BackwardMemory& m, const Backward& b) {
  constexpr int kTileShared = mma::Tile<T>::kSharedBytes;
  const Head& h = b.head;
  const Plan& plan = m.plan;
  const int64_t tiles = plan.tiles, column_blocks = ceil_div(h.D, mma::kSide);
  const int64_t row_blocks = ceil_div(h.N, kBlockRows);
  const bool filtered = b.summary != nullptr, exact_elsewhere = is_dense(h);
  const PlanParams planning{h, plan, exact_elsewhere, b.stats, b.summary};
  launches.add(keep_kernel<T>, tiles * ceil_div(h.N, kPlanThreads), kPlanThreads, 0, planning);
  launches.add(count_kernel<T>, tiles, simt::kWarpSize, 0, planning);
  launches.add(chunk_kernel, 1, kPlanThreads, kPlanThreads * 4, planning);

  GradientParams p{h,
                   plan,
                   b.summary,
                   b.prob,
                   m.profile,
                   m.mean,
                   m.push,
                   m.de_sum,
                   b.out,
                   exact_elsewhere,
                   static_cast<int>(column_blocks),
                   0};
  if (filtered) launches.add(profile_kernel, tiles, kTile, kTile * 4, p);
  if (filtered && b.out.dc) {
    launches.add(push_kernel<T>, ceil_div(tiles, mma::kSide) * column_blocks, mma::kThreads,
                 kTileShared, p);
  }
  if (filtered && b.out.de) launches.add(tile_mean_kernel<T>, tiles, kPlanThreads, 0, p);
  for (int chunk = 0; chunk < plan.chunks; ++chunk) {
    p.chunk = chunk;
    launches.add(list_kernel, tiles, kPlanThreads, 0, {plan, chunk});
    const int64_t halves = 2 * tiles * row_blocks;  // at most
    launches.add(strip_gradient_kernel<T>, taking_turns(halves), mma::kThreads,
                 kStripSharedBytes<T>, {h, plan, chunk});
    if (b.out.dc) {
      launches.add(dc_kernel<T>, taking_turns(2 * tiles * column_blocks), mma::kThreads,
                   kTileShared, p);
    }
    if (b.out.dbias) {
      launches.add(dbias_kernel<T>, tiles * kSumParts, kSumThreads, kSumSharedBytes, p);
    }
    if (b.out.de) {
      launches.add(block_tiles_kernel, row_blocks, kPlanThreads, sizeof(int) * 8, p);
      launches.add(de_kernel<T>, row_blocks * column_blocks, mma::kThreads, kTileShared, p);
    }
    for (int slice = 0; chunk < plan.sparse_chunks && slice * kSlice < h.D; ++slice) {
      const SliceParams slices{h, plan, m.de_sum, chunk, slice};
      launches.add(parts_kernel<T>, taking_turns(halves), mma::kThreads, kTileShared, slices);
      launches.add(add_parts_kernel, h.N, kPlanThreads, sizeof(RowSlots), slices);
    }
  }
  if (b.out.de) {
    launches.add(finish_de_kernel<T>, row_blocks * column_blocks, mma::kThreads, kTileShared, p);
  }
}

// kept_max: of a forward that left its strips in the plan's memory, or null.
void add_backward(Launches& launches, const BackwardMemory& m, const Backward& b,
                  int64_t strip_bytes, const float* lse2_coef, const float* kept_max) {
  const Head& h = b.head;
  const Plan& plan = m.plan;
  gather_rows(launches, h, plan.rows);
  add_coefficients(launches, h.N, {plan.rows, plan.row, plan.unit, b.up, lse2_coef});
  by_dtype(h.dtype, [&](auto type) {
    using T = decltype(type);
    if (b.out.de) {
      launches.add(clear_kernel<T>, ceil_div(h.N * h.D, 2 * kPlanThreads), kPlanThreads, 0,
                   {b.out.de, h.N * h.D});
    }
    if (b.summary || !is_dense(h)) add_lists<T>(launches, m, b);
    if constexpr (!std::is_same_v<T, float>) {
      if (!is_dense(h)) return;
      Dense dense(gather_e<T>(launches, h, plan.rows, m.e));
      dense.row = plan.row;
      dense.unit = plan.unit;
      dense.strips = plan.strips;
      dense.de_sum = m.de_sum;
      dense.out = b.out;
      dense.summary = b.summary;
      dense.max = kept_max;
      add_dense<T>(launches, dense, b.up.d_mean || b.up.d_class, strip_bytes);
    }
  });
}

struct LossParams {
  Rows rows;
  const float *nll, *lse, *nll_coef, *lse2_coef;
  float* loss;
};

// One block.
KERNEL void loss_kernel(LossParams p) {
  double* s_sum = simt::shared<double>();
  const int t = simt::thread_idx();
  double sum = 0;
  for (int r = t; r < *p.rows.count; r += kPlanThreads) {
    const int row = p.rows.row[r];
    const double lse = p.lse[row];
    sum += static_cast<double>(p.nll_coef[row]) * p.nll[row] + p.lse2_coef[row] * lse * lse;
  }
  s_sum[t] = sum;
  simt::sync_block();
  if (t != 0) return;
  for (int i = 1; i < kPlanThreads; ++i) sum += s_sum[i];
  *p.loss = static_cast<float>(sum);
}

Forward forward_of(const Fused& f) {
  Forward r{};
  r.head = f.head;
  r.out.nll = f.nll;
  r.out.lse = f.lse;
  return r;
}

bool wants_any(const Gradients& out) { return out.de || out.dc || out.dbias; }

Backward backward_of(const Fused& f) {
  Backward r{};
  r.head = f.head;
  r.up.nll = f.nll;
  r.up.lse = f.lse;
  r.up.d_nll = f.nll_coef;
  r.out = f.out;
  return r;
}

struct FusedMemory {
  double* summary;
  Arena shared;  // by forward and backward, unless strips are kept
  BackwardMemory backward;
  Forward forward;
  Memory of_forward;
  KeptStrips kept;  // all strips

  FusedMemory(Arena& memory, const Fused& f, int64_t strip_bytes)
      : summary(memory.take<double>(4)),
        shared(memory),
        backward(memory, backward_of(f), strip_bytes),
        forward(forward_of(f)),
        of_forward{} {
    const Head& h = f.head;
    forward.summary = summary;
    if (is_dense(h) && wants_any(f.out)) {
      const DenseChunk chunk(h, strip_bytes);
      if (chunk.tiles == backward.plan.tiles) kept = {backward.plan.strips, chunk.stride};
    }
    const bool keep = kept.rows > 0;
    if (keep) forward.stats = memory.take<float>(3 * h.N * backward.plan.tiles);
    of_forward.workspace = (keep ? memory : shared).take<char>(workspace(forward, of_forward));
    memory.cover(shared);
  }
};

}  // namespace

int64_t workspace(const Backward& b, const Memory& memory) {
  Arena arena(nullptr);
  BackwardMemory all(arena, b, memory.strip_bytes);
  return arena.bytes();
}

Status run(const Backward& b, const Memory& memory, Stream stream) {
  Arena arena(memory.workspace);
  const BackwardMemory m(arena, b, memory.strip_bytes);
  Launches launches(stream);
  add_backward(launches, m, b, memory.strip_bytes, nullptr, nullptr);
  return launches.status();
}

int64_t workspace(const Fused& f, const Memory& memory) {
  Arena arena(nullptr);
  FusedMemory all(arena, f, memory.strip_bytes);
  return arena.bytes();
}

Status run(const Fused& f, const Memory& memory, Stream stream) {
  Arena arena(memory.workspace);
  const FusedMemory m(arena, f, memory.strip_bytes);
  const Status status = forward(m.forward, m.of_forward, m.kept, stream);
  if (status != Status{}) return status;

  Launches launches(stream);
  const Rows& rows = m.backward.plan.rows;
  if (wants_any(f.out)) {
    add_backward(launches, m.backward, backward_of(f), memory.strip_bytes, f.lse2_coef,
                 m.kept.rows ? m.forward.stats : nullptr);
  } else {
    gather_rows(launches, f.head, rows);
  }
  launches.add(loss_kernel, 1, kPlanThreads, kPlanThreads * sizeof(double),
               {rows, f.nll, f.lse, f.nll_coef, f.lse2_coef, f.loss});
  return launches.status();
}

}  // namespace gemma_ext::cce::cuda
