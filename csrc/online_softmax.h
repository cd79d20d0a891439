// Attention of a tile of query rows over runs of keys, block by block (Milakov & Gimelshein, 2018;
// Dao, 2023): the scores of a panel of rows and a tile of keys live in the L1 cache only. Shared by
// attention.cpp and decode_attention.cpp.

#pragma once

#include "tile.h"

namespace {

constexpr float kHidden = -__builtin_inff();  // score of a key that a query does not see
constexpr float kLowest = -3.402823e38f;      // finite, so that differences are never NaN

// Scores become exponents of two, which is cheaper than powers of e. In fp64, so that going back
// and forth costs a log-sum-exp no bits.
constexpr double kLog2E = 1.44269504088896341;
constexpr double kLn2 = 0.69314718055994531;

// Keys in consecutive rows, which have consecutive positions in their sequence.
template <class T>
struct KeyRun {
  const T* keys;
  const T* values;
  int64_t key_stride, value_stride;  // numbers between rows
  int64_t count;
  int64_t position;  // of the first
};

template <class T>
FASTLLM_INLINE const T* at(const fastllm::HeadRows& m, int64_t row, int64_t head) {
  return static_cast<const T*>(m.data) + row * m.row_stride + head * m.head_stride;
}
template <class T>
FASTLLM_INLINE T* at(const fastllm::OutHeadRows& m, int64_t row, int64_t head) {
  return static_cast<T*>(m.data) + row * m.row_stride + head * m.head_stride;
}

// Rows [first, first + count) of one head.
template <class T>
KeyRun<T> run_of(const fastllm::HeadRows& keys, const fastllm::HeadRows& values, int64_t first,
                 int64_t count, int64_t head, int64_t position) {
  return {at<T>(keys, first, head), at<T>(values, first, head), keys.row_stride, values.row_stride,
          count, position};
}

// ---- Who sees what --------------------------------------------------------------------------

// Keys of a run, or of a tile of it, that a query sees.
struct Span {
  int64_t begin, end;
};

constexpr int64_t kNoWindow = 1 << 30;  // more than any position
FASTLLM_INLINE int64_t finite_window(int64_t window) {
  return window > 0 ? smaller(window, kNoWindow) : kNoWindow;
}

// A query at `position` sees keys at positions in (position - window, position].
FASTLLM_INLINE Span seen(int64_t position, int64_t window, int64_t first_key, int64_t count) {
  return {larger(0, position + 1 - window - first_key), smaller(count, position + 1 - first_key)};
}

// The positions of a panel of query rows, of which some may be asked not to look at all.
struct Viewers {
  alignas(64) int32_t positions[kPanel];  // -1: does not look
  int64_t lowest = kNoWindow, highest = -1;
  int vectors;           // that hold rows
  bool everybody = true;  // looks

  // Those of rows [begin, end) in the panel that starts at `first`, of a tile of `rows`.
  void read(const int32_t* tile_positions, int rows, int first, int begin, int end) {
    vectors = static_cast<int>(smaller(2, (rows - first + kLanes - 1) / kLanes));
    for (int lane = 0; lane < kPanel; ++lane) {
      const int row = first + lane;
      const bool looks = row >= begin && (row < end || end == rows);
      const int32_t position = tile_positions[row];
      positions[lane] = looks ? position : -1;
      everybody = everybody && looks;
      if (!looks) continue;
      lowest = smaller(lowest, position);
      highest = larger(highest, position);
    }
  }
};

// What the rows of a panel see of a tile of keys.
struct Sight {
  IntVec begin[2], end[2];  // of each row
  Span some;                // the blocks of keys that some row sees
  Span all;                 // the keys that every row sees

  Sight(const Viewers& viewers, int64_t window, int64_t first_key, int64_t count) {
    const int32_t past = static_cast<int32_t>(1 - first_key);
    for (int v = 0; v < 2; ++v) {
      const IntVec last = load_bits<IntVec>(viewers.positions + v * kLanes) + past;
      begin[v] = last - static_cast<int32_t>(window);
      end[v] = last < static_cast<int32_t>(count) ? last : IntVec{} + static_cast<int32_t>(count);
    }
    const Span lowest = seen(viewers.lowest, window, first_key, count);
    const Span highest = seen(viewers.highest, window, first_key, count);
    some = {lowest.begin / kBlock * kBlock, rounded_up(larger(highest.end, 0), kBlock)};
    all = {highest.begin, viewers.everybody ? lowest.end : 0};
  }

