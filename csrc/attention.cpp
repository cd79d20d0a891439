// Causal grouped-query attention on the packed, prefix-shared layout, and its gradient (Dao, 2023).
//
// A query row is one head of one query. The rows of a segment that share a key head are taken
// together, in tiles, so that a tile of keys is loaded once for a whole group of heads. A segment's
// rows see two runs of keys: its prefix, and its own segment up to themselves.

#include "online_softmax.h"

namespace fastllm {
namespace {

// The query rows of one segment and one key head: row r is head r % group of query r / group.
struct QueryRows {
  const Layout& layout;
  int64_t first_query, queries, heads, group, key_head;

  template <class Arguments>
  QueryRows(const Arguments& a, int32_t segment, int32_t head)
      : layout(a.layout),
        first_query(a.layout.query_starts[segment]),
        queries(a.layout.query_starts[segment + 1] - first_query),
        heads(a.heads),
        group(a.heads / a.key_heads),
        key_head(head) {}

  int64_t count() const { return queries * group; }
  int64_t position(int64_t row) const {
    return layout.positions[layout.query_rows[first_query + row / group]];
  }
  // Which of the N * H heads the row is.
  int64_t head(int64_t row) const {
    return (first_query + row / group) * heads + key_head * group + row % group;
  }
  // The first row at this position or later.
  int64_t lower_bound(int64_t wanted) const {
    int64_t low = 0, high = queries;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (position(middle * group) < wanted) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low * group;
  }
};

template <class T, class Arguments>
KeyRun<T> keys_of(const Arguments& a, int32_t segment, int32_t key_head) {
  const int64_t first = a.layout.starts[segment];
  const int64_t count = a.layout.starts[segment + 1] - first;
  const int64_t stride = a.key_heads * a.head_size;
  const int64_t offset = first * stride + key_head * a.head_size;
  const int64_t position = count > 0 ? a.layout.positions[first] : 0;
  return {static_cast<const T*>(a.k) + offset, static_cast<const T*>(a.v) + offset, stride, count,
          position};
}

template <class T>
void forward(const AttentionForward& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const AttentionTask& task = a.tasks[i];
    const QueryRows rows(a, task.segment, task.key_head);
    const int64_t count = smaller(kRows, rows.count() - task.first_row);
    QueryTile tile(a.head_size);
    for (int64_t row = task.first_row; row < task.first_row + count; ++row) {
      const T* query = static_cast<const T*>(a.q) + rows.head(row) * a.head_size;
      tile.add_row(query, rows.position(row), a.scale);
    }
    const int32_t prefix = a.layout.prefix[task.segment];
    if (prefix >= 0) attend(tile, 0, tile.rows, keys_of<T>(a, prefix, task.key_head), a.window);
    attend(tile, 0, tile.rows, keys_of<T>(a, task.segment, task.key_head), a.window);
    for (int row = 0; row < count; ++row) {
      const int64_t head = rows.head(task.first_row + row);
      a.lse[head] = tile.finish_row(row, static_cast<T*>(a.out) + head * a.head_size);
    }
  }
}

template <class T>
void delta(const AttentionDelta& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* dout = static_cast<const T*>(a.dout) + row * a.head_size;
    const T* out = static_cast<const T*>(a.out) + row * a.head_size;
    Vec products = {};
    for_each_vector(a.head_size, [&](int64_t i, auto lanes) {
      products += load(dout + i, lanes) * load(out + i, lanes);
    });
    a.delta[row] = sum(products);
  }
}

