#pragma once

#include <pybind11/pybind11.h>

namespace fastllm {

// Adds the class Decoder to the module.
void bind_decoder(pybind11::module_& module);

}  // namespace fastllm
