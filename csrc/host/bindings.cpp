// SPDX-License-Identifier: Apache-2.0
// Host-side objects for Python. No torch header here: this module is bound to one Python version,
// the op library to none.
#include <pybind11/pybind11.h>

#include "common/build_record.h"

PYBIND11_MODULE(_host, m) {
  m.doc() = "Host-side objects of gemma_ext.";
  m.def("build_info", &gemma_ext::build_record, "JSON text describing how this library was built.");
}
