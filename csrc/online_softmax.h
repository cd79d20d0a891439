// Attention of a tile of query rows over runs of keys, block by block (Milakov & Gimelshein, 2018;
// Dao, 2023): the scores of a block live in registers and the L1 cache only. Shared by
// attention.cpp and decode_attention.cpp.

#pragma once

#include "tile.h"

namespace {

constexpr float kHidden = -__builtin_inff();  // score of a key that a query does not see
constexpr float kLowest = -3.402823e38f;      // finite, so that differences are never NaN

// Keys in consecutive rows, which have consecutive positions in their sequence.
template <class T>
struct KeyRun {
  const T* keys;
  const T* values;
  int64_t stride;  // numbers between rows
  int64_t count;
  int64_t position;  // of the first
};

// The keys of a run, or of a tile of it, that a query sees.
struct Span {
  int64_t begin, end;
};

// A query at `position` sees keys at positions in (position - window, position].
FASTLLM_INLINE Span seen(int64_t position, int64_t window, int64_t first_key, int64_t count) {
  const int64_t end = smaller(count, position + 1 - first_key);
  const int64_t begin = window > 0 ? larger(0, position + 1 - window - first_key) : 0;
  return {begin, end};
}

// The span that covers those of `rows` queries; empty spans do not count.
FASTLLM_INLINE Span cover(const int64_t* positions, int rows, int64_t window, int64_t first_key,
                          int64_t count) {
  Span all = {count, 0};
  for (int r = 0; r < rows; ++r) {
    const Span one = seen(positions[r], window, first_key, count);
    if (one.begin >= one.end) continue;
    all = {smaller(all.begin, one.begin), larger(all.end, one.end)};
  }
  return all;
}

// The same span, widened to whole vectors of a tile.
FASTLLM_INLINE Span widened(Span span) { return {span.begin / kAlign * kAlign, padded(span.end)}; }

// Hides the scores that a row of a widened span has, but its query does not see.
FASTLLM_INLINE void hide(float* scores, Span wide, Span row) {
  for (int64_t i = wide.begin; i < smaller(row.begin, wide.end); ++i) scores[i] = kHidden;
  for (int64_t i = larger(row.end, wide.begin); i < wide.end; ++i) scores[i] = kHidden;
}

// Scores are kept times log2(e): powers of two are cheaper than powers of e. In fp64, so that going
// back and forth costs a log-sum-exp no bits.
constexpr double kLog2E = 1.44269504088896341;
constexpr double kLn2 = 0.69314718055994531;

// Query rows with the softmax over the keys seen so far: out / weight, where out and weight are
// relative to 2^highest.
struct QueryTile {
  alignas(64) float q[kRows * kMaxHeadSize];  // times the scale and log2(e)
  alignas(64) float out[kRows * kMaxHeadSize];
  Vec weight[kRows];  // to be summed over its lanes
  float highest[kRows];
  int64_t positions[kRows];
  int rows = 0;
  int64_t size;  // of a head
  int width;     // of a row: the size, padded

  explicit QueryTile(int64_t head_size) : size(head_size), width(padded(head_size)) {}

  template <class T>
  void add_row(const T* query, int64_t position, float scale) {
    load_row(q + rows * width, query, size, static_cast<float>(scale * kLog2E));
    clear(out + rows * width, width);
    weight[rows] = Vec{};
    highest[rows] = kLowest;
    positions[rows] = position;
    ++rows;
  }

  // Writes the attention of a row; returns its log-sum-exp.
  template <class T>
  float finish_row(int row, T* result) const {
    const float total = sum(weight[row]);
    const float share = total > 0 ? 1.0f / total : 0.0f;
    const float* from = out + row * width;
    for_each_vector(size, [&](int64_t i, auto lanes) {
      store(result + i, load(from + i, lanes) * share, lanes);
    });
    return static_cast<float>(highest[row] * kLn2 + __builtin_logf(total));
  }
};

// Turns the scores of a row into 2^(score - highest), after moving the row's sums to its new
// highest score.
FASTLLM_INLINE void softmax_row(QueryTile& tile, int row, float* scores, int count) {
  Vec top = broadcast(tile.highest[row]);
  for (int i = 0; i < count; i += kLanes) top = max(load(scores + i), top);
  const float highest = largest(top);
  if (highest > tile.highest[row]) {
    const Vec factor = exp2(broadcast(tile.highest[row] - highest));
    float* out = tile.out + row * tile.width;
    for (int i = 0; i < tile.width; i += kLanes) store(out + i, load(out + i) * factor);
    tile.weight[row] *= factor;
    tile.highest[row] = highest;
  }
  Vec weight = tile.weight[row];
  for (int i = 0; i < count; i += kLanes) {
    const Vec power = exp2(load(scores + i) - highest);
    store(scores + i, power);
    weight += power;
  }
  tile.weight[row] = weight;
}

// A tile of keys (transposed) and values.
struct KeyTile {
  alignas(64) float keys[kMaxHeadSize * kKeys];
  alignas(64) float values[kKeys * kMaxHeadSize];

  template <class T>
  void read(const KeyRun<T>& run, int64_t first, int64_t count, int64_t size) {
    float* room = values;  // for the keys as they are stored
    load_tile(room, run.keys + first * run.stride, run.stride, count, size);
    transpose_tile(keys, room, count, padded(size));
    load_tile(values, run.values + first * run.stride, run.stride, count, size);
  }
};

// Adds a tile of keys to a few rows (at most kRowsInRegisters).
FASTLLM_INLINE void attend_rows(QueryTile& tile, int first_row, int rows, const KeyTile& keys,
                                int64_t first_key, int64_t count, int64_t window) {
  alignas(64) float scores[kRowsInRegisters * kKeys];
  const int64_t* positions = tile.positions + first_row;
  const Span wide = widened(cover(positions, rows, window, first_key, count));
  if (wide.begin >= wide.end) return;
  const int columns = static_cast<int>(wide.end - wide.begin);
  multiply<kStored, kReplace>(tile.q + first_row * tile.width, tile.width, keys.keys + wide.begin,
                              kKeys, scores + wide.begin, kKeys, rows, columns,
                              static_cast<int>(tile.size));
  for (int r = 0; r < rows; ++r) {
    float* row = scores + r * kKeys;
    hide(row, wide, seen(positions[r], window, first_key, count));
    softmax_row(tile, first_row + r, row + wide.begin, columns);
  }
  multiply<kStored, kAdd>(scores + wide.begin, kKeys, keys.values + wide.begin * tile.width,
                          tile.width, tile.out + first_row * tile.width, tile.width, rows,
                          tile.width, columns);
}

// Adds a run of keys to rows [begin, end) of a tile; blocks that no row sees are not touched.
template <class T>
void attend(QueryTile& tile, int begin, int end, const KeyRun<T>& run, int64_t window) {
  KeyTile keys;
  const Span all = cover(tile.positions + begin, end - begin, window, run.position, run.count);
  for (int64_t first = all.begin; first < all.end; first += kKeys) {
    const int64_t count = smaller(kKeys, all.end - first);
    keys.read(run, first, count, tile.size);
    for (int row = begin; row < end; row += kRowsInRegisters) {
      const int rows = static_cast<int>(smaller(kRowsInRegisters, end - row));
      attend_rows(tile, row, rows, keys, run.position + first, count, window);
    }
  }
}

}  // namespace
