// SPDX-License-Identifier: Apache-2.0
// The instruction sets this library was built for, and which of them this processor runs.
#include <stdlib.h>
#include <string.h>

#include "../params.h"

namespace gemma_ext {

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

const Kernels& choose() {
#if defined(GEMMA_EXT_X86)
  const char* asked = getenv("GEMMA_EXT_CPU_ISA");
  const auto allowed = [&](const Kernels& k) { return !asked || strcmp(asked, k.isa) == 0; };
  const bool has512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has512 && __builtin_cpu_supports("avx512bf16") && allowed(avx512bf16::kKernels))
    return avx512bf16::kKernels;
  if (has512 && allowed(avx512::kKernels)) return avx512::kKernels;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && allowed(avx2::kKernels))
    return avx2::kKernels;
#endif
  return baseline::kKernels;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace gemma_ext
