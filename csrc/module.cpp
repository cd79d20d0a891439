// The Python module fastllm._C. Importing it also registers the ops of bindings_*.cpp with PyTorch
// (as torch.ops.fastllm.*), because they are in the same shared object.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings_decoder.h"
#include "dispatch.h"
#include "memory.h"
#include "processor.h"

PYBIND11_MODULE(_C, module) {
  module.doc() = "C++ kernels of fastllm for CPUs";
  fastllm::kernels();  // a bad FASTLLM_ISA is an error of the import, not of the first op
  module.def(
      "isa", [] { return fastllm::kernels().isa; }, "Instruction set that the kernels run on.");
  module.def("isa_levels", &fastllm::isa_levels,
             "Instruction sets that were built, the most basic first.");
  module.def("fast_bf16_dot", &fastllm::fast_bf16_dot,
             "Whether this processor multiplies bf16 faster than fp32.");
  module.def("keep_memory", &fastllm::keep_memory,
             "Keep freed memory for the next allocations; whether the C library can.");
  module.def(
      "prefer_large_pages",
      [](uintptr_t memory, size_t bytes) {
        fastllm::prefer_large_pages(reinterpret_cast<void*>(memory), bytes);
      },
      "Ask for large pages for fresh memory at an address.");
  fastllm::bind_decoder(module);
}
