// The step of AdamW (Loshchilov & Hutter, 2019), and the sum of squares that clipping needs. Both
// are one pass over memory; clipping is a factor in the step, not a pass of its own.

#include "kernels.h"
#include "simd.h"

namespace fastllm {
namespace {

constexpr int kWideLanes = kLanes / 2;
typedef float NarrowVec __attribute__((vector_size(kWideLanes * 4)));
typedef double WideVec __attribute__((vector_size(kWideLanes * 8)));

// In fp64: the square of a gradient may be no fp32, and millions are added.
double sum_of_squares(const float* x, int64_t count) {
  constexpr int kSums = 4;
  WideVec sums[kSums] = {};
  int64_t i = 0;
  for (; i + kSums * kWideLanes <= count; i += kSums * kWideLanes) {
#pragma GCC unroll 4
    for (int s = 0; s < kSums; ++s) {
      const NarrowVec narrow = load_bits<NarrowVec>(x + i + s * kWideLanes);
      const WideVec wide = __builtin_convertvector(narrow, WideVec);
      sums[s] += wide * wide;
    }
  }
  const WideVec all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  double total = 0;
  for (int lane = 0; lane < kWideLanes; ++lane) total += all[lane];
  for (; i < count; ++i) total += static_cast<double>(x[i]) * x[i];
  return total;
}

int64_t block_end(int64_t block, int64_t count) {
  const int64_t end = (block + 1) * kOptimizerBlock;
  return end < count ? end : count;
}

void square_sum(const SquareSum& a, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * kOptimizerBlock;
    a.sums[block] = sum_of_squares(a.gradient + first, block_end(block, a.count) - first);
  }
}

FASTLLM_INLINE Vec square_root(Vec x) {
#if defined(__AVX512F__)
  return bit_cast<Vec>(_mm512_maskz_sqrt_ps(0xffff, bit_cast<__m512>(x)));
#else
  for (int i = 0; i < kLanes; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

void adamw(const AdamW& a, int64_t begin, int64_t end) {
  if (begin >= end) return;
  const int64_t first = begin * kOptimizerBlock;
  for_each_vector(block_end(end - 1, a.count) - first, [&](int64_t offset, auto lanes) {
    const int64_t i = first + offset;
    Vec gradient = load(a.gradient + i, lanes) * a.gradient_scale;
    Vec mean = load(a.mean + i, lanes);
    Vec square = load(a.square + i, lanes);
    mean += (gradient - mean) * a.mean_share;
    square = square * a.beta2 + gradient * gradient * a.square_share;
    store(a.mean + i, mean, lanes);
    store(a.square + i, square, lanes);
    Vec size = square_root(square) * a.root_correction + a.eps;
    Vec parameter = load(a.parameter + i, lanes);
    // Not parameter * (1 - decay): a decay of 1e-6 would lose most of its digits.
    Vec change = parameter * a.decay + mean / size * a.step_size;
    store(a.parameter + i, parameter - change, lanes);
  });
}

}  // namespace

const OptimizerKernels FASTLLM_ISA::optimizer = {square_sum, adamw};

}  // namespace fastllm
