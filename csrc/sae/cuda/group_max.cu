// SPDX-License-Identifier: Apache-2.0
// The best p of each run of features, by the maximum of ranks: no list, and no order that would show.
#include "candidates.cuh"

namespace gemma_ext::sae::cuda {
namespace {

using Word = unsigned long long;  // of 64-bit atomics

struct GroupParams {
  EncodeParams encode;
  Word* best;  // [N, groups] rank_of the best so far
  int64_t groups;
  int size;
  float* values;
  int32_t* indices;
};

KERNEL_BOUNDS(kThreads, 4)
void clear_groups_kernel(GroupParams p) {
  const int64_t count = p.encode.encoder.N * p.groups;
  for (int64_t i = int64_t{simt::block_idx()} * kThreads + simt::thread_idx(); i < count;
       i += int64_t{simt::grid_dim()} * kThreads)
    p.best[i] = 0;
}

struct GroupVisitor {
  const GroupParams& p;
  int64_t first_row;

  struct Eight : EightFeatures {
    DEVICE Eight(const GroupVisitor& v, const Columns& at)
        : EightFeatures(v.p.encode.encoder, at) {}
  };
  struct Row {
    int64_t n;
    DEVICE Row(const GroupVisitor& v, int row) : n(v.first_row + row) {}
  };

  DEVICE GroupVisitor(const GroupParams& p, int64_t first_row, int, uint8_t*, int)
      : p(p), first_row(first_row) {}

  // The four lanes of a row have 32 neighbours of it: of one group, but where groups are small or meet.
  DEVICE void visit(const Eight& eight, const Row& row, const float (&x)[kEight]) {
    const Encoder& e = p.encode.encoder;
    const int first = eight.at.first - simt::lane_idx() % 4 * 2, last = first + 31;
    if (last < e.F && first / p.size == last / p.size) {
      uint32_t order = 0;
      int at = 0;
      UNROLL
      for (int i = 0; i < kEight; ++i) {
        const uint32_t own = order_of(x[i] + eight.bias[i]);
        if (own > order) at = eight.feature(i);
        order = own > order ? own : order;
      }
      UNROLL
      for (int step = 1; step < 4; step *= 2) {
        const uint32_t other = simt::shfl_xor(order, step);
        const int there = simt::shfl_xor(at, step);
        if (other > order || (other == order && there < at)) at = there;
        order = other > order ? other : order;
      }
      if (simt::lane_idx() % 4 == 0 && row.n < e.N) offer(row.n, order, at);
      return;
    }
    if (row.n >= e.N) return;
    UNROLL
    for (int i = 0; i < kEight; ++i) {
      if (eight.inside(e, i)) offer(row.n, order_of(x[i] + eight.bias[i]), eight.feature(i));
    }
  }
  DEVICE void end() {}

 private:
  DEVICE void offer(int64_t n, uint32_t order, int feature) const {
    Word* best = p.best + n * p.groups + feature / p.size;
    const Word rank = Word{order} << 32 | (0xffffffffu - static_cast<uint32_t>(feature));
    if (rank > *best) simt::atomic_max(best, rank);
  }
};

KERNEL_BOUNDS(kThreads, 4)
void write_groups_kernel(GroupParams p) {
  const int64_t count = p.encode.encoder.N * p.groups;
  for (int64_t i = int64_t{simt::block_idx()} * kThreads + simt::thread_idx(); i < count;
       i += int64_t{simt::grid_dim()} * kThreads) {
    const uint32_t order = static_cast<uint32_t>(p.best[i] >> 32);
    p.values[i] = order == 0xffffffffu ? __builtin_nanf("")
                                       : simt::float_of(order >> 31 ? order & 0x7fffffffu : ~order);
    p.indices[i] = static_cast<int32_t>(0xffffffffu - static_cast<uint32_t>(p.best[i]));
  }
}

}  // namespace

int64_t workspace(const GroupMax& call) {
  return call.encoder.N * call.groups * static_cast<int64_t>(sizeof(Word));
}

Status run(const GroupMax& call, void* memory, Stream stream) {
  Launches launches(stream);
  const Encoder& e = call.encoder;
  const GroupParams p{{e, 0, 0, 0}, static_cast<Word*>(memory),
                      call.groups,  static_cast<int>(e.F / call.groups),
                      call.values,  call.indices};
  const int64_t blocks = taking_turns(ceil_div(e.N * call.groups, kThreads));
  launches.add(clear_groups_kernel, blocks, kThreads, 0, p);
  add_encode<GroupVisitor, 0>(launches, p, e, 0, e.F);
  launches.add(write_groups_kernel, blocks, kThreads, 0, p);
  return launches.status();
}

}  // namespace gemma_ext::sae::cuda
