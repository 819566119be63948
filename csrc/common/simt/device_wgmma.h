// SPDX-License-Identifier: Apache-2.0
// nvcc backend, sm_90a only: wgmma.mma_async with both operands in shared memory, setmaxnreg.
#pragma once

#include "device.h"

namespace gemma_ext::simt {

// Strides in bytes. K-major: stride_bytes between groups of 8 rows, leading_bytes unused. MN-major:
// leading_bytes between atoms of 64 elements along m or n, stride_bytes between groups of 8 k.
DEVICE uint64_t wgmma_descriptor(const void* p, int leading_bytes, int stride_bytes) {
  const auto field = [](uint32_t bytes) { return static_cast<uint64_t>((bytes & 0x3ffff) >> 4); };
  return field(shared_address(p)) | field(leading_bytes) << 16 | field(stride_bytes) << 32 |
         uint64_t{1} << 62;  // 1: 128B swizzle
}

DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

template <int kRegisters>
DEVICE void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
DEVICE void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Operand names and operands of the accumulators, 16 registers at a time.
#define SIMT_NAMES_0 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define SIMT_NAMES_1 \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define SIMT_NAMES_2 \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define SIMT_NAMES_3 \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define SIMT_NAMES_4 \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define SIMT_NAMES_5 \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define SIMT_NAMES_6 \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"
#define SIMT_NAMES_7 \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define SIMT_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define SIMT_D16(i) SIMT_D4(i), SIMT_D4(i + 4), SIMT_D4(i + 8), SIMT_D4(i + 12)

// a, b, scale_d, transpose_a, transpose_b are the operand numbers that follow the accumulators.
#define SIMT_WGMMA(n, type, names, a, b, scale, trans_a, trans_b, ...)                           \
  asm volatile("{ .reg .pred p; setp.ne.b32 p, " scale                                           \
               ", 0; "                                                                           \
               "wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type " {" names "}, " a \
               ", " b ", p, 1, 1, " trans_a ", " trans_b "; }"                                   \
               : __VA_ARGS__                                                                     \
               : "l"(desc_a), "l"(desc_b), "r"(static_cast<int>(accumulate)),                    \
                 "n"(static_cast<int>(kA)), "n"(static_cast<int>(kB))                            \
               : "memory")

#define SIMT_WGMMA_16(type)                                                                 \
  SIMT_WGMMA("16", type, "%0, %1, %2, %3, %4, %5, %6, %7", "%8", "%9", "%10", "%11", "%12", \
             SIMT_D4(0), SIMT_D4(4))
#define SIMT_WGMMA_32(type) \
  SIMT_WGMMA("32", type, SIMT_NAMES_0, "%16", "%17", "%18", "%19", "%20", SIMT_D16(0))
#define SIMT_WGMMA_64(type)                                                                 \
  SIMT_WGMMA("64", type, SIMT_NAMES_0 ", " SIMT_NAMES_1, "%32", "%33", "%34", "%35", "%36", \
             SIMT_D16(0), SIMT_D16(16))
#define SIMT_WGMMA_96(type)                                                                     \
  SIMT_WGMMA("96", type, SIMT_NAMES_0 ", " SIMT_NAMES_1 ", " SIMT_NAMES_2, "%48", "%49", "%50", \
             "%51", "%52", SIMT_D16(0), SIMT_D16(16), SIMT_D16(32))
#define SIMT_WGMMA_128(type)                                                                  \
  SIMT_WGMMA("128", type, SIMT_NAMES_0 ", " SIMT_NAMES_1 ", " SIMT_NAMES_2 ", " SIMT_NAMES_3, \
             "%64", "%65", "%66", "%67", "%68", SIMT_D16(0), SIMT_D16(16), SIMT_D16(32),      \
             SIMT_D16(48))
#define SIMT_WGMMA_192(type)                                                                      \
  SIMT_WGMMA("192", type,                                                                         \
             SIMT_NAMES_0 ", " SIMT_NAMES_1 ", " SIMT_NAMES_2 ", " SIMT_NAMES_3 ", " SIMT_NAMES_4 \
                          ", " SIMT_NAMES_5,                                                      \
             "%96", "%97", "%98", "%99", "%100", SIMT_D16(0), SIMT_D16(16), SIMT_D16(32),         \
             SIMT_D16(48), SIMT_D16(64), SIMT_D16(80))
#define SIMT_WGMMA_256(type)                                                                      \
  SIMT_WGMMA("256", type,                                                                         \
             SIMT_NAMES_0 ", " SIMT_NAMES_1 ", " SIMT_NAMES_2 ", " SIMT_NAMES_3 ", " SIMT_NAMES_4 \
                          ", " SIMT_NAMES_5 ", " SIMT_NAMES_6 ", " SIMT_NAMES_7,                  \
             "%128", "%129", "%130", "%131", "%132", SIMT_D16(0), SIMT_D16(16), SIMT_D16(32),     \
             SIMT_D16(48), SIMT_D16(64), SIMT_D16(80), SIMT_D16(96), SIMT_D16(112))

// Register i of d is row 16 * (warp % 4) + lane / 4 + 8 * (i / 2 % 2), column
// 8 * (i / 4) + 2 * (lane % 4) + i % 2.
template <class T, int kN, Major kA = Major::kK, Major kB = Major::kK>
DEVICE void wgmma(float (&d)[kN / 2], uint64_t desc_a, uint64_t desc_b, bool accumulate) {
#define SIMT_CASE(n)                         \
  if constexpr (kN == n) {                   \
    if constexpr (std::is_same_v<T, bf16>) { \
      SIMT_WGMMA_##n("bf16");                \
    } else {                                 \
      SIMT_WGMMA_##n("f16");                 \
    }                                        \
  } else
  SIMT_CASE(16)
  SIMT_CASE(32)
  SIMT_CASE(64)
  SIMT_CASE(96)
  SIMT_CASE(128)
  SIMT_CASE(192)
  SIMT_CASE(256)
  static_assert(kN == 0, "no wrapper of this width");
#undef SIMT_CASE
}

#undef SIMT_WGMMA_16
#undef SIMT_WGMMA_32
#undef SIMT_WGMMA_64
#undef SIMT_WGMMA_96
#undef SIMT_WGMMA_128
#undef SIMT_WGMMA_192
#undef SIMT_WGMMA_256
#undef SIMT_WGMMA
#undef SIMT_D16
#undef SIMT_D4
#undef SIMT_NAMES_0
#undef SIMT_NAMES_1
#undef SIMT_NAMES_2
#undef SIMT_NAMES_3
#undef SIMT_NAMES_4
#undef SIMT_NAMES_5
#undef SIMT_NAMES_6
#undef SIMT_NAMES_7

}  // namespace gemma_ext::simt
