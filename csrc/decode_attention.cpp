// Attention of one new token per sequence over the blocks of its prompt and of its tail.
//
// A query row is one head of one sequence. The rows of neighbouring sequences of one prompt that
// share a key head are taken together, a few at a time in registers, so that a key that is loaded
// serves all of them. The lanes of a vector are keys in the products with q and numbers of a head
// in the sums of values, so nothing is transposed. The order and the rounding of every sum are
// those of attention.cpp: in fp32 what is sampled has the bits of what is trained on.

#include "online_softmax.h"

namespace fastllm {
namespace {

static_assert(kCacheBlock == kKeys, "attention.cpp rescales its sums after as many keys");

// ---- A few rows times a matrix --------------------------------------------------------------

// Vectors of sums that each of `rows` rows has in registers, next to as many vectors of the matrix,
// one number of a row and the sums of weights. There are 4 * kBlock registers.
template <int rows>
constexpr int kVectors = rows * 5 + 5 <= 4 * kBlock ? 4 : 2;

// A matrix of the cache, and how far from it the same one of the next block lies.
template <class T>
struct Numbers {
  const T* data;
  int64_t stride, ahead;
};

// sums += a [rows, depth] b [depth, vectors], term by term; take(r, a[r, i]) sees the numbers of a.
// What is read of b is asked for in the next block, which lies anywhere: no prefetcher finds it.
template <int rows, int vectors, class T, class Lanes, class Take>
FASTLLM_INLINE void add_products(Vec (&sums)[rows][vectors], const float* a, int a_stride,
                                 const Numbers<T>& b, int64_t column, int64_t depth, Lanes lanes,
                                 Take take) {
  constexpr int kVectorsOfLine = 64 / static_cast<int>(kLanes * sizeof(T));
  for (int64_t i = 0; i < depth; ++i) {
    const T* row = b.data + i * b.stride + column;
    Vec right[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      right[v] = load(row + v * kLanes, lanes);
      if (v % kVectorsOfLine == 0) __builtin_prefetch(row + v * kLanes + b.ahead);
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      const Vec left = broadcast(a[r * a_stride + i]);
      take(r, left);
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) sums[r][v] += left * right[v];
    }
  }
}

// ---- Query rows -----------------------------------------------------------------------------

// Numbers between the rows of q and of out: known when compiling, and such that rows do not compete
// for the same sets of the L1 cache.
constexpr int kStride = kMaxHeadSize + kHeadAlign;

// Query rows with the softmax over the keys seen so far: out / weight, where out and weight are
// relative to 2^highest.
struct RowTile {
  alignas(64) float q[kRows * kStride];  // times what makes scores exponents of two
  alignas(64) float out[kRows * kStride];
  float weight[kRows], highest[kRows];
  int64_t oldest[kRows];  // the first position that a row sees
};

// Keys and values of one head in a block of the cache, and the rows that look at them.
template <class T>
struct Block {
  Numbers<T> keys;    // [D, kCacheBlock]
  Numbers<T> values;  // [kCacheBlock, D]
  int count;          // keys that are there
  int64_t position;   // of the first
  int begin, end;     // rows
};

// Adds a block of keys to rows [first, first + rows). The functions that hold sums in registers are
// not inlined: compilers would keep what the next one needs in some of those registers.
template <int rows, class T>
struct BlockStep {
  RowTile& tile;
  const Block<T>& block;
  const int first;
  const int64_t size;  // of a head
  float factor[rows];
  alignas(64) float scores[rows * kCacheBlock];

  BlockStep(RowTile& query_rows, const Block<T>& keys, int first_row, int64_t head_size)
      : tile(query_rows), block(keys), first(first_row), size(head_size) {}

  void run() {
    weigh(score());
    add_values_from<kVectors<rows>, true>(0);
  }

  // Scores of the keys that are there, and of some columns after them, which mean nothing. Returns
  // how many they are.
  int score() {
    constexpr int vectors = kVectors<rows>;
    const int columns = static_cast<int>(rounded_up(block.count, 2 * kLanes));
    int column = 0;
    for (; column + vectors * kLanes <= columns; column += vectors * kLanes) {
      score_columns<vectors>(column);
    }
    if (column < columns) score_columns<2>(column);
    return columns;
  }

