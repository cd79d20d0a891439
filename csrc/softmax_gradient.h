// The gradients between a tile of query rows and a tile of keys, with the probabilities computed
// again from the saved log-sum-exp (Dao, 2023). With S = scale q k^T, P = e^(S - lse) and
// delta = sum(dout * out):
//   dv = P^T dout,   dS = P (dout v^T - delta),   dq = scale dS k,   dk = scale dS^T q
// S, P and dS are computed as their transposes, a row for each key.

#pragma once

#include "online_softmax.h"

namespace {

template <class Cell>
constexpr int kTileCells = kRows * kMaxHeadSize / kNumbers<Cell>;
// Room for a second arrangement of `count` cells, where cells are pairs.
template <class Cell>
constexpr int room_for(int count) {
  return kNumbers<Cell> == 1 ? 1 : count;
}

// What a tile of query rows is read from, row by row.
template <class T>
struct GradientRow {
  const T* q;
  const T* dout;
  float log_sum_exp;
  float delta;
  int64_t position;
};

// A tile of query rows, and what they hold against a tile of keys.
template <class Cell>
struct QueryGradientTile {
  alignas(64) Cell q_panels[kTileCells<Cell>];
  alignas(64) Cell dout_panels[kTileCells<Cell>];
  alignas(64) Cell stored_q[kTileCells<Cell>];
  alignas(64) Cell stored_dout[kTileCells<Cell>];
  alignas(64) Cell q_room[room_for<Cell>(kTileCells<Cell>)];
  alignas(64) Cell dout_room[room_for<Cell>(kTileCells<Cell>)];
  const Cell* q;  // [kRows / kNumbers, width], the cells down the rows
  const Cell* dout;
  alignas(64) float dq[kRows * kMaxHeadSize];             // in panels
  alignas(64) Cell p[kKeys * kRows / kNumbers<Cell>];     // [kKeys, kRows / kNumbers]
  alignas(64) Cell ds[kKeys * kRows / kNumbers<Cell>];    // the same
  alignas(64) Cell ds_down[room_for<Cell>(kKeys * kRows / 2)];  // [kKeys / 2, kRows]
  alignas(64) float lse[kRows];                           // times log2(e)
  alignas(64) float delta[kRows];
  alignas(64) int32_t positions[kRows];
  Viewers viewers[kRows / kPanel];
  Span seen_by[kRows / kPanel];  // the keys of the tile that p and ds of a panel are written for
  int rows, width;
  int64_t size;
  float scale;  // from a product of q_panels to the exponent of two

  // row(r) is the GradientRow of row r.
  template <class Row>
  void read(int64_t head_size, float score_scale, int count, Row row) {
    rows = count;
    size = head_size;
    width = padded(head_size);
    const int cells = width / kNumbers<Cell>;
    const int whole = static_cast<int>(rounded_up(count, kPanel));
    for (int r = 0; r < count; ++r) {
      const auto from = row(r);
      load_row(stored_q + r * cells, from.q, size);
      load_row(stored_dout + r * cells, from.dout, size);
      lse[r] = static_cast<float>(from.log_sum_exp * kLog2E);
      delta[r] = from.delta;
      positions[r] = static_cast<int32_t>(from.position);
    }
    // Rows of zeros add nothing to any gradient.
    clear(stored_q + count * cells, (whole - count) * cells);
    clear(stored_dout + count * cells, (whole - count) * cells);
    for (int r = count; r < whole; ++r) {
      lse[r] = delta[r] = 0.0f;
      positions[r] = positions[count - 1];
    }
    arrange(whole, cells);
    scale = take_scale(q_panels, whole * cells, static_cast<float>(score_scale * kLog2E));
  }

  // The lowest and the highest position.
  Span reach() const { return {positions[0], positions[rows - 1]}; }

  float* dq_of_panel(int first) { return dq + first * width; }
  int vectors_of(int first) const { return viewers[first / kPanel].vectors; }

 private:
  void arrange(int whole, int cells) {
    to_panels(q_panels, stored_q, whole, cells);
    to_panels(dout_panels, stored_dout, whole, cells);
    q = stacked(q_room, stored_q, whole, width);
    dout = stacked(dout_room, stored_dout, whole, width);
    clear(dq, whole * width);
    for (int first = 0; first < rows; first += kPanel) {
      viewers[first / kPanel].read(positions, rows, first, 0, rows);
    }
  }
};

// A tile of keys and values.
template <class Cell>
struct KeyValueTile {
  alignas(64) Cell keys[kTileCells<Cell>];
  alignas(64) Cell values[kTileCells<Cell>];
  alignas(64) Cell room[room_for<Cell>(kTileCells<Cell>)];
  const Cell* keys_down;  // [kKeys / kNumbers, width], the cells down the keys
  int64_t count, position;

