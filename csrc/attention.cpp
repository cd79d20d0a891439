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
    return layout.positions[layout.query_rows[query(row)]];
  }
  int64_t query(int64_t row) const { return first_query + row / group; }
  int64_t head(int64_t row) const { return key_head * group + row % group; }
  template <class T>
  const T* in(const HeadRows& numbers, int64_t row) const {
    return at<T>(numbers, query(row), head(row));
  }
  template <class T>
  T* in(const OutHeadRows& numbers, int64_t row) const {
    return at<T>(numbers, query(row), head(row));
  }
  // Which of the N * H heads the row is.
  int64_t index(int64_t row) const { return query(row) * heads + head(row); }
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
  const int64_t position = count > 0 ? a.layout.positions[first] : 0;
  return run_of<T>(a.k, a.v, first, count, key_head, position);
}

template <class T, class Cell>
void forward_tile(const AttentionForward& a, const AttentionTask& task) {
  const QueryRows rows(a, task.segment, task.key_head);
  const int64_t first = task.first_row;
  QueryTile<Cell> tile(
      a.head_size, a.scale, static_cast<int>(smaller(kRows, rows.count() - first)),
      [&](int64_t r) { return rows.in<T>(a.q, first + r); },
      [&](int64_t r) { return rows.position(first + r); });
  const int32_t prefix = a.layout.prefix[task.segment];
  if (prefix >= 0) attend(tile, 0, tile.rows, keys_of<T>(a, prefix, task.key_head), a.window);
  attend(tile, 0, tile.rows, keys_of<T>(a, task.segment, task.key_head), a.window);
  tile.finish([&](int r, const float* attention, float log_sum_exp) {
    store_row(rows.in<T>(a.out, first + r), attention, a.head_size, 1.0f);
    a.lse[rows.index(first + r)] = log_sum_exp;
  });
}

template <class T, class Cell = float>
void forward(const AttentionForward& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) forward_tile<T, Cell>(a, a.tasks[i]);
}

// ---- Backward -------------------------------------------------------------------------------

template <class T>
FASTLLM_INLINE float dot(const T* a, const T* b, int64_t size) {
  Vec products = {};
  for_each_vector(size, [&](int64_t i, auto lanes) {
    products += load(a + i, lanes) * load(b + i, lanes);
  });
  return sum(products);
}

// Is delta known already, or has it to be computed and kept?
enum Delta { kKnown, kNew };

template <class T, class Cell>
void read_rows(QueryGradientTile<Cell>& tile, const AttentionBackward& a, const QueryRows& rows,
               int64_t first, Delta delta) {
  const int count = static_cast<int>(smaller(kRows, rows.count() - first));
  tile.read(a.head_size, a.scale, count, [&](int r) {
    const int64_t row = first + r, index = rows.index(row);
    const T* dout = rows.in<T>(a.dout, row);
    if (delta == kNew) a.delta[index] = dot(dout, rows.in<T>(a.out, row), a.head_size);
    return GradientRow<T>{rows.in<T>(a.q, row), dout, a.lse[index], a.delta[index],
                          rows.position(row)};
  });
}

// The finished dq of a tile.
template <class T, class Cell>
void store_dq(QueryGradientTile<Cell>& tile, const AttentionBackward& a, const QueryRows& rows,
              int64_t first) {
  alignas(64) float stored[kPanel * kMaxHeadSize];
  for (int panel = 0; panel < tile.rows; panel += kPanel) {
    transpose(stored, tile.width, tile.dq_of_panel(panel), kPanel, tile.width, kPanel);
    for (int r = panel; r < smaller(tile.rows, panel + kPanel); ++r) {
      store_row(rows.in<T>(a.dq, first + r), stored + (r - panel) * tile.width, a.head_size,
                a.scale);
    }
  }
}

// The finished gradients of `count` keys from row `first` of the packed rows on.
template <class T>
void store_dk_dv(const AttentionBackward& a, int64_t first, int64_t count, int32_t key_head,
                 KeySums sums) {
  const int width = padded(a.head_size);
  for (int64_t i = 0; i < count; ++i) {
    store_row(at<T>(a.dk, first + i, key_head), sums.dkeys + i * width, a.head_size, a.scale);
    store_row(at<T>(a.dv, first + i, key_head), sums.dvalues + i * width, a.head_size, 1.0f);
  }
}

// Adds the gradients between a tile of queries and a run of keys: to dq and, where `sums` is given,
// to those of the keys.
template <class T, class Cell>
void backward_run(QueryGradientTile<Cell>& queries, const KeyRun<T>& run, int64_t window,
                  float* sums) {
  KeyValueTile<Cell> keys;
  const Span reach = queries.reach();
  const int64_t end = seen(reach.end, window, run.position, run.count).end;
  int64_t key = seen(reach.begin, window, run.position, run.count).begin / kKeys * kKeys;
  for (; key < end; key += kKeys) {
    keys.read(run, key, queries.size);
    score(queries, keys, window);
    add_dq(queries, keys);
    if (sums) add_dk_dv(queries, keys, KeySums::of_tile(sums, key, queries.width));
  }
}

