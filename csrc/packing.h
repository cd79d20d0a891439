// The layout of packed matrices, for everybody who makes or reads them.

#pragma once

#include "kernels.h"
#include "processor.h"

namespace fastllm {

inline int64_t packed_panels(int64_t columns) {
  return (columns + kPackedPanel - 1) / kPackedPanel;
}

// A matrix [depth, columns] in the memory that the caller has for it: `bytes` of data and, for 8
// bits, `scales` numbers.
inline PackedMatrix packed_matrix(Packing packing, int64_t columns, int64_t depth, void* data,
                                  float* scales) {
  const int64_t words = packing == kPackedBFloat16 ? (depth + 1) / 2 : depth;
  const int64_t block = packing == kPackedInt8 ? kPackedInt8Depth : kPackedDepth;
  const int64_t word_bytes = packing == kPackedInt8 ? 1 : 4;
  return {data,    packing == kPackedInt8 ? scales : nullptr,
          packing, columns,
          depth,   words,
          block,   (words + block - 1) / block,
          words * kPackedPanel * word_bytes};
}

// The product of rows of a format with a matrix: bf16 in pairs where the processor is fast at it.
inline Kernel<PackedProduct> packed_product(const PackedMatmulKernels& kernels, Packing packing,
                                            Format rows) {
  static const bool fast = fast_bf16_pairs();
  const bool pairs = fast && kernels.pairs && packing == kPackedBFloat16 && rows == kBFloat16;
  return pairs ? kernels.pairs : kernels.product[packing];
}

}  // namespace fastllm