  template <class T>
  void read(const KeyRun<T>& run, int64_t first, int64_t size) {
    count = smaller(kKeys, run.count - first);
    position = run.position + first;
    load_tile(keys, run.keys + first * run.key_stride, run.key_stride, count, size);
    load_tile(values, run.values + first * run.value_stride, run.value_stride, count, size);
    keys_down = stacked(room, keys, rounded_up(count, kBlock), padded(size));
  }
};

// Sums of the gradients of a tile of keys.
struct KeySums {
  float* dkeys;    // [kKeys, width]; to be multiplied with the scale
  float* dvalues;  // [kKeys, width]

  // How many numbers the sums of `count` keys take.
  static int64_t numbers(int64_t count, int width) {
    return 2 * rounded_up(count, kKeys) * width;
  }
  static KeySums of_tile(float* sums, int64_t first_key, int width) {
    float* dkeys = sums + 2 * first_key * width;
    return {dkeys, dkeys + kKeys * width};
  }
};

// ---- Probabilities --------------------------------------------------------------------------

// P of a block of keys and a panel of rows, from the products q k.
struct Probabilities : FromZero {
  Vec (&p)[kBlock][2];
  const float* lse;
  float scale;
  const Sight& sight;
  int64_t key;

  FASTLLM_INLINE Probabilities(Vec (&to)[kBlock][2], const float* log_sum_exps, float score_scale,
                               const Sight& seen, int64_t first_key)
      : p(to), lse(log_sum_exps), scale(score_scale), sight(seen), key(first_key) {}

  template <int vectors>
  FASTLLM_INLINE void finish(Vec (&sums)[kBlock][vectors], int, int) const {
    for_each_sum<vectors>([&](int r, int v) {
      p[r][v] = exp2(sums[r][v] * scale - load(lse + v * kLanes));
    });
    if (sight.whole(key)) return;
    for_each_sum<vectors>(
        [&](int r, int v) { p[r][v] = sight.choose(v, key + r, p[r][v], Vec{}); });
  }
};

// dS from P and the products dout v; keeps both.
template <class Cell>
struct Gradients : FromZero {
  const Vec (&p)[kBlock][2];
  QueryGradientTile<Cell>& tile;
  int64_t key;
  int first_row;

  FASTLLM_INLINE Gradients(const Vec (&from)[kBlock][2], QueryGradientTile<Cell>& to,
                           int64_t first_key, int row)
      : p(from), tile(to), key(first_key), first_row(row) {}

  template <int vectors>
  FASTLLM_INLINE void finish(Vec (&sums)[kBlock][vectors], int, int) const {
    for_each_sum<vectors>([&](int r, int v) {
      const int row = first_row + v * kLanes;
      sums[r][v] = p[r][v] * (sums[r][v] - load(tile.delta + row));
    });
    keep<vectors>(tile.p, sums);
  }

 private:
  template <int vectors>
  FASTLLM_INLINE void keep(float*, const Vec (&ds)[kBlock][vectors]) const {
    for_each_sum<vectors>([&](int r, int v) {
      const int64_t place = (key + r) * kRows + first_row + v * kLanes;
      store(tile.p + place, p[r][v]);
      store(tile.ds + place, ds[r][v]);
    });
  }
#if defined(__AVX512BF16__)
  template <int vectors>
  FASTLLM_INLINE void keep(Pair*, const Vec (&ds)[kBlock][vectors]) const {
    HalfBitsVec rounded[kBlock][vectors];
    for_each_sum<vectors>([&](int r, int v) {
      const int64_t place = ((key + r) * kRows + first_row + v * kLanes) / 2;
      rounded[r][v] = rounded_to_bf16(ds[r][v]);
      const HalfBitsVec probabilities = rounded_to_bf16(p[r][v]);
      __builtin_memcpy(tile.p + place, &probabilities, sizeof(probabilities));
      __builtin_memcpy(tile.ds + place, &rounded[r][v], sizeof(rounded[r][v]));
    });
#pragma GCC unroll 4
    for (int r = 0; r < kBlock; r += 2) {
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) {
        const BitsVec down = pairs(rounded[r][v], rounded[r + 1][v]);
        const int64_t place = (key + r) / 2 * kRows + first_row + v * kLanes;
        __builtin_memcpy(tile.ds_down + place, &down, sizeof(down));
      }
    }
  }
#endif
};