// The gradients of a tile of one segment's queries and, where sums are given, what they add to the
// gradients of their keys.
template <class T, class Cell>
void backward_rows(const AttentionBackward& a, const QueryRows& rows, int32_t segment,
                   int64_t first, float* prefix_sums, float* own_sums) {
  QueryGradientTile<Cell> queries;
  const int64_t window = finite_window(a.window);
  const int32_t key_head = static_cast<int32_t>(rows.key_head);
  const int32_t prefix = a.layout.prefix[segment];
  read_rows<T>(queries, a, rows, first, kNew);
  if (prefix >= 0) backward_run(queries, keys_of<T>(a, prefix, key_head), window, prefix_sums);
  backward_run(queries, keys_of<T>(a, segment, key_head), window, own_sums);
  store_dq<T>(queries, a, rows, first);
}

int64_t sums_of(const AttentionBackward& a, int32_t segment) {
  const int64_t keys = a.layout.starts[segment + 1] - a.layout.starts[segment];
  return KeySums::numbers(keys, padded(a.head_size));
}

// A segment's queries, from the first; they leave the sums of its keys, which are zero before.
template <class T, class Cell>
void backward_segment(const AttentionBackward& a, int32_t segment, int32_t key_head,
                      float* prefix_sums, float* own_sums) {
  const QueryRows rows(a, segment, key_head);
  clear(own_sums, sums_of(a, segment));
  for (int64_t first = 0; first < rows.count(); first += kRows) {
    backward_rows<T, Cell>(a, rows, segment, first, prefix_sums, own_sums);
  }
}

template <class T>
void store_segment(const AttentionBackward& a, int32_t segment, int32_t key_head, float* sums) {
  const int64_t start = a.layout.starts[segment], end = a.layout.starts[segment + 1];
  for (int64_t key = 0; key < end - start; key += kKeys) {
    store_dk_dv<T>(a, start + key, smaller(kKeys, end - start - key), key_head,
                   KeySums::of_tile(sums, key, padded(a.head_size)));
  }
}

// The children of a root segment, whose keys are summed up in one place one after another.
template <class T, class Cell>
void backward_children(const AttentionBackward& a, int32_t root, int32_t key_head,
                       float* root_sums, float* child_sums) {
  for (int32_t c = a.layout.children_starts[root]; c < a.layout.children_starts[root + 1]; ++c) {
    const int32_t child = a.layout.children[c];
    backward_segment<T, Cell>(a, child, key_head, root_sums, child_sums);
    store_segment<T>(a, child, key_head, child_sums);
  }
}

// A task is a whole family, a root segment with its children: scores are computed once for all
// three gradients, and nobody else adds to them.
template <class T, class Cell = float>
void backward(const AttentionBackward& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const int32_t root = a.tasks[i].segment, head = a.tasks[i].key_head;
    const int64_t root_numbers = sums_of(a, root);
    int64_t most = 0;
    for (int32_t c = a.layout.children_starts[root]; c < a.layout.children_starts[root + 1]; ++c) {
      most = larger(most, sums_of(a, a.layout.children[c]));
    }
    float* sums = scratch(root_numbers + most);
    backward_segment<T, Cell>(a, root, head, nullptr, sums);
    backward_children<T, Cell>(a, root, head, sums, sums + root_numbers);
    store_segment<T>(a, root, head, sums);
  }
}

// The same sums in the same order, in more and smaller tasks that compute the scores twice.

template <class T, class Cell = float>
void backward_queries(const AttentionBackward& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const AttentionTask& task = a.tasks[i];
    const QueryRows rows(a, task.segment, task.key_head);
    backward_rows<T, Cell>(a, rows, task.segment, task.first_row, nullptr, nullptr);
  }
}

template <class T, class Cell>
void backward_keys_of(const AttentionBackward& a, const QueryRows& rows,
                      const KeyValueTile<Cell>& keys, QueryGradientTile<Cell>& queries,
                      KeySums sums) {
  const int64_t window = finite_window(a.window);
  const int64_t begin = rows.lower_bound(keys.position) / kRows * kRows;
  const int64_t end = rows.lower_bound(keys.position + keys.count - 1 + window);
  for (int64_t first = begin; first < end; first += kRows) {
    read_rows<T>(queries, a, rows, first, kKnown);
    score(queries, keys, window);
    add_dk_dv(queries, keys, sums);
  }
}

template <class T, class Cell = float>
void backward_keys(const AttentionBackward& a, int64_t begin, int64_t end) {
  KeyValueTile<Cell> keys;
  QueryGradientTile<Cell> queries;
  alignas(64) float room[2 * kKeys * kMaxHeadSize];
  const KeySums sums = KeySums::of_tile(room, 0, padded(a.head_size));
  for (int64_t i = begin; i < end; ++i) {
    const AttentionTask& task = a.tasks[i];
    const int32_t segment = task.segment, head = task.key_head;
    keys.read(keys_of<T>(a, segment, head), task.first_row, a.head_size);
    clear(room, KeySums::numbers(keys.count, padded(a.head_size)));
    backward_keys_of<T>(a, QueryRows(a, segment, head), keys, queries, sums);
    for (int32_t c = a.layout.children_starts[segment]; c < a.layout.children_starts[segment + 1];
         ++c) {
      backward_keys_of<T>(a, QueryRows(a, a.layout.children[c], head), keys, queries, sums);
    }
    store_dk_dv<T>(a, a.layout.starts[segment] + task.first_row, keys.count, head, sums);
  }
}

}  // namespace

const AttentionKernels FASTLLM_ISA::attention = {
    kRows,
    kKeys,
    FASTLLM_FORMATS_AND_PAIRS(forward),
    FASTLLM_FORMATS_AND_PAIRS(backward),
    FASTLLM_FORMATS_AND_PAIRS(backward_queries),
    FASTLLM_FORMATS_AND_PAIRS(backward_keys),
};

}  // namespace fastllm
