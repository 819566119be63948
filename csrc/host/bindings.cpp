// SPDX-License-Identifier: Apache-2.0
// Host-side objects for Python. No torch header here: this module is bound to one Python version,
// the op library to none.
#include <pybind11/pybind11.h>

#include <chrono>
#include <system_error>

#include "common/build_record.h"
#include "host/digest.h"
#include "host/scheduler_binding.h"
#include "host/transfers.h"

namespace py = pybind11;
using gemma_ext::host::Transfer;
using gemma_ext::host::Transfers;

namespace {

// Memory comes as an address, as torch's Tensor.data_ptr() gives it.
void* at(uintptr_t address) { return reinterpret_cast<void*>(address); }

void raise_os_error(std::exception_ptr raised) {
  try {
    if (raised) std::rethrow_exception(raised);
  } catch (const std::system_error& error) {
    py::object value =
        py::reinterpret_borrow<py::object>(PyExc_OSError)(error.code().value(), error.what());
    PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(value.ptr())), value.ptr());
  }
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Host-side objects of gemma_ext.";
  m.def("build_info", &gemma_ext::build_record, "JSON text describing how this library was built.");

  py::register_local_exception_translator(&raise_os_error);

  py::class_<Transfer>(m, "Transfer", "A read, write or copy that runs in the background.")
      .def(
          "wait", [](const Transfer& self) { return self.get(); },
          py::call_guard<py::gil_scoped_release>(),
          "Returns once it is over: the digest where there is one, else 0. Raises the OSError that "
          "ended it.")
      .def(
          "done",
          [](const Transfer& self) {
            return self.wait_for(std::chrono::seconds(0)) == std::future_status::ready;
          },
          "Whether `wait` would return or raise at once.");

  py::class_<Transfers>(m, "Transfers",
                        "Threads for positional reads and writes. Memory is an address that stays "
                        "valid until `wait`.")
      .def(py::init<int>(), py::arg("threads"))
      .def(
          "read",
          [](Transfers& self, int file, int64_t offset, uintptr_t to, int64_t bytes, int direct) {
            return self.read(file, offset, at(to), bytes, direct);
          },
          py::arg("file"), py::arg("offset"), py::arg("to"), py::arg("bytes"),
          py::arg("direct") = -1)
      .def(
          "write",
          [](Transfers& self, int file, int64_t offset, uintptr_t from, int64_t bytes,
             uint64_t seed,
             int direct) { return self.write(file, offset, at(from), bytes, seed, direct); },
          py::arg("file"), py::arg("offset"), py::arg("from_"), py::arg("bytes"), py::arg("seed"),
          py::arg("direct") = -1)
      .def("copy", &Transfers::copy, py::arg("from_"), py::arg("from_offset"), py::arg("to"),
           py::arg("to_offset"), py::arg("bytes"))
      .def(
          "fetch",
          [](Transfers& self, uintptr_t from, uintptr_t to, int64_t bytes, bool mapped) {
            return self.fetch(at(from), at(to), bytes, mapped);
          },
          py::arg("from_"), py::arg("to"), py::arg("bytes"), py::arg("mapped"))
      .def("close", &Transfers::close, py::call_guard<py::gil_scoped_release>())
      .def("check", &Transfers::check, py::arg("file"), py::arg("offset"), py::arg("bytes"),
           py::arg("seed"));

  m.def(
      "drop_mapped",
      [](uintptr_t mapped, int64_t bytes) { gemma_ext::host::drop_mapped(at(mapped), bytes); },
      py::arg("mapped"), py::arg("bytes"),
      "Pages of a mapped file leave this process; any other memory would lose its contents.");
  m.def("reserve", &gemma_ext::host::reserve, py::arg("file"), py::arg("bytes"),
        py::call_guard<py::gil_scoped_release>(),
        "Reserves disk blocks for the first `bytes` of a file and sets its length.");
  m.def(
      "digest",
      [](py::bytes data, uint64_t seed) {
        char* bytes;
        py::ssize_t size;
        if (PyBytes_AsStringAndSize(data.ptr(), &bytes, &size) != 0) throw py::error_already_set();
        return gemma_ext::host::digest(bytes, size, seed);
      },
      py::arg("data"), py::arg("seed") = 0, "XXH64.");

  gemma_ext::host::bind_scheduler(m);
}