template <int vectors, class Cell>
void score_panel(QueryGradientTile<Cell>& queries, int first, const KeyValueTile<Cell>& keys,
                 const Sight& sight) {
  const int cells = queries.width / kNumbers<Cell>;
  const int depth = static_cast<int>(queries.size / kNumbers<Cell>);
  const Cell* q = queries.q_panels + first * cells;
  const Cell* dout = queries.dout_panels + first * cells;
  for (int64_t key = sight.some.begin; key < sight.some.end; key += kBlock) {
    Vec p[kBlock][2];
    Probabilities probabilities(p, queries.lse + first, queries.scale, sight, key);
    multiply_block<kStored, vectors>(keys.keys + key * cells, cells, q, kPanel, depth,
                                     probabilities, 0, 0);
    Gradients<Cell> gradients(p, queries, key, first);
    multiply_block<kStored, vectors>(keys.values + key * cells, cells, dout, kPanel, depth,
                                     gradients, 0, 0);
  }
}

// P and dS of all rows against a tile of keys.
template <class Cell>
void score(QueryGradientTile<Cell>& queries, const KeyValueTile<Cell>& keys, int64_t window) {
  for (int first = 0; first < queries.rows; first += kPanel) {
    const Viewers& viewers = queries.viewers[first / kPanel];
    const Sight sight(viewers, window, keys.position, keys.count);
    queries.seen_by[first / kPanel] = sight.some;
    if (viewers.vectors == 2) {
      score_panel<2>(queries, first, keys, sight);
    } else {
      score_panel<1>(queries, first, keys, sight);
    }
  }
}

// ---- Gradients ------------------------------------------------------------------------------

FASTLLM_INLINE const float* down(const float* ds, const float* /*ds_down*/) { return ds; }
FASTLLM_INLINE const Pair* down(const Pair* /*ds*/, const Pair* ds_down) { return ds_down; }

template <class Cell>
void add_dq(QueryGradientTile<Cell>& queries, const KeyValueTile<Cell>& keys) {
  const Cell* ds = down(queries.ds, queries.ds_down);
  for (int first = 0; first < queries.rows; first += kPanel) {
    const Span span = queries.seen_by[first / kPanel];
    if (span.begin >= span.end) continue;
    const int64_t top = span.begin / kNumbers<Cell>;
    multiply<kTransposed>(keys.keys_down + top * queries.width, queries.width,
                          ds + top * kRows + first, kRows,
                          static_cast<int>(rounded_up(queries.size, kBlock)),
                          queries.vectors_of(first) * kLanes,
                          static_cast<int>(span.end - span.begin) / kNumbers<Cell>,
                          AddTo{queries.dq_of_panel(first), kPanel});
  }
}

// The rows, in whole panels, that see a block of keys. Rows are sorted by position.
template <class Cell>
FASTLLM_INLINE Span viewers_of(const QueryGradientTile<Cell>& queries, int64_t key) {
  const int64_t rows = rounded_up(queries.rows, kLanes);
  Span all = {rows, 0};
  for (int64_t first = 0; first < rows; first += kPanel) {
    const Span span = queries.seen_by[first / kPanel];
    if (key < span.begin || key >= span.end) continue;
    all = {smaller(all.begin, first), smaller(rows, first + kPanel)};
  }
  return all;
}

template <class Cell>
void add_dk_dv(const QueryGradientTile<Cell>& queries, const KeyValueTile<Cell>& keys,
               KeySums sums) {
  constexpr int stride = kRows / kNumbers<Cell>;
  const int width = queries.width;
  for (int64_t key = 0, next; key < keys.count; key = next) {
    const Span rows = viewers_of(queries, key);
    for (next = key + kBlock; next < keys.count; next += kBlock) {
      const Span others = viewers_of(queries, next);
      if (others.begin != rows.begin || others.end != rows.end) break;
    }
    if (rows.begin >= rows.end) continue;
    const int64_t left = rows.begin / kNumbers<Cell>, corner = key * stride + left;
    const int count = static_cast<int>(next - key);
    const int depth = static_cast<int>(rows.end - rows.begin) / kNumbers<Cell>;
    multiply<kStored>(queries.p + corner, stride, queries.dout + left * width, width, count, width,
                      depth, AddTo{sums.dvalues + key * width, width});
    multiply<kStored>(queries.ds + corner, stride, queries.q + left * width, width, count, width,
                      depth, AddTo{sums.dkeys + key * width, width});
  }
}

}  // namespace
