// SPDX-License-Identifier: Apache-2.0
// The instruction sets this library was built for, and which of them this processor runs.
#include <stdlib.h>
#include <string.h>
#if defined(GEMMA_EXT_X86)
#include <cpuid.h>
#endif

#include "../params.h"

namespace gemma_ext {
using namespace cce;

namespace baseline {
extern const Kernels kKernels;
}
#if defined(GEMMA_EXT_X86)
namespace avx2 {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}
namespace avx512bf16 {
extern const Kernels kKernels;
}
#endif

namespace {

struct Build {
  const Kernels* kernels;
  bool runs, preferred;
};

#if defined(GEMMA_EXT_X86)
// clang 14 does not know F16C in __builtin_cpu_supports.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

const Kernels* choose() {
#if defined(GEMMA_EXT_X86)
#define GEMMA_EXT_HAS(feature) (__builtin_cpu_supports(feature) != 0)
  const bool has2 = GEMMA_EXT_HAS("avx2") && GEMMA_EXT_HAS("fma") && has_f16c();
  const bool has512 = GEMMA_EXT_HAS("avx512f") && GEMMA_EXT_HAS("avx512bw") &&
                      GEMMA_EXT_HAS("avx512dq") && GEMMA_EXT_HAS("avx512vl");
  const bool has_bf16 = has512 && GEMMA_EXT_HAS("avx512bf16");
#undef GEMMA_EXT_HAS
  // VDPBF16PS doubles the rate of fp32 on Zen 4 (226 against 113 GFLOP/s per core) and halves it on
  // Emerald Rapids (80 against 165), so Intel converts to fp32 while packing.
  const Build builds[] = {
      {&avx512bf16::kKernels, has_bf16, !__builtin_cpu_is("intel")},
      {&avx512::kKernels, has512, true},
      {&avx2::kKernels, has2, true},
      {&baseline::kKernels, true, true},
  };
#else
  const Build builds[] = {{&baseline::kKernels, true, true}};
#endif
  const char* asked = getenv("GEMMA_EXT_CPU_ISA");
  for (const Build& b : builds)
    if (b.runs && (asked && *asked ? strcmp(asked, b.kernels->isa) == 0 : b.preferred))
      return b.kernels;
  return nullptr;
}

}  // namespace

const Kernels* cce::chosen_kernels() {
  static const Kernels* const chosen = choose();
  return chosen;
}

}  // namespace gemma_ext