  template <int vectors>
  __attribute__((noinline)) void score_columns(int column) {
    Vec sums[rows][vectors] = {};
    add_products(sums, tile.q + first * kStride, kStride, block.keys, column, size, AllLanes{},
                 [](int, Vec) {});
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) {
        store(scores + r * kCacheBlock + column + v * kLanes, sums[r][v]);
      }
    }
  }

  // Scores become 2^(score - highest), and what was summed up before counts for `factor`.
  void weigh(int columns) {
    for (int r = 0; r < rows; ++r) {
      float* row = scores + r * kCacheBlock;
      const int64_t begin = tile.oldest[first + r] - block.position;
      if (begin > 0 || block.count < columns) hide(row, begin, columns);
      Vec top = broadcast(kHidden);
      for (int i = 0; i < columns; i += kLanes) top = max(top, load(row + i));
      const float before = tile.highest[first + r], here = largest(top);
      const float high = here > before ? here : before;
      for (int i = 0; i < columns; i += kLanes) store(row + i, exp2(load(row + i) - high));
      factor[r] = exp2(broadcast(before) - high)[0];
      tile.highest[first + r] = high;
    }
  }

  // The scores of keys before `begin` and of those that are not there.
  void hide(float* row, int64_t begin, int columns) {
    const int32_t from = static_cast<int32_t>(smaller(begin, kCacheBlock));
    IntVec key;
    for (int lane = 0; lane < kLanes; ++lane) key[lane] = lane;
    for (int i = 0; i < columns; i += kLanes, key += kLanes) {
      const IntVec seen = (key >= from) & (key < block.count);
      store(row + i, seen ? load(row + i) : broadcast(kHidden));
    }
  }

  // out and weight take the values in, from a column on. The first columns take the weights along.
  template <int vectors, bool with_weights>
  void add_values_from(int64_t column) {
    while (column + vectors * kLanes <= size) {
      add_values<vectors, with_weights>(column, AllLanes{});
      column += vectors * kLanes;
      if (with_weights) return add_values_from<vectors, false>(column);
    }
    if constexpr (vectors > 1) {
      add_values_from<vectors / 2, with_weights>(column);
    } else if (column < size) {
      add_values<1, with_weights>(column, SomeLanes{static_cast<int>(size - column)});
    }
  }

  template <int vectors, bool with_weights, class Lanes>
  __attribute__((noinline)) void add_values(int64_t column, Lanes lanes) {
    float* out = tile.out + first * kStride + column;
    Vec sums[rows][vectors], weights[rows];
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) {
        sums[r][v] = load(out + r * kStride + v * kLanes) * factor[r];
      }
      if (with_weights) weights[r] = broadcast(tile.weight[first + r] * factor[r]);
    }
    add_products(sums, scores, kCacheBlock, block.values, column, block.count, lanes,
                 [&](int r, Vec power) {
                   if (with_weights) weights[r] += power;
                 });
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) store(out + r * kStride + v * kLanes, sums[r][v]);
      if (with_weights) tile.weight[first + r] = weights[r][0];
    }
  }
};

// Adds a block to `count` rows, which are `most` at most.
template <int most, class T>
void attend_rows(RowTile& tile, const Block<T>& block, int first, int count, int64_t size) {
  if constexpr (most > 1) {
    if (count < most) return attend_rows<most - 1>(tile, block, first, count, size);
  }
  BlockStep<most, T>(tile, block, first, size).run();
}

template <class T>
void attend(RowTile& tile, const Block<T>& block, int64_t size) {
  // Equal parts: a row that is left over alone costs as much as four.
  const int rows = block.end - block.begin, parts = (rows + kBlock - 1) / kBlock;
  const int at_once = (rows + parts - 1) / parts;
  for (int first = block.begin; first < block.end; first += at_once) {
    const int count = static_cast<int>(smaller(at_once, block.end - first));
    attend_rows<kBlock>(tile, block, first, count, size);
  }
}

// ---- Tasks ----------------------------------------------------------------------------------

// Rows [first, first + count) of a task: with G = H / K, row r is head r % G of the key head's
// group, in sequence r / G.
struct TaskRows {
  const DecodeAttentionForward& a;
  const DecodeTask& task;
  int64_t first, count;

  // Calls step(sequence, head, begin, end): the rows [begin, end) are a sequence's heads from
  // `head` on.
  template <class Step>
  void for_each_sequence(Step step) const {
    const int64_t group = a.heads / a.key_heads;
    int64_t sequence = task.first + first / group, head = first % group;
    for (int64_t begin = 0, end; begin < count; begin = end) {
      end = smaller(count, begin + group - head);
      step(sequence++, task.key_head * group + head, static_cast<int>(begin),
           static_cast<int>(end));
      head = 0;
    }
  }

  template <class T>
  void read(RowTile& tile) const {
    const float scale = static_cast<float>(a.scale * kLog2E);
    const int64_t prompt_length = a.prefix_lengths[a.group[task.first]];
    const int width = padded(a.head_size);
    for_each_sequence([&](int64_t sequence, int64_t head, int begin, int end) {
      const int64_t length = prompt_length + a.tail_lengths[sequence];
      for (int r = begin; r < end; ++r) {
        float* q = tile.q + r * kStride;
        load_row(q, at<T>(a.q, sequence, head + r - begin), a.head_size);
        take_scale(q, width, scale);
        for (int i = 0; i < width; i += kLanes) store(tile.out + r * kStride + i, Vec{});
        tile.oldest[r] = larger(0, length - finite_window(a.window));
        tile.weight[r] = 0.0f;
        tile.highest[r] = kLowest;
      }
    });
  }

