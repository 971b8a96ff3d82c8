// What the files that bind functions to Python share.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "bind/isa/operations.h"

namespace puna {

namespace py = pybind11;
using Address = std::uintptr_t;

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// std::invalid_argument, Python's ValueError, where this machine does not have it.
const Operations& operations(const std::string& isa);

// How many threads may be used of those asked for, at least 1.
int usable_threads(int threads);

// std::invalid_argument where one of `values` is not 0 to limit - 1.
void check_range(const char* name, const int64_t* values, int64_t count, int64_t limit);

void bind_attention(py::module_& m);
void bind_elementwise(py::module_& m);
void bind_products(py::module_& m);

}  // namespace puna
