// SPDX-License-Identifier: Apache-2.0
// out = base + scale sum_m w_m (x_m - base), or sum_m w_m x_m.
#include "chunk.cuh"

namespace gemma_ext::souping::cuda {
namespace {

struct SoupParams {
  Plan plan;
  Range chunks;
  const double *weights, *scale;
  Rounding rounding;
};

template <class A, int kM>
KERNEL_BOUNDS(kThreads, sizeof(A) == 8 || kM == 8 ? 2 : 3)
void soup_kernel(SoupParams p) {
  View* views = simt::shared<View>();
  A* weights = simt::shared<A>(kViewBytes);
  for (int64_t c = p.chunks.from + simt::block_idx(); c < p.chunks.to; c += simt::grid_dim()) {
    const Chunk k = open_chunk(p.plan, c, views, [&](const Chunk& k) {
      for (int m = simt::thread_idx(); m < k.models; m += kThreads)
        weights[m] = static_cast<A>(p.weights[k.part * k.models + m]);
    });
    const A scale = static_cast<A>(p.scale[k.part]);
    each_octet(k, [&](const Octet& o) {
      by_bound<kM>(k, o, [&](auto bound) {
        Deltas<A, bound.value> deltas(k, o);
        A y[kLanes];
        each_position<bound.value>([&](int j) {
          y[j] = sum_models<bound.value, A>(
              k.models, [&](int m) { return weighted(weights[m], deltas.at(m, j)); });
          if (k.based) y[j] = deltas.base[j] + weighted(scale, y[j]);
        });
        store(k.out(), o, y, p.rounding, k.key);
      });
    });
  }
}

// Weights [R, M] and a scale [R] by row.
template <class A>
KERNEL_BOUNDS(kThreads, 2)
void soup_rows_kernel(SoupParams p) {
  View* views = simt::shared<View>();
  for (int64_t c = p.chunks.from + simt::block_idx(); c < p.chunks.to; c += simt::grid_dim()) {
    const Chunk k = open_chunk(p.plan, c, views);
    const Part& part = p.plan.table.part[k.part];
    each_octet(k, [&](const Octet& o) {
      const int64_t at = o.first + o.from - part.offset, row = at / part.width;
      int64_t rows[kLanes];
      int64_t here = part.row + row, left = (row + 1) * part.width - at;
      UNROLL
      for (int j = 0; j < kLanes; ++j) {
        rows[j] = here;
        if (o.has(j) && --left == 0) {
          ++here;
          left = part.width;
        }
      }
      Deltas<A, 0> deltas(k, o);
      A y[kLanes] = {};
      NO_UNROLL
      for (int j = o.from; j < o.to; ++j) {
        const double* weights = p.weights + rows[j] * k.models;
        y[j] = sum_models<0, A>(
            k.models, [&](int m) { return weighted(static_cast<A>(weights[m]), deltas.at(m, j)); });
        if (k.based) y[j] = deltas.base[j] + weighted(static_cast<A>(p.scale[rows[j]]), y[j]);
      }
      store(k.out(), o, y, p.rounding, k.key);
    });
  }
}

int64_t enqueue(const Soup& call, void* memory, Launches* launches) {
  const Table& t = call.table;
  const std::vector<int64_t> first = chunks_before(t, kChunk);
  int64_t count = t.parts;
  if (call.by_row) {
    count = 0;
    for (int64_t p = 0; p < t.parts; ++p) count += t.part[p].numel / t.part[p].width;
  }
  Arena arena(memory);
  Upload upload(arena, launches);
  SoupParams p{};
  p.plan = upload.add(t, kChunk, first);
  p.weights = upload.add(call.weights, count * t.models);
  p.scale = upload.add(call.scale, count);
  p.rounding = call.rounding;
  if (!launches) return arena.bytes();
  upload.send();
  const int shared = kViewBytes + kMaxModels * int{sizeof(double)};
  for (const Run& run : runs_of(t, call.wide)) {
    p.chunks = {first[run.parts.from], first[run.parts.to]};
    const int64_t grid = taking_turns(p.chunks.size());
    const auto add = [&](auto kernel) { launches->add(kernel, grid, kThreads, shared, p); };
    if (call.by_row) {
      add(run.wide ? soup_rows_kernel<double> : soup_rows_kernel<float>);
    } else if (run.wide) {
      add(t.models <= 4 ? soup_kernel<double, 4> : soup_kernel<double, 0>);
    } else {
      by_models(t.models, [&](auto bound) { add(soup_kernel<float, bound.value>); });
    }
  }
  return arena.bytes();
}

}  // namespace

int64_t workspace(const Soup& call) { return enqueue(call, nullptr, nullptr); }

Status run(const Soup& call, void* memory, Stream stream) {
  Launches launches(stream);
  enqueue(call, memory, &launches);
  return launches.status();
}

const char* status_text(Status status) {
  return simt::status_text(static_cast<simt::Status>(status));
}

}  // namespace gemma_ext::souping::cuda
