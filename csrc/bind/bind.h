// What the files that bind functions to Python share.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "bind/isa/operations.h"

namespace puna {

namespace py = pybind11;
using namespace py::literals;

using Address = std::uintptr_t;

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// Throws std::invalid_argument, Python's ValueError, for a set that this machine cannot run.
const Operations& operations(const std::string& isa);

// How many of `threads` threads may be used, at least 1.
int usable_threads(int threads);

// Throws std::invalid_argument where one of `values` is not 0 to limit - 1.
void check_range(const char* name, const int64_t* values, int64_t count, int64_t limit);

// Calls an operation without the interpreter's lock.
template <typename Operation, typename... Arguments>
auto run(Operation Operations::* operation, const std::string& isa, int threads,
         const Arguments&... arguments) {
  const Operations& native = operations(isa);
  threads = usable_threads(threads);
  py::gil_scoped_release released;
  return (native.*operation)(arguments..., threads);
}

void bind_attention(py::module_& m);
void bind_elementwise(py::module_& m);
void bind_engine(py::module_& m);
void bind_products(py::module_& m);

}  // namespace puna