  bool nothing() const { return some.begin >= some.end; }
  int64_t keys() const { return some.end - some.begin; }
  // Does every row see the block of keys from `key` on?
  bool whole(int64_t key) const { return key >= all.begin && key + kBlock <= all.end; }
  // `value` for the rows that see the key, and `other` for the rest.
  Vec choose(int v, int64_t key, Vec value, Vec other) const {
    const int32_t place = static_cast<int32_t>(key);
    return ((begin[v] <= place) & (end[v] > place)) ? value : other;
  }
};

// Multiplies queries with the scale of their scores and returns what is left to multiply the scores
// with. Pairs stay as they are, since they would be rounded again.
FASTLLM_INLINE float take_scale(float* queries, int64_t count, float scale) {
  for (int64_t i = 0; i < count; i += kLanes) store(queries + i, load(queries + i) * scale);
  return 1.0f;
}
FASTLLM_INLINE float take_scale(Pair* /*queries*/, int64_t /*count*/, float scale) {
  return scale;
}

// ---- Query rows -----------------------------------------------------------------------------

// Query rows with the softmax over the keys seen so far: out / weight, where out and weight are
// relative to 2^highest. Everything is in panels, one lane for each row.
template <class Cell>
struct QueryTile {
  alignas(64) Cell q[kRows * kMaxHeadSize / kNumbers<Cell>];
  alignas(64) float out[kRows * kMaxHeadSize];
  alignas(64) int32_t positions[kRows];
  Vec weight[kRows / kLanes];
  Vec highest[kRows / kLanes];
  int rows;
  int64_t size;  // of a head
  int width;     // the size, padded
  float scale;   // from a product of q to the exponent of two

  // query(r) and position(r) are those of row r.
  template <class Query, class Position>
  QueryTile(int64_t head_size, float score_scale, int count, Query query, Position position)
      : rows(count), size(head_size), width(padded(head_size)) {
    alignas(64) Cell stored[kRows * kMaxHeadSize / kNumbers<Cell>];
    const int cells = width / kNumbers<Cell>;
    const int whole = static_cast<int>(rounded_up(count, kPanel));
    for (int r = 0; r < whole; ++r) positions[r] = position(smaller(r, count - 1));
    for (int r = 0; r < count; ++r) load_row(stored + r * cells, query(r), size);
    clear(stored + count * cells, (whole - count) * cells);
    to_panels(q, stored, whole, cells);
    scale = take_scale(q, whole * cells, static_cast<float>(score_scale * kLog2E));
    clear(out, whole * width);
    for (int v = 0; v < whole / kLanes; ++v) {
      weight[v] = Vec{};
      highest[v] = broadcast(kLowest);
    }
  }

  // Calls take(r, attention of row r, its log-sum-exp); the tile is spent.
  template <class Take>
  void finish(Take take) {
    alignas(64) float stored[kPanel * kMaxHeadSize];
    for (int first = 0; first < rows; first += kPanel) {
      float* panel = out + first * width;
      for (int v = 0; v < 2; ++v) {
        const Vec total = weight[first / kLanes + v];
        const Vec share = total > 0.0f ? 1.0f / total : Vec{};
        for (int i = 0; i < width; ++i) {
          float* sums = panel + i * kPanel + v * kLanes;
          store(sums, load(sums) * share);
        }
      }
      transpose(stored, width, panel, kPanel, width, kPanel);
      for (int r = first; r < smaller(rows, first + kPanel); ++r) {
        const double high = highest[r / kLanes][r % kLanes];
        const float log_weight = __builtin_logf(weight[r / kLanes][r % kLanes]);
        take(r, stored + (r - first) * width, static_cast<float>(high * kLn2 + log_weight));
      }
    }
  }
};

// ---- Keys -----------------------------------------------------------------------------------

// A tile of keys, and of values with the cells down the keys.
template <class Cell>
struct KeyTile {
  alignas(64) Cell keys[kKeys * kMaxHeadSize / kNumbers<Cell>];
  alignas(64) Cell stored_values[kKeys * kMaxHeadSize / kNumbers<Cell>];
  alignas(64) Cell room[kNumbers<Cell> == 1 ? 1 : kKeys * kMaxHeadSize / 2];
  const Cell* values;

  template <class T>
  void read(const KeyRun<T>& run, int64_t first, int64_t count, int64_t size) {
    load_tile(keys, run.keys + first * run.key_stride, run.key_stride, count, size);
    load_tile(stored_values, run.values + first * run.value_stride, run.value_stride, count, size);
    values = stacked(room, stored_values, rounded_up(count, kBlock), padded(size));
  }
};

// Keeps the scores of a panel, and the highest of each row.
struct KeepScores : FromZero {
  float* scores;  // [kKeys, kPanel]
  Vec* top;
  const Sight& sight;

  FASTLLM_INLINE KeepScores(float* to, Vec* highest, const Sight& seen)
      : scores(to), top(highest), sight(seen) {}

  template <int vectors>
  FASTLLM_INLINE void finish(Vec (&sums)[kBlock][vectors], int row, int) const {
    const int64_t key = sight.some.begin + row;
    if (!sight.whole(key)) {
      for_each_sum<vectors>([&](int r, int v) {
        sums[r][v] = sight.choose(v, key + r, sums[r][v], broadcast(kHidden));
      });
    }
    for_each_sum<vectors>([&](int r, int v) {
      top[v] = max(top[v], sums[r][v]);
      store(scores + (row + r) * kPanel + v * kLanes, sums[r][v]);
    });
  }
};

// c = c * factor + a b, for the rows of a panel that look; the others keep what they have, whatever
// the values are.
struct ScaleAndAdd {
  float* c;  // [?, kPanel]
  const Vec* factor;
  const Viewers& viewers;

