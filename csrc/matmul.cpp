#include "kernels.h"
#include "simd.h"
namespace fastllm {
namespace {
void product(const Matmul&, int64_t, int64_t) {}
}
const MatmulKernels FASTLLM_ISA::matmul = {512, 512, product};
}
