// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <pybind11/pybind11.h>

namespace gemma_ext::host {

void bind_scheduler(pybind11::module_& m);

}  // namespace gemma_ext::host
