// The filters of a row of scores: top-k, top-p and a lowest score. Each leaves the scores from some
// weakest one up. That one is looked for in a bracket that a few pivots narrow down at a time, in
// one pass over what lies in the bracket.

#pragma once

#include "simd.h"

namespace {

constexpr int kPivots = 8;
constexpr int64_t kPassBlock = 1024;  // scores whose weights are summed in fp32
constexpr float kInfinity = __builtin_inff();

// Integers in the order of the numbers that they stand for, and back. Both zeros are one number.
FASTLLM_INLINE int32_t ordered(float x) {
  const int32_t bits = bit_cast<int32_t>(x + 0.0f);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}
FASTLLM_INLINE float from_ordered(int32_t key) {
  return bit_cast<float>(key ^ ((key >> 31) & 0x7fffffff));
}

// Where the tokens of some scores are, and where those of the chosen ones go.
struct Tokens {
  const int32_t* from;  // null: score i is that of token i
  int32_t* to;          // null: nobody asks
};

// Copies the scores in [low, high), in order, and returns how many. Source and destination may be
// the same; the destination has room for a vector more than it gets.
#if defined(__AVX512F__)

inline int64_t copy_between(const float* scores, int64_t count, float low, float high, float* out,
                            Tokens tokens) {
  const __m512 lowest = bit_cast<__m512>(broadcast(low)), end = bit_cast<__m512>(broadcast(high));
  const __m512i first_lanes =
      _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  int64_t kept = 0;
  for_each_vector(count, [&](int64_t i, auto lanes) {
    const __m512 x = bit_cast<__m512>(only(load(scores + i, lanes), lanes, -kInfinity));
    __mmask16 in =
        _mm512_cmp_ps_mask(x, lowest, _CMP_GE_OQ) & _mm512_cmp_ps_mask(x, end, _CMP_LT_OQ);
    if (count - i < kLanes) in &= (1u << (count - i)) - 1;
    if (in == 0) return;
    if (tokens.to) {
      const __m512i token =
          tokens.from ? _mm512_maskz_loadu_epi32(in, tokens.from + i)
                      : _mm512_add_epi32(first_lanes, _mm512_set1_epi32(static_cast<int>(i)));
      _mm512_storeu_si512(tokens.to + kept, _mm512_maskz_compress_epi32(in, token));
    }
    _mm512_storeu_ps(out + kept, _mm512_maskz_compress_ps(in, x));
    kept += __builtin_popcount(in);
  });
  return kept;
}

#else

inline int64_t copy_between(const float* scores, int64_t count, float low, float high, float* out,
                            Tokens tokens) {
  int64_t kept = 0;
  for_each_vector(count, [&](int64_t i, auto lanes) {
    const Vec x = load(scores + i, lanes);
    const int64_t end = count - i < kLanes ? count - i : kLanes;
    if (end == kLanes && largest(x) < low) return;
    for (int64_t lane = 0; lane < end; ++lane) {
      if (tokens.to) tokens.to[kept] = tokens.from ? tokens.from[i + lane] : i + lane;
      out[kept] = x[lane];
      kept += x[lane] >= low && x[lane] < high;
    }
  });
  return kept;
}

#endif

// The weakest score that stays.
struct Weakest {
  float score;
  double above;  // weight of the larger ones
  int64_t ties;  // how many scores equal it; 0 where it was not found, and all stay
};

// Sums the weights of the scores from each pivot up; `weigh` gives the weights of a vector.
template <class Weigh>
FASTLLM_INLINE void weigh_from(const float* pivots, const float* scores, int64_t count,
                               double* weights, Weigh weigh) {
  for (int j = 0; j < kPivots; ++j) weights[j] = 0;
  for (int64_t first = 0; first < count; first += kPassBlock) {
    const int64_t size = count - first < kPassBlock ? count - first : kPassBlock;
    Vec sums[kPivots] = {};
    for_each_vector(size, [&](int64_t i, auto lanes) {
      const Vec x = only(load(scores + first + i, lanes), lanes, -kInfinity);
      const Vec weight = weigh(x);
      for (int j = 0; j < kPivots; ++j) sums[j] += x >= pivots[j] ? weight : Vec{};
    });
    for (int j = 0; j < kPivots; ++j) weights[j] += sum(sums[j]);
  }
}

// The largest score that weighs at least `wanted` together with the larger ones.
template <class Weigh>
FASTLLM_INLINE Weakest weakest(const float* scores, int64_t count, float largest, double wanted,
                               float* bracket, Weigh weigh) {
  int64_t low = ordered(-kInfinity), high = int64_t{ordered(largest)} + 1;
  double above = 0;
  float pivots[kPivots];
  // Few scores of a vocabulary of any size come close to the largest.
  for (int j = 0; j < kPivots; ++j) pivots[j] = largest - 0.25f * (1 << j);
  for (;;) {
    double weights[kPivots];
    weigh_from(pivots, scores, count, weights, weigh);
    double heavier = above;
    for (int j = 0; j < kPivots; ++j) {
      const int64_t pivot = ordered(pivots[j]);
      if (pivot <= low || pivot >= high) continue;
      if (above + weights[j] >= wanted) {
        low = pivot;
        break;
      }
      high = pivot;
      heavier = above + weights[j];
    }
    above = heavier;
    count = copy_between(scores, count, from_ordered(low), from_ordered(high), bracket, {});
    scores = bracket;
    if (high - low <= 1 || count <= 1) break;
    for (int j = 0; j < kPivots; ++j) {
      pivots[j] = from_ordered(low + (high - low) * (kPivots - j) / (kPivots + 1));
    }
  }
  return {count > 0 ? scores[0] : from_ordered(low), above, count};
}

// The tokens that the filters have left so far, in the order of the vocabulary.
struct Candidates {
  float* scores;
  int64_t count;
  int32_t* tokens;
  bool all;  // nothing was left out yet: token i is i

  int64_t token(int64_t i) const { return all ? i : tokens[i]; }

  void keep(float lowest) {
    count =
        copy_between(scores, count, lowest, kInfinity, scores, {all ? nullptr : tokens, tokens});
    all = false;
  }

  // The k largest, and those as large as the last of them.
  void keep_top(int64_t k, float largest, float* bracket) {
    const auto one = [](Vec) { return broadcast(1.0f); };
    keep(weakest(scores, count, largest, static_cast<double>(k), bracket, one).score);
  }

  // The fewest largest that hold a share of `weight`, the sum of e^(score - largest). Of those as
  // large as the last, the later ones.
  void keep_share(float share, float largest, float weight, float* bracket) {
    const double wanted = static_cast<double>(share) * weight;
    const Weakest last =
        weakest(scores, count, largest, wanted, bracket, [=](Vec x) { return exp(x - largest); });
    keep(last.score);
    const double tie = exp(broadcast(last.score - largest))[0];
    int64_t stay = 1;
    while (stay < last.ties && last.above + stay * tie < wanted) ++stay;
    if (stay < last.ties) leave_out(last.score, last.ties - stay);
  }

 private:
  // The first `ties` of the scores that equal `score`.
  void leave_out(float score, int64_t ties) {
    int64_t kept = 0;
    for (int64_t i = 0; i < count; ++i) {
      if (scores[i] == score && ties-- > 0) continue;
      scores[kept] = scores[i];
      tokens[kept++] = tokens[i];
    }
    count = kept;
  }
};

}  // namespace
