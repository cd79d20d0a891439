// The kernels of every instruction set that this library was built for, and the choice among them.

#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace fastllm {

struct Kernels {
  const char* isa;
  const MatmulKernels& matmul;
  const PackedMatmulKernels& packed_matmul;
  const RmsNormKernels& rms_norm;
  const RopeKernels& rope;
  const SwigluKernels& swiglu;
  const AttentionKernels& attention;
  const DecodeAttentionKernels& decode_attention;
  const LinearLogprobKernels& linear_logprob;
  const SamplingKernels& sampling;
  const PairwiseLossKernels& pairwise_loss;
  const OptimizerKernels& optimizer;
};

// The kernels for this CPU, or those that the environment variable FASTLLM_ISA names. Chosen once.
// Throws std::runtime_error when FASTLLM_ISA names a set that is unknown or that the CPU lacks.
const Kernels& kernels();

// Names of the instruction sets that were built, the most basic first.
std::vector<std::string> isa_levels();

}  // namespace fastllm
