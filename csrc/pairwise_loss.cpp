// Bradley-Terry loss of pairs of scores, with margin and centring, and its gradient:
//   loss = mean(softplus(-(c - r - m))) + centering mean((c + r)^2)

#include "kernels.h"
#include "simd.h"

namespace fastllm {
namespace {

// log(1 + e) for e in 0..1: with s = e / (2 + e) it is 2 artanh(s), whose series in s <= 1/3 is short.
FASTLLM_INLINE Vec log1p_of_fraction(Vec e) {
  const Vec s = e / (e + 2.0f);
  const Vec square = s * s;
  Vec p = square * (1.0f / 15) + 1.0f / 13;
  p = p * square + 1.0f / 11;
  p = p * square + 1.0f / 9;
  p = p * square + 1.0f / 7;
  p = p * square + 1.0f / 5;
  p = p * square + 1.0f / 3;
  return 2.0f * s * (p * square + 1.0f);
}

// Adds the lanes in fp64.
FASTLLM_INLINE double wide_sum(Vec v) {
  double total = 0;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
}

template <class T>
double sum_of_block(const PairwiseLossForward& a, int64_t begin, int64_t end) {
  const T* chosen = static_cast<const T*>(a.chosen) + begin;
  const T* rejected = static_cast<const T*>(a.rejected) + begin;
  const T* margin = a.margin ? static_cast<const T*>(a.margin) + begin : nullptr;
  const float share = 1.0f / a.pairs;
  double total = 0;
  for_each_vector(end - begin, [&](int64_t i, auto lanes) {
    const Vec c = load(chosen + i, lanes), r = load(rejected + i, lanes);
    Vec lead = c - r;
    if (margin) lead -= load(margin + i, lanes);
    // softplus(-lead) and its slope, without overflow.
    const Vec e = exp(-abs(lead));
    const Vec softplus = max(-lead, Vec{}) + log1p_of_fraction(e);
    const Vec push = (lead > 0.0f ? e : broadcast(1.0f)) / (e + 1.0f) * -share;
    const Vec pull = (c + r) * (2.0f * a.centering * share);
    const Vec loss = softplus + (c + r) * (c + r) * a.centering;
    total += wide_sum(only(loss, lanes, 0.0f));
    store(a.dchosen + begin + i, push + pull, lanes);
    store(a.drejected + begin + i, pull - push, lanes);
  });
  return total;
}

template <class T>
void forward(const PairwiseLossForward& a, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * kPairBlock;
    const int64_t last = first + kPairBlock < a.pairs ? first + kPairBlock : a.pairs;
    a.sums[block] = sum_of_block<T>(a, first, last);
  }
}

}  // namespace

const PairwiseLossKernels FASTLLM_ISA::pairwise_loss = {FASTLLM_FORMATS(forward)};

}  // namespace fastllm
