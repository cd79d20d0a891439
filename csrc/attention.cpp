// Causal grouped-query attention on the packed, prefix-shared layout, and its gradient (Dao, 2023).
//
// A query row is one head of one query. The rows of a segment that share a key head are taken
// together, in tiles, so that a tile of keys is loaded once for a whole group of heads. A segment's
// rows see two runs of keys: its prefix, and its own segment up to themselves.

#include "online_softmax.h"
#include "softmax_gradient.h"

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

// ---- Backward -------------------------------------------------------------------------------

template <class T>
void read_rows(QueryGradientTile& tile, const AttentionBackward& a, const QueryRows& rows,
               int64_t first) {
  const int64_t end = smaller(first + kRows, rows.count());
  tile.rows = 0;
  for (int64_t row = first; row < end; ++row) {
    const int64_t head = rows.head(row), offset = head * a.head_size;
    tile.add_row(static_cast<const T*>(a.q) + offset, static_cast<const T*>(a.dout) + offset,
                 a.head_size, a.scale, a.lse[head], a.delta[head], rows.position(row));
  }
}

void add_dq(const QueryGradientTile& tile, const AttentionBackward& a, const QueryRows& rows,
            int64_t first) {
  for (int r = 0; r < tile.rows; ++r) {
    const float* from = tile.dq + r * padded(a.head_size);
    float* to = a.dq_sum + rows.head(first + r) * a.head_size;
    for_each_vector(a.head_size, [&](int64_t i, auto lanes) {
      store(to + i, load(to + i, lanes) + load(from + i, lanes) * a.scale, lanes);
    });
  }
}

template <class T>
void store_rows(T* to, int64_t stride, const float* from, const KeyGradientTile& keys,
                float factor) {
  for (int64_t row = 0; row < keys.count; ++row) {
    for_each_vector(keys.size, [&](int64_t i, auto lanes) {
      store(to + row * stride + i, load(from + row * keys.width + i, lanes) * factor, lanes);
    });
  }
}

// The gradients between a tile of keys and all queries of one segment.
template <class T>
void backward_segment(const AttentionBackward& a, const QueryRows& rows, KeyGradientTile& keys,
                      QueryGradientTile& queries, Wanted wanted) {
  const int64_t begin = rows.lower_bound(keys.position);
  const int64_t end =
      a.window > 0 ? rows.lower_bound(keys.position + keys.count - 1 + a.window) : rows.count();
  for (int64_t first = begin; first < end; first += kRows) {
    read_rows<T>(queries, a, rows, first);
    backward_tiles(queries, keys, a.window, wanted);
    if (wanted != kKeyGradients) add_dq(queries, a, rows, first);
  }
}

// The gradients of a tile of keys of one segment, which its queries and its children's queries see.
template <class T>
void backward_key_tile(const AttentionBackward& a, int32_t segment, int32_t key_head, int64_t first,
                       Wanted wanted) {
  KeyGradientTile keys;
  QueryGradientTile queries;
  const KeyRun<T> run = keys_of<T>(a, segment, key_head);
  keys.read(run, first, a.head_size);
  clear(keys.dkeys, kKeys * keys.width);
  clear(keys.dvalues, kKeys * keys.width);
  backward_segment<T>(a, QueryRows(a, segment, key_head), keys, queries, wanted);
  for (int32_t i = a.layout.children_starts[segment]; i < a.layout.children_starts[segment + 1];
       ++i) {
    const QueryRows rows(a, a.layout.children[i], key_head);
    backward_segment<T>(a, rows, keys, queries, wanted);
  }
  const int64_t offset = (a.layout.starts[segment] + first) * run.stride + key_head * a.head_size;
  store_rows(static_cast<T*>(a.dk) + offset, run.stride, keys.dkeys, keys,
             static_cast<float>(kLn2));
  store_rows(static_cast<T*>(a.dv) + offset, run.stride, keys.dvalues, keys, 1.0f);
}

// Rounds finished sums of dq, rows [begin, end), to the storage format.
template <class T>
void round_dq(const AttentionBackward& a, const QueryRows& rows, int64_t begin, int64_t end) {
  if (a.dq == a.dq_sum) return;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t offset = rows.head(row) * a.head_size;
    for_each_vector(a.head_size, [&](int64_t i, auto lanes) {
      store(static_cast<T*>(a.dq) + offset + i, load(a.dq_sum + offset + i, lanes), lanes);
    });
  }
}

// All gradients of the keys of a segment, then of its own queries: they have seen their last key.
template <class T>
void backward_whole_segment(const AttentionBackward& a, int32_t segment, int32_t key_head) {
  const int64_t count = a.layout.starts[segment + 1] - a.layout.starts[segment];
  for (int64_t first = 0; first < count; first += kKeys) {
    backward_key_tile<T>(a, segment, key_head, first, kAll);
  }
  const QueryRows rows(a, segment, key_head);
  round_dq<T>(a, rows, 0, rows.count());
}

// A task is a whole family, a root segment with its children: scores are computed once for all
// three gradients, and nobody else adds to them.
template <class T>
void backward(const AttentionBackward& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const AttentionTask& task = a.tasks[i];
    backward_whole_segment<T>(a, task.segment, task.key_head);
    for (int32_t c = a.layout.children_starts[task.segment];
         c < a.layout.children_starts[task.segment + 1]; ++c) {
      backward_whole_segment<T>(a, a.layout.children[c], task.key_head);
    }
  }
}

// The same sums in the same order, in more and smaller tasks that compute the scores twice.

template <class T>
void backward_keys(const AttentionBackward& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const AttentionTask& task = a.tasks[i];
    backward_key_tile<T>(a, task.segment, task.key_head, task.first_row, kKeyGradients);
  }
}

template <class T>
void backward_queries_over(const AttentionBackward& a, const QueryRows& rows, int64_t first,
                           const KeyRun<T>& run, QueryGradientTile& queries) {
  KeyGradientTile keys;
  const Span all = cover(queries.positions, queries.rows, a.window, run.position, run.count);
  for (int64_t key = all.begin / kKeys * kKeys; key < all.end; key += kKeys) {
    keys.read(run, key, a.head_size);
    backward_tiles(queries, keys, a.window, kQueryGradients);
    add_dq(queries, a, rows, first);
  }
}

template <class T>
void backward_queries(const AttentionBackward& a, int64_t begin, int64_t end) {
  QueryGradientTile queries;
  for (int64_t i = begin; i < end; ++i) {
    const AttentionTask& task = a.tasks[i];
    const QueryRows rows(a, task.segment, task.key_head);
    read_rows<T>(queries, a, rows, task.first_row);
    const int32_t prefix = a.layout.prefix[task.segment];
    if (prefix >= 0) {
      const KeyRun<T> run = keys_of<T>(a, prefix, task.key_head);
      backward_queries_over(a, rows, task.first_row, run, queries);
    }
    const KeyRun<T> run = keys_of<T>(a, task.segment, task.key_head);
    backward_queries_over(a, rows, task.first_row, run, queries);
    round_dq<T>(a, rows, task.first_row, task.first_row + queries.rows);
  }
}

}  // namespace

const AttentionKernels FASTLLM_ISA::attention = {
    kRows,
    kKeys,
    FASTLLM_FORMATS(forward),
    FASTLLM_FORMATS(delta),
    FASTLLM_FORMATS(backward),
    FASTLLM_FORMATS(backward_keys),
    FASTLLM_FORMATS(backward_queries),
};

}  // namespace fastllm
