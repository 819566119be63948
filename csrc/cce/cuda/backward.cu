// SPDX-License-Identifier: Apache-2.0
// The backward as a chain of launches, and the fused step: a forward, then the backward with every strip
// kept. Where all strips fit the workspace, the forward leaves them there: three products instead of four.
#include <algorithm>

#include "divergence_backward.cuh"
#include "lists.cuh"
#include "sm90/dense.cuh"

namespace gemma_ext::cce::cuda {
namespace {

struct BackwardMemory {
  int64_t e_bytes;  // of a copy of the valid rows, for wgmma
  DenseChunks chunks;
  Plan plan;
  Rows busy;
  Coefficients* busy_row;
  DeSums sums{};
  void *e, *dense_strips;

  BackwardMemory(Arena& memory, const Backward& b, int64_t strip_bytes)
      : e_bytes(by_wgmma(b.head) ? Arena::aligned(b.head.N * b.head.D * size_of(b.head.dtype)) : 0),
        chunks(b.head, b.lean ? strip_bytes - e_bytes : strip_bytes, b.lean && b.out.dc),
        plan(memory, b.head, strip_bytes, b.out.de != nullptr,
             by_wgmma(b.head) ? in_plan(b) + chunks.in_workspace * chunks.tile_bytes : 0),
        busy(memory, b.head),
        busy_row(memory.take<Coefficients>(by_wgmma(b.head) ? b.head.N : 0)),
        e(plan.strips),
        dense_strips(static_cast<char*>(plan.strips) + in_plan(b)) {
    const int64_t sums_of_de = b.out.de ? b.head.N * b.head.D : 0;
    if (b.lean) {
      if (size_of(b.head.dtype) == 2) sums.low = memory.take<uint16_t>(sums_of_de);
    } else {
      sums.whole = memory.take<float>(sums_of_de);
      e = memory.take<char>(e_bytes);
    }
  }

