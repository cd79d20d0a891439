// Draws the next token of rows of logits, or takes the likeliest. What a filter leaves is found by
// narrowing down the weakest score that stays, never by sorting the vocabulary.

#include "kernels.h"
#include "sampling_filters.h"
#include "softmax_row.h"

namespace fastllm {
namespace {

// ---- Random numbers -------------------------------------------------------------------------

// The finaliser of SplitMix64 (Steele, Lea and Flood, 2014).
uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// The `count`-th number in [0, 1) of a stream: as many bits as an fp32 holds.
float uniform(int64_t key, int32_t count) {
  constexpr uint64_t kGolden = 0x9e3779b97f4a7c15u;
  const uint64_t state =
      static_cast<uint64_t>(key) + static_cast<uint64_t>(int64_t{count}) * kGolden;
  return static_cast<float>(mix(state + kGolden) >> 40) * 0x1p-24f;
}

// ---- The softmax of a row -------------------------------------------------------------------

// What a row's softmax had summed up to after a block.
struct Sum {
  float largest, weight;
};

// softmax(logits / temperature) of a row, which is summed once and may then be asked.
class Distribution {
 public:
  // `sums` has room for one entry per block.
  Distribution(const float* logits, int64_t count, float temperature, Sum* sums)
      : logits_(logits), count_(count), scores_(temperature, 0), sums_(sums) {
    float z[kBlock];
    for (int64_t block = 0; block * kBlock < count; ++block) {
      total_.add(z, size(block), score(block, z));
      sums[block] = {total_.largest, total_.weight};
    }
  }

  bool finite() const { return total_.weight > 0 && total_.weight * 0.0f == 0; }
  float largest() const { return total_.largest; }
  float weight() const { return total_.weight; }
  float logp(int64_t i) const { return log_probability(rounded_score(i), total_); }

  // The first of the largest.
  int64_t likeliest() const {
    int64_t block = 0;
    while ((block + 1) * kBlock < count_ && sums_[block].largest != total_.largest) ++block;
    float z[kBlock];
    score(block, z);
    int64_t i = 0;
    while (i + 1 < size(block) && z[i] != total_.largest) ++i;
    return block * kBlock + i;
  }

  // The place at which the cumulative distribution passes a share in [0, 1): in the first block
  // that passes it or, where rounding says otherwise there, at the next that is not impossible.
  int64_t at(float share) const {
    const double target = static_cast<double>(share) * total_.weight;
    int64_t last = 0;
    double before = 0;
    float z[kBlock];
    for (int64_t block = 0; block * kBlock < count_; ++block) {
      const double after =
          sums_[block].weight *
          static_cast<double>(__builtin_expf(sums_[block].largest - total_.largest));
      if (after > target) {
        score(block, z);
        double reached = before;
        for (int64_t i = 0; i < size(block); i += kLanes) {
          const Vec e = weights(z, i, size(block) - i);
          const float sum_of_all = sum(e);
          if (sum_of_all > 0) last = block * kBlock + i + last_possible(e);
          if (reached + sum_of_all > target) {
            const int lane = passing(e, target - reached);
            if (lane < kLanes) return block * kBlock + i + lane;
          }
          reached += sum_of_all;
        }
      }
      before = after;
    }
    return last;
  }

 private:
  int64_t size(int64_t block) const {
    const int64_t left = count_ - block * kBlock;
    return left < kBlock ? left : kBlock;
  }
  // Not inline: the product is rounded by itself, where a fused one would give other bits.
  __attribute__((noinline)) float rounded_score(int64_t i) const {
    return logits_[i] * scores_.to_score;
  }
  float score(int64_t block, float* z) const {
    return score_block(logits_ + block * kBlock, z, size(block), scores_);
  }
  Vec weights(const float* z, int64_t i, int64_t left) const {
    if (left >= kLanes) return exp(load(z + i) - total_.largest);
    const SomeLanes lanes{static_cast<int>(left)};
    return exp(only(load(z + i, lanes) - total_.largest, lanes, kVanished));
  }
  static int last_possible(Vec e) {
    int lane = kLanes - 1;
    while (lane > 0 && !(e[lane] > 0)) --lane;
    return lane;
  }
  static int passing(Vec e, double target) {
    double reached = 0;
    int lane = 0;
    for (; lane < kLanes; ++lane) {
      reached += e[lane];
      if (reached > target && e[lane] > 0) break;
    }
    return lane;
  }

  const float* logits_;
  int64_t count_;
  Scores scores_;
  Sum* sums_;
  RowSums total_;
};

// ---- One row --------------------------------------------------------------------------------

// The memory that a row needs.
struct Workspace {
  Sum* sums;
  float *scores, *bracket;
  int32_t* tokens;

