// SPDX-License-Identifier: Apache-2.0
#include "../../common/cpu/isa.h"
#include "kernels.h"

namespace gemma_ext::depth_batching {

#define GEMMA_EXT_DECLARE(isa)   \
  namespace isa {                \
  extern const Kernels kKernels; \
  }
#define GEMMA_EXT_ADDRESS(isa) &isa::kKernels,

GEMMA_EXT_ISAS(GEMMA_EXT_DECLARE)

const Kernels& kernels() {
  static const Kernels* const builds[] = {GEMMA_EXT_ISAS(GEMMA_EXT_ADDRESS)};
  return *builds[gemma_ext::cpu::chosen_isa()];
}

}  // namespace gemma_ext::depth_batching
