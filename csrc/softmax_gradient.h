// The gradients between a tile of query rows and a tile of keys, with the probabilities computed
// again from the saved log-sum-exp (Dao, 2023). With S = scale q k^T, P = e^(S - lse) and
// delta = sum(dout * out):
//   dv = P^T dout,   dS = P (dout v^T - delta),   dq = scale dS k,   dk = scale dS^T q

#pragma once

#include "online_softmax.h"

namespace {

// A tile of keys and values with their gradients.
struct KeyGradientTile {
  alignas(64) float keys[kKeys * kMaxHeadSize];
  alignas(64) float keys_transposed[kMaxHeadSize * kKeys];
  alignas(64) float values_transposed[kMaxHeadSize * kKeys];
  alignas(64) float dkeys[kKeys * kMaxHeadSize];
  alignas(64) float dvalues[kKeys * kMaxHeadSize];
  int64_t count, position, size;
  int width;

  template <class T>
  void read(const KeyRun<T>& run, int64_t first, int64_t head_size) {
    count = smaller(kKeys, run.count - first);
    position = run.position + first;
    size = head_size;
    width = padded(head_size);
    float* room = keys;  // for the values as they are stored
    load_tile(room, run.values + first * run.stride, run.stride, count, size);
    transpose_tile(values_transposed, room, count, width);
    load_tile(keys, run.keys + first * run.stride, run.stride, count, size);
    transpose_tile(keys_transposed, keys, count, width);
  }
};

// A tile of query rows, and what they hold against a tile of keys.
struct QueryGradientTile {
  alignas(64) float q[kRows * kMaxHeadSize];  // times the scale and log2(e), as the scores are
  alignas(64) float dout[kRows * kMaxHeadSize];
  alignas(64) float dq[kRows * kMaxHeadSize];
  alignas(64) float p[kRows * kKeys];
  alignas(64) float ds[kRows * kKeys];
  float lse[kRows];  // times log2(e)
  float delta[kRows];
  int64_t positions[kRows];
  Span spans[kRows];
  int rows = 0;

  template <class T>
  void add_row(const T* query, const T* gradient, int64_t size, float scale, float log_sum_exp,
               float row_delta, int64_t position) {
    const int width = padded(size);
    load_row(q + rows * width, query, size, static_cast<float>(scale * kLog2E));
    load_row(dout + rows * width, gradient, size);
    lse[rows] = static_cast<float>(log_sum_exp * kLog2E);
    delta[rows] = row_delta;
    positions[rows] = position;
    ++rows;
  }
};

// p = 2^(score - lse) and ds = p (dp - delta) of a row, in place of its scores and dp.
FASTLLM_INLINE void probabilities(QueryGradientTile& queries, int row, Span wide) {
  float* p = queries.p + row * kKeys;
  float* ds = queries.ds + row * kKeys;
  hide(p, wide, queries.spans[row]);
  for (int64_t i = wide.begin; i < wide.end; i += kLanes) {
    const Vec probability = exp2(load(p + i) - queries.lse[row]);
    store(p + i, probability);
    store(ds + i, probability * (load(ds + i) - queries.delta[row]));
  }
}

// p and ds of a few rows (at most kRowsInRegisters) against a tile of keys; returns the span of
// keys that they are written for.
FASTLLM_INLINE Span backward_rows(QueryGradientTile& queries, int first, int rows,
                                  const KeyGradientTile& keys, int64_t window) {
  const int width = keys.width, depth = static_cast<int>(keys.size);
  const int64_t* positions = queries.positions + first;
  const Span wide = widened(cover(positions, rows, window, keys.position, keys.count));
  for (int r = 0; r < rows; ++r) {
    queries.spans[first + r] = seen(positions[r], window, keys.position, keys.count);
  }
  if (wide.begin >= wide.end) return wide;
  const int columns = static_cast<int>(wide.end - wide.begin);
  float* p = queries.p + first * kKeys;
  float* ds = queries.ds + first * kKeys;
  multiply<kStored, kReplace>(queries.q + first * width, width, keys.keys_transposed + wide.begin,
                              kKeys, p + wide.begin, kKeys, rows, columns, depth);
  multiply<kStored, kReplace>(queries.dout + first * width, width,
                              keys.values_transposed + wide.begin, kKeys, ds + wide.begin, kKeys,
                              rows, columns, depth);
  for (int r = first; r < first + rows; ++r) probabilities(queries, r, wide);
  return wide;
}

FASTLLM_INLINE void multiply_dq(QueryGradientTile& queries, int first, int rows,
                                const KeyGradientTile& keys, Span wide) {
  const int width = keys.width;
  float* dq = queries.dq + first * width;
  if (wide.begin >= wide.end) return clear(dq, rows * width);
  multiply<kStored, kReplace>(queries.ds + first * kKeys + wide.begin, kKeys,
                              keys.keys + wide.begin * width, width, dq, width, rows, width,
                              static_cast<int>(wide.end - wide.begin));
}

// dk and dv of a tile of keys from a tile of queries. Rows are sorted by position: the rows that
// see one of a few keys lie together.
void multiply_dk_dv(const QueryGradientTile& queries, KeyGradientTile& keys) {
  const int width = keys.width;
  int begin = 0, end = 0;
  for (int64_t first = 0; first < keys.count; first += kRowsInRegisters) {
    const int64_t last = smaller(first + kRowsInRegisters, keys.count);
    while (begin < queries.rows && queries.spans[begin].end <= first) ++begin;
    while (end < queries.rows && queries.spans[end].begin < last) ++end;
    if (begin >= end) continue;
    const int rows = static_cast<int>(last - first);
    const int64_t corner = begin * kKeys + first;
    multiply<kTransposed, kAdd>(queries.p + corner, kKeys, queries.dout + begin * width, width,
                                keys.dvalues + first * width, width, rows, width, end - begin);
    multiply<kTransposed, kAdd>(queries.ds + corner, kKeys, queries.q + begin * width, width,
                                keys.dkeys + first * width, width, rows, width, end - begin);
  }
}

// Which gradients a task is to add up: two tasks must not add to the same ones.
enum Wanted { kAll, kQueryGradients, kKeyGradients };

// The gradients between a tile of keys and a tile of queries.
FASTLLM_INLINE void backward_tiles(QueryGradientTile& queries, KeyGradientTile& keys,
                                   int64_t window, Wanted wanted) {
  for (int first = 0; first < queries.rows; first += kRowsInRegisters) {
    const int rows = static_cast<int>(smaller(kRowsInRegisters, queries.rows - first));
    const Span wide = backward_rows(queries, first, rows, keys, window);
    if (wanted != kKeyGradients) multiply_dq(queries, first, rows, keys, wide);
  }
  if (wanted != kQueryGradients) multiply_dk_dv(queries, keys);
}

}  // namespace
