// SPDX-License-Identifier: Apache-2.0
// out[n] = bias + sum_j v_nj W[i_nj], or what that leaves of a target: a block per token, a word of the row per
// thread, several rows of W on their way at once.
#include "lists.cuh"

namespace gemma_ext::sae::cuda {
namespace {

struct DecodeShared {
  Staged staged;
  float parts[kMostWarps];
};

template <class T, int kV, bool kError>
KERNEL_BOUNDS(kMostThreads, 2)
void decode_kernel(Decode p) {
  DecodeShared* s = simt::shared<DecodeShared>();
  const int t = simt::thread_idx(), threads = simt::block_dim();
  for (int64_t n = simt::block_idx(); n < p.list.N; n += simt::grid_dim()) {
    const Span span = entries_of(p.list, n);
    float squares = 0.0f;
    for (int64_t first = 0; first < p.D; first += threads * kV) {
      const int64_t d = first + t * kV;
      const bool inside = d < p.D;
      const T* column = static_cast<const T*>(p.weight.data) + d;
      float sum[kV] = {};
      for (int64_t from = span.begin; from < span.end; from += kStaged) {
        const int count = static_cast<int>(least(span.end - from, kStaged));
        simt::sync_block();
        for (int i = t; i < count; i += threads) stage_entry(p.list, from + i, i, s->staged);
        simt::sync_block();
        if (inside) add_rows(s->staged, count, column, p.weight.stride, sum);
      }
      if (!inside) continue;
      if (p.bias) {
        UNROLL
        for (int i = 0; i < kV; ++i) sum[i] += p.bias[d + i];
      }
      if constexpr (kError) {
        float target[kV];
        load_any(p.target, n, d, target);
        UNROLL
        for (int i = 0; i < kV; ++i) {
          sum[i] = target[i] - sum[i];
          squares += sum[i] * sum[i];
        }
      }
      store(static_cast<T*>(p.out) + n * p.D + d, sum);
    }
    if constexpr (kError) {
      squares = block_sum(squares, s->parts);
      if (t == 0) p.squared[n] = squares;
    }
  }
}

}  // namespace

int64_t workspace(const Decode&) { return 0; }

Status run(const Decode& call, void*, Stream stream) {
  Launches launches(stream);
  by_dtype(call.weight.type, [&](auto type) {
    using T = decltype(type);
    constexpr int kWide = 16 / sizeof(T);
    const bool wide = is_wide(call.weight, call.D, kWide) &&
                      is_wide(call.out, call.D, call.weight.type, call.D, kWide) &&
                      is_wide(call.target, call.D, kWide);
    by_width<T>(wide, [&](auto v) {
      constexpr int kV = decltype(v)::value;
      const auto kernel =
          call.target.data ? decode_kernel<T, kV, true> : decode_kernel<T, kV, false>;
      launches.add(kernel, taking_turns(call.list.N), row_shape(call.D, kV).threads,
                   sizeof(DecodeShared), call);
    });
  });
  return launches.status();
}

}  // namespace gemma_ext::sae::cuda