  template <int vectors>
  FASTLLM_INLINE void start(Vec (&sums)[kBlock][vectors], int row, int) const {
    for_each_sum<vectors>([&](int r, int v) {
      sums[r][v] = load(c + (row + r) * kPanel + v * kLanes) * factor[v];
    });
  }
  template <int vectors>
  FASTLLM_INLINE void finish(Vec (&sums)[kBlock][vectors], int row, int) const {
    if (!viewers.everybody) {
      for_each_sum<vectors>([&](int r, int v) {
        const IntVec positions = load_bits<IntVec>(viewers.positions + v * kLanes);
        sums[r][v] =
            positions >= 0 ? sums[r][v] : load(c + (row + r) * kPanel + v * kLanes);
      });
    }
    for_each_sum<vectors>(
        [&](int r, int v) { store(c + (row + r) * kPanel + v * kLanes, sums[r][v]); });
  }
};

// 2^(scores - highest), for as many keys as a cell has numbers; returns their sum.
FASTLLM_INLINE Vec to_powers(float* powers, const float* scores, float scale, Vec highest) {
  const Vec power = exp2(load(scores) * scale - highest);
  store(powers, power);
  return power;
}
#if defined(__AVX512BF16__)
FASTLLM_INLINE Vec to_powers(Pair* powers, const float* scores, float scale, Vec highest) {
  const Vec first = exp2(load(scores) * scale - highest);
  const Vec second = exp2(load(scores + kPanel) * scale - highest);
  const BitsVec cells = pairs(rounded_to_bf16(first), rounded_to_bf16(second));
  __builtin_memcpy(powers, &cells, sizeof(cells));
  return first + second;
}
#endif

// Adds a tile of keys to a panel of rows.
template <class Cell>
void attend_panel(QueryTile<Cell>& tile, int first, const Viewers& viewers, const Sight& sight,
                  const KeyTile<Cell>& keys) {
  alignas(64) float scores[kKeys * kPanel];
  alignas(64) Cell powers[kKeys * kPanel / kNumbers<Cell>];
  const int width = tile.width, cells = width / kNumbers<Cell>;
  const int count = static_cast<int>(sight.keys()), columns = viewers.vectors * kLanes;
  Vec top[2] = {broadcast(kHidden), broadcast(kHidden)}, factor[2];
  multiply<kStored>(keys.keys + sight.some.begin * cells, cells, tile.q + first * cells, kPanel,
                    count, columns, static_cast<int>(tile.size / kNumbers<Cell>),
                    KeepScores(scores, top, sight));
  for (int v = 0; v < viewers.vectors; ++v) {
    Vec& highest = tile.highest[first / kLanes + v];
    Vec& weight = tile.weight[first / kLanes + v];
    const Vec high = max(highest, top[v] * tile.scale);
    factor[v] = exp2(highest - high);
    highest = high;
    Vec sum = weight * factor[v];
    for (int key = 0; key < count; key += kNumbers<Cell>) {
      sum += to_powers(powers + key / kNumbers<Cell> * kPanel + v * kLanes,
                       scores + key * kPanel + v * kLanes, tile.scale, high);
    }
    weight = sum;
  }
  multiply<kTransposed>(keys.values + sight.some.begin / kNumbers<Cell> * width, width, powers,
                        kPanel, static_cast<int>(rounded_up(tile.size, kBlock)), columns,
                        count / kNumbers<Cell>,
                        ScaleAndAdd{tile.out + first * width, factor, viewers});
}

// Adds a run of keys to rows [begin, end) of a tile; blocks that no row sees are not touched.
template <class Cell, class T>
void attend(QueryTile<Cell>& tile, int begin, int end, const KeyRun<T>& run, int64_t window) {
  KeyTile<Cell> keys;
  Viewers viewers[kRows / kPanel];
  const int first_panel = begin / kPanel * kPanel;
  const int64_t reach = finite_window(window);
  int64_t lowest = kNoWindow, highest = -1;
  for (int first = first_panel; first < end; first += kPanel) {
    Viewers& panel = viewers[first / kPanel];
    panel.read(tile.positions, tile.rows, first, begin, end);
    lowest = smaller(lowest, panel.lowest);
    highest = larger(highest, panel.highest);
  }
  const int64_t last = seen(highest, reach, run.position, run.count).end;
  for (int64_t key = seen(lowest, reach, run.position, run.count).begin; key < last;
       key += kKeys) {
    const int64_t count = smaller(kKeys, last - key);
    keys.read(run, key, count, tile.size);
    for (int first = first_panel; first < end; first += kPanel) {
      const Viewers& panel = viewers[first / kPanel];
      const Sight sight(panel, reach, run.position + key, count);
      if (!sight.nothing()) attend_panel(tile, first, panel, sight, keys);
    }
  }
}

}  // namespace