  Workspace(int64_t vocabulary, bool filtered) {
    const int64_t blocks = (vocabulary + kBlock - 1) / kBlock, room = vocabulary + kLanes;
    float* memory = scratch(2 * blocks + (filtered ? 3 * room : 0));
    sums = reinterpret_cast<Sum*>(memory);
    scores = memory + 2 * blocks;
    bracket = scores + room;
    tokens = reinterpret_cast<int32_t*>(bracket + room);
  }
};

// How one row draws.
struct Row {
  float temperature, top_p, min_p, penalty;
  int64_t top_k;
  const uint8_t* seen;
  const int32_t *stops, *stops_end;  // tokens that may not be drawn
  float share;
  bool greedy;

  Row(const SamplingRows& rows, int64_t row, int64_t vocabulary)
      : temperature(rows.temperature[row]),
        top_p(rows.top_p[row]),
        min_p(rows.min_p[row]),
        penalty(rows.seen_stride > 0 ? rows.repetition_penalty[row] : 1.0f),
        top_k(rows.top_k[row] < vocabulary ? rows.top_k[row] : 0),
        seen(rows.seen + row * rows.seen_stride),
        stops(rows.stop_tokens + row * rows.stop_stride),
        stops_end(stops + (rows.count[row] < rows.min_count[row] ? rows.stop_stride : 0)),
        share(uniform(rows.key[row], rows.count[row])),
        greedy(temperature == 0) {
    if (greedy) temperature = 1;
  }

  // Whether the scores are others than logits / temperature.
  bool adjusted() const { return penalty != 1 || stops != stops_end; }
  bool filtered() const { return !greedy && (top_k > 0 || top_p < 1 || min_p > 0); }
};

// The scores that the filters see.
void adjust(const Row& row, const float* logits, int64_t vocabulary, float* scores) {
  const float to_score = 1.0f / row.temperature, penalty = row.penalty;
  const uint8_t* seen = row.seen;
  if (penalty == 1) {
    for (int64_t i = 0; i < vocabulary; ++i) scores[i] = logits[i] * to_score;
  } else {
    for (int64_t i = 0; i < vocabulary; ++i) {
      const float penalised = logits[i] < 0 ? logits[i] * penalty : logits[i] / penalty;
      scores[i] = (seen[i] ? penalised : logits[i]) * to_score;
    }
  }
  for (const int32_t* stop = row.stops; stop < row.stops_end; ++stop) {
    if (*stop >= 0 && *stop < vocabulary) scores[*stop] = -kInfinity;
  }
}

struct Drawn {
  int64_t token;
  float logp;  // under the distribution that the token was drawn from
};

Drawn pick(const Row& row, const Distribution& from) {
  const int64_t token = row.greedy ? from.likeliest() : from.at(row.share);
  return {token, from.logp(token)};
}

Drawn draw_filtered(const Row& row, const Distribution& from, int64_t vocabulary,
                    const Workspace& work) {
  const float largest = from.largest();
  float weight = from.weight();
  Candidates left = {work.scores, vocabulary, work.tokens, true};
  if (row.top_k > 0) {
    left.keep_top(row.top_k, largest, work.bracket);
    if (row.top_p < 1) weight = Distribution(left.scores, left.count, 1, work.sums).weight();
  }
  if (row.top_p < 1) left.keep_share(row.top_p, largest, weight, work.bracket);
  if (row.min_p > 0) left.keep(largest + __builtin_logf(row.min_p));
  const Drawn drawn = pick(row, Distribution(left.scores, left.count, 1, work.sums));
  return {left.token(drawn.token), drawn.logp};
}

void draw_row(const DrawTokens& a, int64_t index) {
  const float* logits = a.logits + index * a.vocabulary;
  const Row row(a.rows, index, a.vocabulary);
  const Workspace work(a.vocabulary, row.adjusted() || row.filtered());
  const Distribution natural(logits, a.vocabulary, row.temperature, work.sums);
  Distribution from = natural;
  if (natural.finite() && (row.adjusted() || row.filtered())) {
    adjust(row, logits, a.vocabulary, work.scores);
    if (row.adjusted()) from = Distribution(work.scores, a.vocabulary, 1, work.sums);
  }
  const bool filter = row.filtered() && from.finite();
  const Drawn drawn = filter ? draw_filtered(row, from, a.vocabulary, work) : pick(row, from);
  a.tokens[index] = drawn.token;
  a.logprobs[index] = natural.logp(drawn.token);
  a.sampling_logprobs[index] = row.greedy ? 0 : drawn.logp;
}

void draw(const DrawTokens& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) draw_row(a, row);
}

}  // namespace

const SamplingKernels FASTLLM_ISA::sampling = {draw};

}  // namespace fastllm
