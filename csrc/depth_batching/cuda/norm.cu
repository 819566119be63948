// SPDX-License-Identifier: Apache-2.0
// RMS norms of rows of the hidden bank: a block per row, sums in one order.
#include "linear_engine.h"
#include "rows.cuh"

namespace gemma_ext::depth_batching::cuda {
namespace {

DEVICE void gather_row(const Gather& c, int64_t row, float* s_sums) {
  const int64_t slot = c.slots[row];
  const bool there = slot >= 0 && slot < c.S;
  const float inverse =
      there ? inverse_rms(c.bank, c.bank_type, slot * c.D, c.D, c.norm.eps, s_sums) : 0.0f;
  for (int64_t i = simt::thread_idx(); i < c.D; i += kRowNormThreads) {
    const float y = there ? normed(element(c.bank, c.bank_type, slot * c.D + i), inverse,
                                   element(c.weight, c.type, i), c.norm.plus_one)
                          : 0.0f;
    set_element(c.out, c.out_type, row * c.D + i, y);
  }
}

KERNEL_BOUNDS(kRowNormThreads, 4) void depth_gather_kernel(Gather c) {
  gather_row(c, simt::block_idx(), simt::shared<float>());
}

KERNEL_BOUNDS(kRowNormThreads, 4) void depth_scatter_kernel(Scatter c) {
  float* s_sums = simt::shared<float>();
  const int64_t row = simt::block_idx(), slot = c.slots[row], D = c.D;
  if (slot >= 0 && slot < c.S) {
    const int64_t from = row * c.y_stride;
    const float inverse = c.weight ? inverse_rms(c.y, c.y_type, from, D, c.norm.eps, s_sums) : 0.0f;
    for (int64_t i = simt::thread_idx(); i < D; i += kRowNormThreads) {
      float step = element(c.y, c.y_type, from + i);
      if (c.weight)
        step = normed(step, inverse, element(c.weight, c.weight_type, i), c.norm.plus_one);
      set_element(c.bank, c.bank_type, slot * D + i,
                  element(c.bank, c.bank_type, slot * D + i) + step);
    }
  }
  if (!c.next_weight) return;
  // a thread reads again what it has written itself
  gather_row({c.bank, c.bank_type, c.S, D, c.n, c.slots, c.next_weight, c.next_type, c.norm, c.next,
              c.next_type},
             row, s_sums);
}

}  // namespace

int64_t workspace(const Gather&) { return 0; }
int64_t workspace(const Scatter&) { return 0; }

Status run(const Gather& call, void*, Stream stream) {
  Launches launches(stream);
  launches.add(depth_gather_kernel, call.n, kRowNormThreads, kRowNormShared, call);
  return launches.status();
}

Status run(const Scatter& call, void*, Stream stream) {
  Launches launches(stream);
  launches.add(depth_scatter_kernel, call.n, kRowNormThreads, kRowNormShared, call);
  return launches.status();
}

}  // namespace gemma_ext::depth_batching::cuda
