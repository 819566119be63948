// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <stdlib.h>
#include <torch/headeronly/util/Exception.h>

#include "common/cpu/isa.h"

namespace gemma_ext {

// Name of the instruction set in use; every CPU binding asks before it runs a kernel.
inline const char* checked_isa() {
  const int chosen = cpu::chosen_isa();
  STD_TORCH_CHECK(chosen >= 0, "expected GEMMA_EXT_CPU_ISA to be ", cpu::isa_names(),
                  ", and one that this processor runs, got ", getenv("GEMMA_EXT_CPU_ISA"));
  return cpu::isa_name(chosen);
}

}  // namespace gemma_ext
