// SPDX-License-Identifier: Apache-2.0
// Host backend: wgmma with both operands in shared memory, 128B swizzle. Each warp computes its own
// 16 rows; operands are read at a time that the seed picks, accumulators are poison until the wait.
#pragma once

#include "host_mma.h"

namespace gemma_ext::simt {

namespace host {

// Byte offset in shared memory of element (mn, k) of an operand, by the layouts of the PTX ISA:
// atoms of 8 rows of 128 bytes, along k for K-major and along m or n for MN-major operands.
inline size_t operand_offset(Major major, uint64_t descriptor, int mn, int k) {
  const auto field = [&](int shift) {
    return static_cast<int>((descriptor >> shift & 0x3fff) << 4);
  };
  const int start = field(0), leading = field(16), stride = field(32);
  const int offset = major == Major::kK
                         ? mn / 8 * stride + mn % 8 * 128 + k * 2
                         : mn / 64 * leading + k / 8 * stride + k % 8 * 128 + mn % 64 * 2;
  return swizzle128(start + offset);
}

inline float operand(const Wgmma& op, Major major, uint64_t descriptor, int mn, int k) {
  const size_t offset = operand_offset(major, descriptor, mn, k);
  if (offset + 2 > op.block->shared_bytes) {
    throw std::runtime_error(
        text("wgmma reads shared address ", offset, " of ", op.block->shared_bytes));
  }
  uint16_t bits;
  memcpy(&bits, op.block->shared + offset, 2);
  return op.convert(bits);
}

// Accumulator register i of a lane.
inline int row_of(int lane, int i) { return lane / 4 + 8 * (i / 2 % 2); }
inline int column_of(int lane, int i) { return 8 * (i / 4) + 2 * (lane % 4) + i % 2; }

inline void read_once(Wgmma& op) {
  if (op.was_read) return;
  op.was_read = true;
  double a[16][16];
  for (int m = 0; m < 16; ++m) {
    for (int k = 0; k < 16; ++k) a[m][k] = operand(op, op.major_a, op.a, op.first_row + m, k);
  }
  op.product.resize(16 * op.n);
  for (int n = 0; n < op.n; n += 8) {
    Columns b[16], d[16] = {};
    for (int k = 0; k < 16; ++k) {
      for (int j = 0; j < 8; ++j) b[k][j] = operand(op, op.major_b, op.b, n + j, k);
    }
    multiply(a, b, d);
    memcpy(&op.product[16 * n], d, sizeof(d));
  }
}

inline void retire(Warp& warp, uint64_t groups_done) {
  while (!warp.wgmmas.empty() && warp.wgmmas.front()->group < groups_done) {
    const std::shared_ptr<Wgmma> op = warp.wgmmas.front();
    warp.wgmmas.pop_front();
    read_once(*op);
    for (int l = 0; l < 32; ++l) {
      std::vector<float>& sums = warp.in_flight[op->d[l]];
      for (int i = 0; i < op->n / 2; ++i) {
        const int column = column_of(l, i);
        const double product = op->product[16 * (column & ~7) + 8 * row_of(l, i) + column % 8];
        sums[i] = static_cast<float>(op->accumulate ? sums[i] + product : product);
      }
      const bool last = std::none_of(warp.wgmmas.begin(), warp.wgmmas.end(),
                                     [&](const auto& other) { return other->d[l] == op->d[l]; });
      if (!last) continue;
      std::copy(sums.begin(), sums.end(), op->d[l]);
      warp.in_flight.erase(op->d[l]);
    }
  }
}

inline void issue(const Wgmma& wgmma, float* d, const Where& where) {
  struct Io {
    const Wgmma& wgmma;
    float* d;
  } io{wgmma, d};
  if (machine->block_threads % 128 != 0) fail("wgmma", where, "the block is not whole warpgroups");
  meet("wgmma", kFullMask, false, where, &io, [&](const Meeting& m) {
    Warp& warp = *self().warp;
    if (!warp.wgmma_fenced) {
      fail("wgmma", where, "no wgmma_fence since the start or the last wgmma_wait");
    }
    const auto op = std::make_shared<Wgmma>(wgmma);
    op->group = warp.wgmma_group;
    for (int l = 0; l < 32; ++l) {
      const Io& lane = io_of<Io>(m, l);
      if (lane.wgmma.a != op->a || lane.wgmma.b != op->b ||
          lane.wgmma.accumulate != op->accumulate) {
        fail("wgmma", where, "lane ", l, " gives other operands");
      }
      op->d[l] = lane.d;
      if (warp.in_flight.count(lane.d)) continue;
      warp.in_flight[lane.d].assign(lane.d, lane.d + op->n / 2);
      poison(lane.d, sizeof(float) * (op->n / 2));
    }
    warp.wgmmas.push_back(op);
    machine->later([op] { read_once(*op); });
  });
}

}  // namespace host

// Strides in bytes. K-major: stride_bytes between groups of 8 rows, leading_bytes unused. MN-major:
// leading_bytes between atoms of 64 elements along m or n, stride_bytes between groups of 8 k.
inline uint64_t wgmma_descriptor(const void* p, int leading_bytes, int stride_bytes,
                                 Where where = Where::current()) {
  const uint64_t start = host::shared_offset(p, 16, 16, "wgmma_descriptor", where);
  const auto field = [&](uint64_t bytes) {
    if (bytes % 16 != 0) host::fail("wgmma_descriptor", where, "a stride is not a multiple of 16");
    return (bytes & 0x3ffff) >> 4;
  };
  return field(start) | field(leading_bytes) << 16 | field(stride_bytes) << 32 | uint64_t{1} << 62;
}

inline void wgmma_fence(Where where = Where::current()) {
  host::meet("wgmma_fence", kFullMask, false, where, nullptr,
             [](const host::Meeting&) { host::self().warp->wgmma_fenced = true; });
}

inline void wgmma_commit(Where where = Where::current()) {
  host::meet("wgmma_commit", kFullMask, false, where, nullptr,
             [](const host::Meeting&) { ++host::self().warp->wgmma_group; });
}

// Returns when at most kPending committed groups of the warp are in flight.
template <int kPending>
void wgmma_wait(Where where = Where::current()) {
  host::meet("wgmma_wait", kFullMask, false, where, nullptr, [](const host::Meeting&) {
    host::Warp& warp = *host::self().warp;
    const uint64_t groups = warp.wgmma_group;
    host::retire(warp, groups > kPending ? groups - kPending : 0);
    warp.wgmma_fenced = false;
  });
}

// d (+)= a @ b, a 64 x 16, b 16 x kN, for the four warps of a warpgroup. Register i of d is row
// 16 * (warp % 4) + lane / 4 + 8 * (i / 2 % 2), column 8 * (i / 4) + 2 * (lane % 4) + i % 2.
template <class T, int kN, Major kA = Major::kK, Major kB = Major::kK>
void wgmma(float (&d)[kN / 2], uint64_t a, uint64_t b, bool accumulate,
           Where where = Where::current()) {
  static_assert(kN % 8 == 0 && kN >= 8 && kN <= 256);
  const auto convert = [](uint16_t bits) { return to_float(T{bits}); };
  host::issue({host::self().block,
               16 * (warp_idx() % 4),
               kN,
               a,
               b,
               kA,
               kB,
               convert,
               accumulate,
               0,
               {},
               false,
               {}},
              d, where);
}

// Register counts are not modelled; the bounds of the instruction are.
template <int kRegisters>
void setmaxnreg_inc() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
}
template <int kRegisters>
void setmaxnreg_dec() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
}

}  // namespace gemma_ext::simt
