// SPDX-License-Identifier: Apache-2.0
#include "head_rows.h"

#include "rows.cuh"

namespace gemma_ext::depth_batching::cuda {
namespace {

struct HeadNormParams {
  Head head;
  void* normed;  // [n, x_stride] in the type of weight; null: h as it is
  int64_t x_stride;
  float* lengths;  // [n] |x| from above, or null
};

KERNEL_BOUNDS(kRowNormThreads, 4) void depth_head_norm_kernel(HeadNormParams p) {
  const Head& head = p.head;
  float* s_sums = simt::shared<float>();
  const int64_t row = simt::block_idx(), from = row * head.h_stride;
  if (p.normed) {
    const float inverse = inverse_rms(head.h, head.h_type, from, head.D, head.norm.eps, s_sums);
    for (int64_t i = simt::thread_idx(); i < p.x_stride; i += kRowNormThreads) {
      const float y = i < head.D
                          ? normed(element(head.h, head.h_type, from + i), inverse,
                                   element(head.norm_weight, head.norm_type, i), head.norm.plus_one)
                          : 0.0f;
      set_element(p.normed, head.type, row * p.x_stride + i, y);
    }
  }
  if (!p.lengths) return;
  const void* x = p.normed ? p.normed : head.h;
  float squares = 0.0f;
  for (int64_t i = simt::thread_idx(); i < head.D; i += kRowNormThreads) {
    const float v = element(x, head.type, row * p.x_stride + i);  // written by this thread
    squares += v * v;
  }
  squares = block_sum(squares, s_sums);
  // a square and the terms of a thread, of a warp and of the block are rounded once each; the root and a product
  const float roundings = static_cast<float>(ceil_div(head.D, kRowNormThreads) + 32);
  if (simt::thread_idx() == 0) p.lengths[row] = sqrtf(squares) * (1.0f + roundings * 0x1p-24f);
}

}  // namespace

HeadRows::HeadRows(Arena& memory, const Head& head) : head_(head), normed_(nullptr) {
  x = head.h;
  stride = head.h_stride;
  if (!head.norm_weight) return;
  const int64_t word = 16 / size_of(head.type);
  stride = ceil_div(head.D, word) * word;
  x = normed_ = memory.take<uint8_t>(head.n * stride * size_of(head.type));
}

void HeadRows::add(Launches& launches, float* lengths) const {
  if (normed_ || lengths)
    launches.add(depth_head_norm_kernel, head_.n, kRowNormThreads, kRowNormShared,
                 {head_, normed_, stride, lengths});
}

}  // namespace gemma_ext::depth_batching::cuda
