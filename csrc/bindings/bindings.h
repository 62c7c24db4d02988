// The Python module dive_fast._native: these files convert arguments and results, and hold no logic. No other file
// knows Python.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>

namespace dive::bindings {

namespace py = pybind11;
using namespace py::literals;

// Tensors are given by address, 0 for None.
using Address = std::uintptr_t;

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

void bind_linear_cross_entropy(py::module_ m);
void bind_steer(py::module_ m);
void bind_engine(py::module_ m);
void bind_decode(py::module_ m);

}  // namespace dive::bindings
