// Log-probability of the target and entropy of rows of logits, and the gradient that overwrites
// them. With z = softcap * tanh(logits / softcap) / temperature and p = softmax(z):
//   logp = z_t - lse,   entropy = lse - sum p z
//   dz_j = dlogp (1[j = t] - p_j) - dentropy p_j (z_j - lse + entropy)

#include "kernels.h"
#include "simd.h"

namespace fastllm {
namespace {

constexpr int64_t kBlock = 1024;          // logits scored at a time: they stay in the L1 cache
constexpr float kLowest = -3.402823e38f;  // finite, so that differences are never NaN
constexpr float kVanished = -200.0f;      // e^-200 is 0, and 0 * -200 is 0 where 0 * -inf is NaN

// From logits to the scores that softmax sees.
struct Scores {
  float softcap, to_cap, to_score;

  Scores(float temperature, float cap)
      : softcap(cap),
        to_cap(cap > 0 ? 1.0f / cap : 0),
        to_score((cap > 0 ? cap : 1) / temperature) {}

  // In units of the cap, if there is one.
  FASTLLM_INLINE Vec bounded(Vec logits) const {
    return softcap > 0 ? tanh(logits * to_cap) : logits;
  }
  // The slope of a score in its logit, given the bounded logit.
  FASTLLM_INLINE Vec slope(Vec bounded) const {
    return softcap > 0 ? (1.0f - bounded * bounded) * (to_score * to_cap) : broadcast(to_score);
  }
};

// Running log-sum-exp of a row: the largest score, and the sums of e^d and e^d d, where d is a
// score's distance to the largest.
struct RowSums {
  float largest = kLowest, weight = 0, distance = 0;

  void add(const float* z, int64_t count, float block_largest) {
    if (block_largest > largest) rescale(block_largest);
    Vec weights = {}, distances = {};
    for_each_vector(count, [&](int64_t i, auto lanes) {
      Vec d = max(only(load(z + i, lanes) - largest, lanes, kVanished), broadcast(kVanished));
      Vec e = exp(d);
      weights += e;
      distances += e * d;
    });
    weight += sum(weights);
    distance += sum(distances);
  }

  void rescale(float now_largest) {
    const float shift = largest - now_largest;
    if (weight > 0) {
      const float factor = __builtin_expf(shift);
      distance = factor > 0 ? factor * (distance + shift * weight) : 0;
      weight *= factor;
    }
    largest = now_largest;
  }
};

// Writes the scores of a block and returns the largest.
template <class T>
float score_block(const T* logits, float* z, int64_t count, const Scores& scores) {
  Vec highest = broadcast(kLowest);
  for_each_vector(count, [&](int64_t i, auto lanes) {
    Vec score = scores.bounded(load(logits + i, lanes)) * scores.to_score;
    store(z + i, score, lanes);
    highest = max(only(score, lanes, kLowest), highest);
  });
  return largest(highest);
}

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
    const float log_weight = __builtin_logf(sums.weight);
    // Both differences are taken from the largest score: nothing cancels.
    a.logp[row] = target_score - sums.largest - log_weight;
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
