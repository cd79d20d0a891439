// Bradley-Terry loss of pairs of scores, with margin and centring, and its gradient:
//   loss = mean(softplus(-(c - r - m))) + centering mean((c + r)^2)

#include "kernels.h"
#include "simd.h"

namespace fastllm {
namespace {

template <class T>
float to_float(const T* p) {
  return load(p, SomeLanes{1})[0];
}

// log(1 + e^x) without overflow.
float softplus(float x) {
  return (x > 0 ? x : 0) + __builtin_log1pf(__builtin_expf(-__builtin_fabsf(x)));
}

// 1 / (1 + e^-x) without overflow.
float logistic(float x) {
  const float e = __builtin_expf(-__builtin_fabsf(x));
  return (x < 0 ? e : 1.0f) / (1.0f + e);
}

template <class T>
void forward(const PairwiseLossForward& a, int64_t begin, int64_t end) {
  const T* chosen = static_cast<const T*>(a.chosen);
  const T* rejected = static_cast<const T*>(a.rejected);
  const T* margin = static_cast<const T*>(a.margin);
  const float share = 1.0f / (end - begin);
  double total = 0;
  for (int64_t i = begin; i < end; ++i) {
    const float c = to_float(chosen + i);
    const float r = to_float(rejected + i);
    const float lead = c - r - (margin ? to_float(margin + i) : 0.0f);
    const float push = -logistic(-lead) * share;
    const float pull = 2.0f * a.centering * (c + r) * share;
    total += softplus(-lead) + a.centering * (c + r) * (c + r);
    a.dchosen[i] = push + pull;
    a.drejected[i] = pull - push;
  }
  *a.loss = total / (end - begin);
}

}  // namespace

const PairwiseLossKernels FASTLLM_ISA::pairwise_loss = {FASTLLM_FORMATS(forward)};

}  // namespace fastllm
