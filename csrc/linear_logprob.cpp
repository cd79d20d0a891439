// Log-probability of the target and entropy of rows of logits, and the gradient that overwrites
// them. With z = softcap * tanh(logits / softcap) / temperature and p = softmax(z):
//   logp = z_t - lse,   entropy = lse - sum p z
//   dz_j = dlogp (1[j = t] - p_j) - dentropy p_j (z_j - lse + entropy)

#include "kernels.h"
#include "softmax_row.h"

namespace fastllm {
namespace {

template <class T>
void forward(const LinearLogprobForward& a, int64_t begin, int64_t end) {
  const Scores scores(a.temperature, a.softcap);
  float z[kBlock];
  for (int64_t row = begin; row < end; ++row) {
    const T* logits = static_cast<const T*>(a.logits) + row * a.vocabulary;
    const int64_t target = a.targets[row];
    float target_score = 0;
    RowSums sums;
    for (int64_t first = 0; first < a.vocabulary; first += kBlock) {
      const int64_t count = a.vocabulary - first < kBlock ? a.vocabulary - first : kBlock;
      sums.add(z, count, score_block(logits + first, z, count, scores));
      if (target >= first && target < first + count) target_score = z[target - first];
    }
    const float log_weight = sums.log_weight();
    a.logp[row] = log_probability(target_score, sums);
    a.entropy[row] = log_weight - sums.distance / sums.weight;
    a.lse[row] = sums.largest + log_weight;
  }
}

template <class T>
void backward(const LinearLogprobBackward& a, int64_t begin, int64_t end) {
  const Scores scores(a.temperature, a.softcap);
  for (int64_t row = begin; row < end; ++row) {
    T* logits = static_cast<T*>(a.logits) + row * a.vocabulary;
    const float lse = a.lse[row], entropy = a.entropy[row];
    const float dlogp = a.dlogp[row], dentropy = a.dentropy[row];
    const int64_t target = a.targets[row];
    const Vec at_target = scores.bounded(load(logits + target, SomeLanes{1}));
    const float p_target = exp(at_target * scores.to_score - lse)[0];
    const float dz_target = dlogp * (1.0f - p_target) -
                            dentropy * p_target * (at_target[0] * scores.to_score - lse + entropy);
    const Vec target_gradient = dz_target * scores.slope(at_target);
    for_each_vector(a.vocabulary, [&](int64_t i, auto lanes) {
      Vec bounded = scores.bounded(load(logits + i, lanes));
      Vec log_p = max(bounded * scores.to_score - lse, broadcast(kVanished));
      Vec dz = -exp(log_p) * (dlogp + dentropy * (log_p + entropy));
      store(logits + i, dz * scores.slope(bounded), lanes);
    });
    store(logits + target, target_gradient, SomeLanes{1});
  }
}

}  // namespace

const LinearLogprobKernels FASTLLM_ISA::linear_logprob = {FASTLLM_FORMATS(forward),
                                                          FASTLLM_FORMATS(backward)};

}  // namespace fastllm
