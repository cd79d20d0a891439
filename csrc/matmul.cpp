// Matrix products of fp32, bf16 and fp16 matrices with sums in fp32, block by block in the caches
// (Goto & van de Geijn, 2008).
//
// Why not PyTorch's own: its fp32 product reaches half the speed of AVX-512 on AMD, its bf16 and
// fp16 products are slower than fp32 wherever the processor has no fast instruction for them, and
// none of them reads bf16 and writes fp32.

#include "matmul_pack.h"

namespace fastllm {
namespace {

// ---- The inner loop -------------------------------------------------------------------------

enum Left { kByRows, kByColumns };

// c [rows, kPanel] (+)= a [rows, depth] b [depth, kPanel], with c in registers; depth in words.
template <Left left, class Arithmetic, int rows>
FASTLLM_INLINE void multiply_tile(const float* a, const float* b, int64_t depth, float* c,
                                  int64_t stride, bool add) {
  Vec sums[rows][2];
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) sums[r][0] = sums[r][1] = Vec{};
  for (int64_t d = 0; d < depth; ++d) {
    const Vec b0 = load(b + d * kPanel), b1 = load(b + d * kPanel + kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
      const float word = left == kByRows ? a[r * kDepth + d] : a[d * kColumnStride + r];
      sums[r][0] = Arithmetic::add(sums[r][0], word, b0);
      sums[r][1] = Arithmetic::add(sums[r][1], word, b1);
    }
  }
  if (add) {
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
      sums[r][0] += load(c + r * stride);
      sums[r][1] += load(c + r * stride + kLanes);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
    store(c + r * stride, sums[r][0]);
    store(c + r * stride + kLanes, sums[r][1]);
  }
}

// The same for the smallest of a few tiles that has the rows.
template <Left left, class Arithmetic>
void multiply_rows(const float* a, const float* b, int64_t depth, float* c, int64_t stride,
                   bool add, int64_t rows) {
  if (rows <= 2) return multiply_tile<left, Arithmetic, 2>(a, b, depth, c, stride, add);
  if (rows <= 4) return multiply_tile<left, Arithmetic, 4>(a, b, depth, c, stride, add);
  if (rows <= 8 && kTileRows > 8) {
    return multiply_tile<left, Arithmetic, 8>(a, b, depth, c, stride, add);
  }
  multiply_tile<left, Arithmetic, kTileRows>(a, b, depth, c, stride, add);
}

// The last rows and columns of a block: a tile of its own, of which a part is kept.
template <Left left, class Arithmetic>
void multiply_edge(const float* a, const float* b, int64_t depth, float* c, int64_t stride,
                   bool add, int64_t rows, int64_t columns) {
  alignas(64) float tile[kTileRows * kPanel];
  multiply_rows<left, Arithmetic>(a, b, depth, tile, kPanel, false, rows);
  for (int64_t r = 0; r < rows; ++r) {
    for_each_vector(columns, [&](int64_t i, auto lanes) {
      Vec sum = load(tile + r * kPanel + i, lanes);
      if (add) sum += load(c + r * stride + i, lanes);
      store(c + r * stride + i, sum, lanes);
    });
  }
}

template <Left left, class Arithmetic>
void multiply(const float* a, const float* b, int64_t depth, float* c, int64_t stride, bool add,
              int64_t rows, int64_t columns) {
  if (rows == kTileRows && columns == kPanel) {
    multiply_tile<left, Arithmetic, kTileRows>(a, b, depth, c, stride, add);
  } else {
    multiply_edge<left, Arithmetic>(a, b, depth, c, stride, add, rows, columns);
  }
}

// ---- Tasks ----------------------------------------------------------------------------------

// A block of c, over a slice of the depth.
struct Block {
  int64_t first_row, rows, first_column, columns, first_depth, end_depth;
};

Block block_of(const Matmul& m, int64_t task) {
  const int64_t row_blocks = (m.rows + m.rows_per_task - 1) / m.rows_per_task;
  const int64_t column_blocks = (m.columns + kColumns - 1) / kColumns;
  const int64_t row = task % row_blocks * m.rows_per_task;
  const int64_t column = task / row_blocks % column_blocks * kColumns;
  const int64_t depth = task / row_blocks / column_blocks * m.depth_per_task;
  return {row,
          smaller(m.rows_per_task, m.rows - row),
          column,
          smaller(kColumns, m.columns - column),
          depth,
          smaller(depth + m.depth_per_task, m.depth)};
}

// Where a thread keeps its copies of the operands, and the sums that have no other place.
struct Workspace {
  float *a, *b, *sums;