  template <class T>
  void write(const RowTile& tile) const {
    for_each_sequence([&](int64_t sequence, int64_t head, int begin, int end) {
      for (int r = begin; r < end; ++r) {
        const float share = tile.weight[r] > 0.0f ? 1.0f / tile.weight[r] : 0.0f;
        store_row(at<T>(a.out, sequence, head + r - begin), tile.out + r * kStride, a.head_size,
                  share);
      }
    });
  }
};

// Where the keys and the values of a head lie in a block; null for nowhere.
template <class T>
struct Place {
  const T* keys;
  const T* values;
};

template <class T>
Place<T> place_of(const DecodeAttentionForward& a, int64_t block, int64_t key_head) {
  const int64_t place = (block * a.key_heads + key_head) * kCacheBlock * a.head_size;
  return {static_cast<const T*>(a.keys) + place, static_cast<const T*>(a.values) + place};
}

// The first block of a task, as far as there is one.
template <class T>
Place<T> first_place(const DecodeAttentionForward& a, int64_t task) {
  if (task >= a.task_count) return {nullptr, nullptr};
  const DecodeTask& t = a.tasks[task];
  const int64_t prompt = a.group[t.first];
  const int32_t* blocks = a.prefix_lengths[prompt] > 0 ? a.prefix_blocks + prompt * a.prefix_stride
                                                       : a.tail_blocks + t.first * a.tail_stride;
  return place_of<T>(a, blocks[0], t.key_head);
}

// Adds blocks to a tile one call late: by then it is known where the next block lies.
template <class T>
class LateAttend {
 public:
  LateAttend(RowTile& tile, int64_t size) : tile_(tile), size_(size) {}

  void operator()(const Block<T>& next) {
    if (waiting_) {
      block_.keys.ahead = next.keys.data - block_.keys.data;
      block_.values.ahead = next.values.data - block_.values.data;
      attend(tile_, block_, size_);
    }
    block_ = next;
    waiting_ = true;
  }

  // `next` is where the next task begins.
  void finish(const Place<T>& next) {
    if (!waiting_) return;
    block_.keys.ahead = next.keys ? next.keys - block_.keys.data : 0;
    block_.values.ahead = next.values ? next.values - block_.values.data : 0;
    attend(tile_, block_, size_);
    waiting_ = false;
  }

 private:
  RowTile& tile_;
  const int64_t size_;
  Block<T> block_;
  bool waiting_ = false;
};

// Keys in the blocks of a table.
struct BlockRun {
  const int32_t* blocks;
  int64_t count;
  int64_t position;  // of the first
};

// Adds a run of keys to rows [begin, end); blocks that no row sees are not touched.
template <class T>
void attend_run(LateAttend<T>& attend_late, const RowTile& tile, int begin, int end,
                const BlockRun& run, const DecodeAttentionForward& a, int32_t key_head) {
  int64_t oldest = kNoWindow;
  for (int r = begin; r < end; ++r) oldest = smaller(oldest, tile.oldest[r]);
  const int64_t first = larger(0, oldest - run.position) / kCacheBlock * kCacheBlock;
  for (int64_t key = first; key < run.count; key += kCacheBlock) {
    const Place<T> place = place_of<T>(a, run.blocks[key / kCacheBlock], key_head);
    attend_late({{place.keys, kCacheBlock, 0},
                 {place.values, a.head_size, 0},
                 static_cast<int>(smaller(kCacheBlock, run.count - key)),
                 run.position + key,
                 begin,
                 end});
  }
}

template <class T>
void decode(const TaskRows& rows, const Place<T>& next) {
  const DecodeAttentionForward& a = rows.a;
  const int32_t key_head = rows.task.key_head, prompt = a.group[rows.task.first];
  const int64_t prompt_length = a.prefix_lengths[prompt];
  RowTile tile;
  rows.read<T>(tile);
  LateAttend<T> attend_late(tile, a.head_size);
  attend_run(attend_late, tile, 0, static_cast<int>(rows.count),
             {a.prefix_blocks + prompt * a.prefix_stride, prompt_length, 0}, a, key_head);
  rows.for_each_sequence([&](int64_t sequence, int64_t, int begin, int end) {
    attend_run(attend_late, tile, begin, end,
               {a.tail_blocks + sequence * a.tail_stride, a.tail_lengths[sequence], prompt_length},
               a, key_head);
  });
  attend_late.finish(next);
  rows.write<T>(tile);
}

template <class T>
void forward(const DecodeAttentionForward& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t rows = a.tasks[i].sequences * (a.heads / a.key_heads);
    for (int64_t first = 0; first < rows; first += kRows) {
      decode<T>({a, a.tasks[i], first, smaller(kRows, rows - first)}, first_place<T>(a, i + 1));
    }
  }
}

}  // namespace

const DecodeAttentionKernels FASTLLM_ISA::decode_attention = {kRows, FASTLLM_FORMATS(forward)};

}  // namespace fastllm
