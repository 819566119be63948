// SPDX-License-Identifier: Apache-2.0
// out[v] = mean over rows[v, m] >= 0 of source[m][rows[v, m]]: a warp to a row.
#include "octet.cuh"
#include "table.h"

namespace gemma_ext::souping::cuda {
namespace {

struct GatherRowsParams {
  const Array* source;
  const int64_t* rows;
  Array out;
  int models;
  int64_t count, width;
};

constexpr int kGatherThreads = 256, kGatherWarps = kGatherThreads / simt::kWarpSize;

KERNEL_BOUNDS(kGatherThreads, 4)
void gather_rows_kernel(GatherRowsParams p) {
  for (int64_t v = int64_t{simt::block_idx()} * kGatherWarps + simt::warp_idx(); v < p.count;
       v += int64_t{simt::grid_dim()} * kGatherWarps) {
    const int64_t* rows = p.rows + v * p.models;
    const View out = View::of(p.out, -v * p.width);
    int owners = 0, owner = 0;
    for (int m = 0; m < p.models; ++m) {
      if (rows[m] < 0) continue;
      ++owners;
      owner = m;
    }
    const bool copies = owners == 1 && p.source[owner].type == p.out.type;
    for (int64_t q = simt::lane_idx(); q * kLanes < p.width; q += simt::kWarpSize) {
      const Octet o = octet_of(q, 0, p.width);
      if (copies) {
        put(out, o, fetch(View::of(p.source[owner], -rows[owner] * p.width), o));
        continue;
      }
      float sum[kLanes] = {}, x[kMaxModels];
      NO_UNROLL
      for (int j = o.from; owners && j < o.to; ++j) {
        int found = 0;
        for (int m = 0; m < p.models; ++m) {
          if (rows[m] < 0) continue;
          x[found++] = element(View::of(p.source[m], -rows[m] * p.width), o.first + j);
        }
        sum[j] = sum_terms<0>(x, owners) / static_cast<float>(owners);
      }
      store(out, o, sum, Rounding::kNearest, 0);
    }
  }
}

int64_t enqueue(const GatherRows& call, void* memory, Launches* launches) {
  Arena arena(memory);
  Upload upload(arena, launches);
  const GatherRowsParams p{upload.add(call.source, call.models),
                           call.rows,
                           call.out,
                           call.models,
                           call.count,
                           call.width};
  if (!launches) return arena.bytes();
  upload.send();
  launches->add(gather_rows_kernel, taking_turns(ceil_div(call.count, kGatherWarps)),
                kGatherThreads, 0, p);
  return arena.bytes();
}

}  // namespace

int64_t workspace(const GatherRows& call) { return enqueue(call, nullptr, nullptr); }

Status run(const GatherRows& call, void* memory, Stream stream) {
  Launches launches(stream);
  enqueue(call, memory, &launches);
  return launches.status();
}

}  // namespace gemma_ext::souping::cuda