  explicit Workspace(const Matmul& m) {
    const int64_t tiles = (m.rows_per_task + kTileRows - 1) / kTileRows;
    const int64_t size_a = m.a.column_stride == 1 ? kTileRows * kDepth
                                                  : tiles * kDepth * kColumnStride;
    constexpr int64_t kSizeB = kDepth * (kColumns + kPanel);
    a = scratch(size_a + kSizeB + m.rows_per_task * kColumns);
    b = a + size_a;
    sums = b + kSizeB;
  }
};

// sums (+)= the product of one block of operands, kDepth words deep at most.
template <Left left, class Arithmetic>
void add_product(const Matmul& m, const Block& block, int64_t d, int64_t depth, float* sums,
                 int64_t stride, bool add, const Workspace& space) {
  const int a_words = m.pairs ? kFormats : m.a.format, b_words = m.pairs ? kFormats : m.b.format;
  const int64_t words = m.pairs ? (depth + 1) / 2 : depth;
  kPackB[b_words](space.b, m, d, depth, block.first_column, block.columns);
  if (left == kByColumns) {
    kPackColumns[a_words](space.a, m, block.first_row, block.rows, d, depth);
  }
  const float* tile = space.a;
  for (int64_t i = 0; i < block.rows; i += kTileRows) {
    const int64_t rows = smaller(kTileRows, block.rows - i);
    if (left == kByRows) {
      const int64_t first = block.first_row + i, rest = block.rows - i - rows;
      kPackRows[a_words](space.a, m, first, rows, d, depth);
      kPrefetchRows[a_words](nullptr, m, first + rows, smaller(kTileRows, rest), d, depth);
    }
    for (int64_t j = 0; j < block.columns; j += kPanel) {
      multiply<left, Arithmetic>(tile, space.b + j * words, words, sums + i * stride + j, stride,
                                 add, rows, smaller(kPanel, block.columns - j));
    }
    if (left == kByColumns) tile += kDepth * kColumnStride;
  }
}

using AddProduct = void (*)(const Matmul&, const Block&, int64_t, int64_t, float*, int64_t, bool,
                            const Workspace&);

AddProduct choose_product(const Matmul& m) {
  if (m.a.column_stride == 1) {
    return m.pairs ? add_product<kByRows, Dot> : add_product<kByRows, Multiply>;
  }
  return m.pairs ? add_product<kByColumns, Dot> : add_product<kByColumns, Multiply>;
}

template <class T>
void copy_out(const Matmul& m, const Block& block, const float* sums) {
  for (int64_t i = 0; i < block.rows; ++i) {
    T* c = static_cast<T*>(m.c.data) + (block.first_row + i) * m.c.row_stride + block.first_column;
    const float* from = sums + i * block.columns;
    for_each_vector(block.columns, [&](int64_t j, auto lanes) {
      Vec sum = load(from + j, lanes);
      if (m.add) sum += load(c + j, lanes);
      store(c + j, sum, lanes);
    });
  }
}

using CopyOut = void (*)(const Matmul&, const Block&, const float*);
constexpr CopyOut kCopyOut[kFormats] = FASTLLM_FORMATS(copy_out);

// The sums of a block are kept in c itself, if that is fp32 and the block has it for itself; else
// in the partial sums of its slice; else in memory of this thread, to be rounded once at the end.
void product(const Matmul& m, int64_t begin, int64_t end) {
  const bool direct = m.partial || m.c.format == kFloat32;
  const AddProduct add_block = choose_product(m);
  const int64_t step = m.pairs ? 2 * kDepth : kDepth;
  const Workspace space(m);
  for (int64_t task = begin; task < end; ++task) {
    const Block block = block_of(m, task);
    float* sums = space.sums;
    int64_t stride = block.columns;
    if (m.partial) {
      const int64_t slice = block.first_depth / m.depth_per_task;
      sums = m.partial + (slice * m.rows + block.first_row) * m.columns + block.first_column;
      stride = m.columns;
    } else if (direct) {
      stride = m.c.row_stride;
      sums = static_cast<float*>(m.c.data) + block.first_row * stride + block.first_column;
    }
    for (int64_t d = block.first_depth; d < block.end_depth; d += step) {
      const bool add = d > block.first_depth || (m.add && direct && !m.partial);
      const int64_t depth = smaller(step, block.end_depth - d);
      add_block(m, block, d, depth, sums, stride, add, space);
    }
    if (!direct) kCopyOut[m.c.format](m, block, sums);
  }
}

// Adds up the slices of the depth, row by row of c, always in the same order.
template <class T>
void add_slices(const Matmul& m, int64_t begin, int64_t end) {
  const int64_t slices = (m.depth + m.depth_per_task - 1) / m.depth_per_task;
  for (int64_t row = begin; row < end; ++row) {
    T* c = static_cast<T*>(m.c.data) + row * m.c.row_stride;
    for_each_vector(m.columns, [&](int64_t j, auto lanes) {
      Vec sum = {};
      for (int64_t slice = 0; slice < slices; ++slice) {
        sum += load(m.partial + (slice * m.rows + row) * m.columns + j, lanes);
      }
      if (m.add) sum += load(c + j, lanes);
      store(c + j, sum, lanes);
    });
  }
}

#if defined(__AVX512BF16__)
constexpr bool kPairs = true;
#else
constexpr bool kPairs = false;
#endif

}  // namespace

const MatmulKernels FASTLLM_ISA::matmul = {kPairs, product, FASTLLM_FORMATS(add_slices)};

}  // namespace fastllm