// ---- Backward ------------------------------------------------------------------------------------
//
// With S = scale q k^T, P = e^(S - lse) and delta = sum(dout * out):
//   dv = P^T dout,   dS = P (dout v^T - delta),   dq = scale dS k,   dk = scale dS^T q

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
    load_tile(keys, run.values + first * run.stride, run.stride, count, size);
    transpose_tile(values_transposed, keys, count, width);
    load_tile(keys, run.keys + first * run.stride, run.stride, count, size);
    transpose_tile(keys_transposed, keys, count, width);
    clear(dkeys, kKeys * width);
    clear(dvalues, kKeys * width);
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
  int rows;

  template <class T>
  void read(const AttentionBackward& a, const QueryRows& source, int64_t first) {
    const int width = padded(a.head_size);
    rows = static_cast<int>(smaller(kRows, source.count() - first));
    for (int r = 0; r < rows; ++r) {
      const int64_t head = source.head(first + r);
      const int64_t offset = head * a.head_size;
      load_row(q + r * width, static_cast<const T*>(a.q) + offset, a.head_size, a.scale * kLog2E);
      load_row(dout + r * width, static_cast<const T*>(a.dout) + offset, a.head_size);
      lse[r] = a.lse[head] * kLog2E;
      delta[r] = a.delta[head];
      positions[r] = source.position(first + r);
    }
  }

  void add_dq(const AttentionBackward& a, const QueryRows& source, int64_t first) const {
    for (int r = 0; r < rows; ++r) {
      const float* from = dq + r * padded(a.head_size);
      float* to = a.dq_sum + source.head(first + r) * a.head_size;
      for_each_vector(a.head_size, [&](int64_t i, auto lanes) {
        store(to + i, load(to + i, lanes) + load(from + i, lanes) * a.scale, lanes);
      });
    }
  }
};

// p = 2^(score - lse) and ds = p (dp - delta) of a row, in place of its scores and dp.
FASTLLM_INLINE void probabilities(float* p, float* ds, float lse, float delta, Span wide,
                                  Span row) {
  hide(p, wide, row, kHidden);
  for (int64_t i = wide.begin; i < wide.end; i += kLanes) {
    const Vec probability = exp2(load(p + i) - lse);
    store(p + i, probability);
    store(ds + i, probability * (load(ds + i) - delta));
  }
}

// p, ds and dq of a few rows (at most kRowsInRegisters) against a tile of keys.
FASTLLM_INLINE void backward_rows(QueryGradientTile& queries, int first, int rows,
                                  const KeyGradientTile& keys, int64_t window) {
  const int width = keys.width, depth = static_cast<int>(keys.size);
  Span all = {keys.count, 0};
  for (int r = first; r < first + rows; ++r) {
    const Span row = seen(queries.positions[r], window, keys.position, keys.count);
    queries.spans[r] = row;
    if (row.begin < row.end) all = {smaller(all.begin, row.begin), larger(all.end, row.end)};
  }
  const Span wide = widened(all);
  float* dq = queries.dq + first * width;
  if (wide.begin >= wide.end) return clear(dq, rows * width);
  const int columns = static_cast<int>(wide.end - wide.begin);
  float* p = queries.p + first * kKeys;
  float* ds = queries.ds + first * kKeys;
  multiply<kStored, kReplace>(queries.q + first * width, width, keys.keys_transposed + wide.begin,
                              kKeys, p + wide.begin, kKeys, rows, columns, depth);
  multiply<kStored, kReplace>(queries.dout + first * width, width,
                              keys.values_transposed + wide.begin, kKeys, ds + wide.begin, kKeys,
                              rows, columns, depth);
  for (int r = 0; r < rows; ++r) {
    probabilities(p + r * kKeys, ds + r * kKeys, queries.lse[first + r], queries.delta[first + r],
                  wide, queries.spans[first + r]);
  }
  multiply<kStored, kReplace>(ds + wide.begin, kKeys, keys.keys + wide.begin * width, width,
                              dq, width, rows, width, columns);
}

