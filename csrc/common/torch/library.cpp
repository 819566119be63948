// SPDX-License-Identifier: Apache-2.0
// Opens the namespace gemma_ext; families add to it with STABLE_TORCH_LIBRARY_FRAGMENT.
#include <torch/csrc/stable/library.h>

#include <string>

#include "common/build_record.h"
#include "common/torch/cpu.h"

namespace {

// The loader asks for this op before loading: a second copy of the library in one process would
// register the same schemas twice, which aborts.
std::string build_info() { return gemma_ext::build_record(); }

std::string cpu_isa() { return gemma_ext::checked_isa(); }

}  // namespace

STABLE_TORCH_LIBRARY(gemma_ext, m) {
  m.def("build_info() -> str");
  m.impl("build_info", TORCH_BOX(&build_info));
  m.def("cpu_isa() -> str");
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
}
