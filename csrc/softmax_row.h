// The softmax of a row of scores, block by block: what a trainer computes of a token's
// log-probability, and what drawing a token computes, with the same bits.

#pragma once

#include "simd.h"

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

  FASTLLM_INLINE void add(const float* z, int64_t count, float block_largest) {
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

  FASTLLM_INLINE float log_weight() const { return __builtin_logf(weight); }

  FASTLLM_INLINE void rescale(float now_largest) {
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
FASTLLM_INLINE float score_block(const T* logits, float* z, int64_t count, const Scores& scores) {
  Vec highest = broadcast(kLowest);
  for_each_vector(count, [&](int64_t i, auto lanes) {
    Vec score = scores.bounded(load(logits + i, lanes)) * scores.to_score;
    store(z + i, score, lanes);
    highest = max(only(score, lanes, kLowest), highest);
  });
  return largest(highest);
}

// Log-probability of a score. Both differences are taken from the largest score: nothing cancels.
FASTLLM_INLINE float log_probability(float score, const RowSums& sums) {
  return score - sums.largest - sums.log_weight();
}

}  // namespace