// dk and dv of a tile of keys from a tile of queries. Rows are sorted by position: the rows that
// see one of a few keys lie together.
void backward_keys(const QueryGradientTile& queries, KeyGradientTile& keys) {
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

// Gradients between a tile of keys and the queries of one segment.
template <class T>
void backward_segment(const AttentionBackward& a, const QueryRows& rows, KeyGradientTile& keys,
                      QueryGradientTile& queries) {
  const int64_t begin = rows.lower_bound(keys.position);
  const int64_t end =
      a.window > 0 ? rows.lower_bound(keys.position + keys.count - 1 + a.window) : rows.count();
  for (int64_t first = begin; first < end; first += kRows) {
    queries.read<T>(a, rows, first);
    for (int row = 0; row < queries.rows; row += kRowsInRegisters) {
      const int count = static_cast<int>(smaller(kRowsInRegisters, queries.rows - row));
      backward_rows(queries, row, count, keys, a.window);
    }
    backward_keys(queries, keys);
    queries.add_dq(a, rows, first);
  }
}

template <class T>
void store_gradients(T* to, int64_t stride, const float* from, const KeyGradientTile& keys,
                     float factor) {
  for (int64_t row = 0; row < keys.count; ++row) {
    for_each_vector(keys.size, [&](int64_t i, auto lanes) {
      store(to + row * stride + i, load(from + row * keys.width + i, lanes) * factor, lanes);
    });
  }
}

// Every gradient of the keys of one segment, whose queries and whose children's queries see them.
template <class T>
void backward_keys_of(const AttentionBackward& a, int32_t segment, int32_t key_head) {
  KeyGradientTile keys;
  QueryGradientTile queries;
  const KeyRun<T> run = keys_of<T>(a, segment, key_head);
  const int32_t* child = a.layout.children + a.layout.children_starts[segment];
  const int32_t* last_child = a.layout.children + a.layout.children_starts[segment + 1];
  for (int64_t first = 0; first < run.count; first += kKeys) {
    keys.read(run, first, a.head_size);
    backward_segment<T>(a, QueryRows(a, segment, key_head), keys, queries);
    for (const int32_t* c = child; c < last_child; ++c) {
      backward_segment<T>(a, QueryRows(a, *c, key_head), keys, queries);
    }
    const int64_t offset = (a.layout.starts[segment] + first) * run.stride + key_head * a.head_size;
    store_gradients(static_cast<T*>(a.dk) + offset, run.stride, keys.dkeys, keys, kLn2);
    store_gradients(static_cast<T*>(a.dv) + offset, run.stride, keys.dvalues, keys, 1.0f);
  }
}

// Rounds the finished sums of dq to the storage format.
template <class T>
void round_dq(const AttentionBackward& a, int32_t segment, int32_t key_head) {
  if (a.dq == a.dq_sum) return;
  const QueryRows rows(a, segment, key_head);
  for (int64_t row = 0; row < rows.count(); ++row) {
    const int64_t offset = rows.head(row) * a.head_size;
    for_each_vector(a.head_size, [&](int64_t i, auto lanes) {
      store(static_cast<T*>(a.dq) + offset + i, load(a.dq_sum + offset + i, lanes), lanes);
    });
  }
}

// A task is a whole family, a root segment with its children: nobody else adds to the same
// gradients, so the order of every sum is fixed.
template <class T>
void backward(const AttentionBackward& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const AttentionTask& task = a.tasks[i];
    const int32_t* child = a.layout.children + a.layout.children_starts[task.segment];
    const int32_t* last_child = a.layout.children + a.layout.children_starts[task.segment + 1];
    backward_keys_of<T>(a, task.segment, task.key_head);
    for (const int32_t* c = child; c < last_child; ++c) backward_keys_of<T>(a, *c, task.key_head);
    round_dq<T>(a, task.segment, task.key_head);
    for (const int32_t* c = child; c < last_child; ++c) round_dq<T>(a, *c, task.key_head);
  }
}

}  // namespace

const AttentionKernels FASTLLM_ISA::attention = {kRows, FASTLLM_FORMATS(forward),
                                                 FASTLLM_FORMATS(delta), FASTLLM_FORMATS(backward)};

}  // namespace fastllm
