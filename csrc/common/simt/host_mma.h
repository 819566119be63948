// SPDX-License-Identifier: Apache-2.0
// Host backend: ldmatrix, stmatrix, mma.sync m16n8k16, cp.async.
#pragma once

#include "host_warp.h"

namespace gemma_ext::simt {

namespace host {

inline uint16_t half_of(uint32_t pair, int i) { return static_cast<uint16_t>(pair >> (16 * i)); }

template <class T>
float element(uint32_t pair, int i) {
  return to_float(T{half_of(pair, i)});
}

// Eight columns; d[m] += sum_k a[m][k] * b[k], in float64 and in the order of k.
using Columns = double __attribute__((vector_size(64)));
__attribute__((no_sanitize("address", "undefined"))) inline void multiply(const double (&a)[16][16],
                                                                          const Columns (&b)[16],
                                                                          Columns (&d)[16]) {
  for (int m = 0; m < 16; ++m) {
    for (int k = 0; k < 16; ++k) d[m] += a[m][k] * b[k];
  }
}

template <int kCount>
void check_row(const void* row, const char* op, const Where& where) {
  // lanes beyond 8 * kCount give addresses that the instruction ignores
  if (lane_idx() < 8 * kCount) shared_offset(row, 16, 16, op, where);
}

// Matrix i has its eight rows at the addresses of lanes 8i..8i+7; lane l then holds elements
// (l / 4, 2 * (l % 4) + {0, 1}), or of the transposed matrix.
template <bool kTrans, int kCount>
void load_matrices(const char* op, uint32_t (&r)[kCount], const void* row, const Where& where) {
  check_row<kCount>(row, op, where);
  struct Io {
    const uint16_t* row;
    uint32_t* r;
  } io{static_cast<const uint16_t*>(row), r};
  meet(op, kFullMask, false, where, &io, [](const Meeting& meeting) {
    for (int l = 0; l < 32; ++l) {
      for (int m = 0; m < kCount; ++m) {
        uint16_t pair[2];
        for (int i = 0; i < 2; ++i) {
          const int a = l / 4, b = 2 * (l % 4) + i;
          const int row = kTrans ? b : a, column = kTrans ? a : b;
          pair[i] = io_of<Io>(meeting, 8 * m + row).row[column];
        }
        io_of<Io>(meeting, l).r[m] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
      }
    }
  });
}

template <bool kTrans, int kCount>
void store_matrices(const char* op, void* row, const uint32_t (&r)[kCount], const Where& where) {
  check_row<kCount>(row, op, where);
  struct Io {
    uint16_t* row;
    const uint32_t* r;
  } io{static_cast<uint16_t*>(row), r};
  meet(op, kFullMask, false, where, &io, [](const Meeting& meeting) {
    for (int l = 0; l < 32; ++l) {
      for (int m = 0; m < kCount; ++m) {
        for (int i = 0; i < 2; ++i) {
          const int a = l / 4, b = 2 * (l % 4) + i;
          const int row = kTrans ? b : a, column = kTrans ? a : b;
          io_of<Io>(meeting, 8 * m + row).row[column] = half_of(io_of<Io>(meeting, l).r[m], i);
        }
      }
    }
  });
}

inline void land(const Copy& copy) {
  uint8_t line[16] = {};
  if (copy.bytes > 0) memcpy(line, copy.from, copy.bytes);  // an empty source may be null
  memcpy(copy.to, line, 16);
}

}  // namespace host

template <int kCount>
void ldmatrix(uint32_t (&r)[kCount], const void* row, Where where = Where::current()) {
  host::load_matrices<false>("ldmatrix", r, row, where);
}
template <int kCount>
void ldmatrix_trans(uint32_t (&r)[kCount], const void* row, Where where = Where::current()) {
  host::load_matrices<true>("ldmatrix_trans", r, row, where);
}
template <int kCount>
void stmatrix(void* row, const uint32_t (&r)[kCount], Where where = Where::current()) {
  host::store_matrices<false>("stmatrix", row, r, where);
}
template <int kCount>
void stmatrix_trans(void* row, const uint32_t (&r)[kCount], Where where = Where::current()) {
  host::store_matrices<true>("stmatrix_trans", row, r, where);
}

template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                  Where where = Where::current()) {
  struct Io {
    float* d;
    const uint32_t* a;
    const uint32_t* b;
  } io{d, a, b};
  host::meet("mma_m16n8k16", kFullMask, false, where, &io, [](const host::Meeting& meeting) {
    double a[16][16];
    host::Columns b[16], c[16];
    for (int l = 0; l < 32; ++l) {
      const Io& lane = host::io_of<Io>(meeting, l);
      for (int i = 0; i < 8; ++i) {
        const int row = l / 4 + 8 * ((i / 2) % 2), k = 2 * (l % 4) + i % 2 + 8 * (i / 4);
        a[row][k] = host::element<T>(lane.a[i / 2], i % 2);
      }
      for (int i = 0; i < 4; ++i) {
        b[2 * (l % 4) + i % 2 + 8 * (i / 2)][l / 4] = host::element<T>(lane.b[i / 2], i % 2);
      }
    }
    const auto each = [&](auto visit) {
      for (int l = 0; l < 32; ++l) {
        float* d = host::io_of<Io>(meeting, l).d;
        for (int i = 0; i < 4; ++i) visit(d[i], c[l / 4 + 8 * (i / 2)], 2 * (l % 4) + i % 2);
      }
    };
    each([](float x, host::Columns& row, int column) { row[column] = x; });
    host::multiply(a, b, c);
    each([](float& x, host::Columns& row, int column) { x = static_cast<float>(row[column]); });
  });
}

// The seed decides whether a copy lands at once or at its wait; until then the destination is
// poison. A source of fewer than 16 bytes is filled up with zeros, and is not touched if empty.
inline void cp_async(void* to, const void* from, int bytes = 16, Where where = Where::current()) {
  host::shared_offset(to, 16, 16, "cp_async", where);
  if (bytes < 0 || bytes > 16) host::fail("cp_async", where, "more than 16 bytes");
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0) {
    host::fail("cp_async", where, "the global address is not a multiple of 16");
  }
  host::Fiber& me = host::self();
  const host::Copy copy{to, from, bytes, me.copy_commits};
  if (host::machine->copy_at_issue()) return host::land(copy);
  host::poison(to, 16);
  me.copies.push_back(copy);
}

inline void cp_async_commit() { ++host::self().copy_commits; }

// Returns when at most kPending of the caller's committed groups are under way.
template <int kPending>
void cp_async_wait() {
  host::Fiber& me = host::self();
  auto next = me.copies.begin();
  for (; next != me.copies.end() && next->group + kPending < me.copy_commits; ++next) {
    host::land(*next);
  }
  me.copies.erase(me.copies.begin(), next);
}

}  // namespace gemma_ext::simt