  // Lean: the copy lies before the strips, where lists have theirs.
  int64_t in_plan(const Backward& b) const { return b.lean ? e_bytes : 0; }
};

struct BusyParams {
  Rows from;
  const Coefficients* from_row;
  Rows to;
  Coefficients* to_row;
};

constexpr int kBusyThreads = 1024;

// Rows that have a gradient, as the lists have no others. One block.
KERNEL void busy_rows_kernel(BusyParams p) {
  const int count = *p.from.count;
  int total = 0;
  for (int first = 0; first < count; first += kBusyThreads) {
    const int i = first + simt::thread_idx();
    Coefficients c{};
    if (i < count) c = p.from_row[i];
    const bool busy = i < count && !(c.scale == 0.0f && c.class_coef == 0.0f);
    const int before = total;
    const int at = before + block_rank<kBusyThreads>(busy, simt::shared<int>(), total);
    if (!busy) continue;
    p.to.row[at] = p.from.row[i];
    p.to.label[at] = p.from.label[i];
    p.to_row[at] = c;
  }
  if (simt::thread_idx() == 0) *p.to.count = total;
}

// On Hopper only the device knows whether it is these or the dense kernels: both are launched, and one of
// them leaves at once.
template <class T, bool kLean>
void add_lists(Launches& launches, const BackwardMemory& m, const Backward& b) {
  const bool exact_elsewhere = by_wgmma(b.head);
  const PlanParams planning{
      b.head, m.plan, exact_elsewhere, b.masses, b.up.d_mean != nullptr, b.summary, b.seed, 0};
  add_drawn<T, kLean>(launches, planning, m.sums, b.out, [&](const PlanParams& p, int64_t grid) {
    launches.add(strip_gradient_kernel<T>, grid, mma::kThreads, kStripSharedBytes<T>, p);
  });
}

// Its rows are listed and their coefficients known. general: they have a q or a class coefficient.
template <class T, bool kLean>
void add_dense(Launches& launches, const BackwardMemory& m, Dense p, bool general) {
  const Head& h = p.tma.head;
  constexpr simt::Major kK = simt::Major::kK, kMn = simt::Major::kMn;
  const DenseChunks& chunks = m.chunks;
  p.stride = chunks.stride;
  p.tiles = chunks.tiles;
  p.slices = static_cast<int>(ceil_div(h.D, kTile));
  const int64_t pairs = ceil_div(h.N, kPairRows);
  launches.check(wgmma::make_map<T, kMn>(&p.e_map, p.tma.e, h.N, h.D, h.D));
  launches.check(wgmma::make_map<T, kMn>(&p.c_map, h.c, h.V, h.D, h.c_stride));
  for (; p.first_tile < p.tiles; p.first_tile += p.tiles_at_hand) {
    const DenseChunks::Chunk chunk = chunks.from(p.first_tile);
    const int64_t strips = chunk.tiles * p.stride;
    p.tiles_at_hand = chunk.tiles;
    p.strips = chunk.in_dc ? static_cast<char*>(p.out.dc) + chunk.in_dc : m.dense_strips;
    launches.check(wgmma::make_map<T, kMn>(&p.g_map, p.strips, strips, kTile, kTile));
    launches.check(wgmma::make_map<T, kK>(&p.g_rows_map, p.strips, strips, kTile, kTile));
    if (p.max) {
      launches.add(scale_strips_kernel<T>, p.tiles * (p.stride / kScaleRows), kPlanThreads, 0, p);
    } else {
      add_wgmma(launches,
                general ? dense_general_strips_wgmma_kernel<T> : dense_strips_wgmma_kernel<T>,
                pairs * p.tiles_at_hand, p);
    }
    if (p.out.dc) {
      add_wgmma(launches, dense_dc_wgmma_kernel<T>, int64_t{p.tiles_at_hand} * p.slices, p);
    }
    if (p.out.de) add_wgmma(launches, dense_de_wgmma_kernel<T, kLean>, pairs * p.slices, p);
    if (p.out.dbias) {
      launches.add(dense_dbias_kernel<T>, p.tiles_at_hand * kSumParts, kSumThreads, kSumSharedBytes,
                   p);
    }
  }
}

template <class T, bool kLean>
void add_gradients(Launches& launches, const BackwardMemory& m, const Backward& b,
                   const KeptStrips& kept) {
  const Head& h = b.head;
  const Plan& plan = m.plan;
  if (b.out.de) {
    launches.add(clear_kernel<T>, ceil_div(h.N * h.D, 2 * kPlanThreads), kPlanThreads, 0,
                 {b.out.de, h.N * h.D});
  }
  if (b.summary || !by_wgmma(h)) add_lists<T, kLean>(launches, m, b);
  if constexpr (!std::is_same_v<T, float>) {
    if (!by_wgmma(h)) return;
    if (!kept.strips) {
      launches.add(busy_rows_kernel, 1, kBusyThreads, kBusyThreads / simt::kWarpSize * sizeof(int),
                   {plan.rows, plan.row, m.busy, m.busy_row});
    }
    Dense dense(gather_e<T>(launches, h, kept.strips ? plan.rows : m.busy, m.e));
    dense.row = kept.strips ? plan.row : m.busy_row;
    dense.unit = plan.unit;
    dense.sums = m.sums;
    dense.out = b.out;
    dense.listed = b.summary ? plan.listed : nullptr;
    dense.max = kept.max;
    dense.target = kept.target;
    add_dense<T, kLean>(launches, m, dense, b.up.d_mean || b.up.d_class);
  }
}

// kept: of a forward that left its strips in the workspace, or without any.
void add_backward(Launches& launches, const BackwardMemory& m, const Backward& b,
                  const float* lse2_coef, const KeptStrips& kept) {
  const Plan& plan = m.plan;
  gather_rows(launches, b.head, plan.rows);
  add_coefficients(launches, b.head.N, {plan.rows, plan.row, plan.unit, b.up, lse2_coef});
  by_dtype(b.head.dtype, [&](auto type) {
    using T = decltype(type);
    if (b.lean) {
      add_gradients<T, true>(launches, m, b, kept);
    } else {
      add_gradients<T, false>(launches, m, b, kept);
    }
  });
}

constexpr int kScaleThreads = 256;

template <class T>
KERNEL void scale_kernel(Scale p) {
  const float factor = *p.factor;
  if (factor == 1.0f) return;
  T* x = static_cast<T*>(p.x);
  const int64_t step = int64_t{simt::grid_dim()} * kScaleThreads;
  for (int64_t i = int64_t{simt::block_idx()} * kScaleThreads + simt::thread_idx(); i < p.count;
       i += step) {
    x[i] = narrow<T>(widen(x[i]) * factor);
  }
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

Forward forward_of(const Fused& f, float* lse_low) {
  Forward r{};
  r.head = f.head;
  r.out.nll = f.nll;
  r.out.lse = f.lse;
  r.out.lse_low = lse_low;
  r.lean = f.lean;
  return r;
}

bool wants_any(const Gradients& out) { return out.de || out.dc || out.dbias; }

Backward backward_of(const Fused& f, const float* lse_low) {
  Backward r{};
  r.head = f.head;
  r.up.nll = f.nll;
  r.up.lse = f.lse;
  r.up.lse_low = lse_low;
  r.up.d_nll = f.nll_coef;
  r.out = f.out;
  r.lean = f.lean;
  return r;
}

struct FusedMemory {
  double* summary;
  float* lse_low;
  Arena shared;  // by forward and backward, unless strips are kept
  Backward call;
  BackwardMemory backward;
  Forward forward;
  Memory of_forward;
  KeptStrips kept;  // all strips

  FusedMemory(Arena& memory, const Fused& f, const Memory& bounds)
      : summary(memory.take<double>(3)),
        lse_low(memory.take<float>(f.head.N)),
        shared(memory),
        call(backward_of(f, lse_low)),
        backward(memory, call, bounds.strip_bytes),
        forward(forward_of(f, lse_low)),
        of_forward{.plane_bytes = bounds.plane_bytes} {
    const Head& h = f.head;
    forward.summary = summary;
    if (by_wgmma(h) && wants_any(f.out)) {
      const DenseChunks& chunks = backward.chunks;
      if (chunks.in_workspace == chunks.tiles) {
        kept = {backward.dense_strips, chunks.stride, memory.take<float>(h.N * chunks.tiles),
                memory.take<float>(h.N)};
        forward.lean = false;  // all tiles at once
      }
    }
    Arena& arena = kept.rows ? memory : shared;
    of_forward.workspace = arena.take<char>(workspace(forward, of_forward));
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
  add_backward(launches, m, b, nullptr, {});
  return launches.status();
}

int64_t workspace(const Fused& f, const Memory& memory) {
  Arena arena(nullptr);
  FusedMemory all(arena, f, memory);
  return arena.bytes();
}

Status run(const Fused& f, const Memory& memory, Stream stream) {
  Arena arena(memory.workspace);
  const FusedMemory m(arena, f, memory);
  const Status status = forward(m.forward, m.of_forward, m.kept, stream);
  if (status != Status{}) return status;

  Launches launches(stream);
  const Rows& rows = m.backward.plan.rows;
  if (wants_any(f.out)) {
    add_backward(launches, m.backward, m.call, f.lse2_coef, m.kept);
  } else {
    gather_rows(launches, f.head, rows);
  }
  launches.add(loss_kernel, 1, kPlanThreads, kPlanThreads * sizeof(double),
               {rows, f.nll, f.lse, f.nll_coef, f.lse2_coef, f.loss});
  return launches.status();
}

int64_t step_bytes(const Forward& f, const Backward& b, const Memory& memory) {
  const Head& h = f.head;
  const int64_t vectors = 3 + (f.out.mean != nullptr) + (f.out.class_sum != nullptr) +
                          2 * (f.out.argmax != nullptr) +
                          2 * (f.out.average != nullptr);  // of 4 bytes
  const int64_t masses = f.masses ? tiles_of(h.V) * h.N * (f.out.mean ? 2 : 1) : 0;
  return vectors * h.N * 4 + masses * (f.lean ? 2 : 4) +
         std::max(workspace(f, memory), workspace(b, memory));
}

int64_t step_bytes(const Fused& f, const Memory& memory) {
  return 2 * f.head.N * 4 + workspace(f, memory);
}

Status run(const Scale& call, const Memory&, Stream stream) {
  Launches launches(stream);
  by_dtype(call.dtype, [&](auto type) {
    launches.add(scale_kernel<decltype(type)>, taking_turns(ceil_div(call.count, kScaleThreads)),
                 kScaleThreads, 0, call);
  });
  return launches.status();
}

}  // namespace gemma_ext::cce::cuda
