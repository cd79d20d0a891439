// The copies that a matrix product makes of its operands: in the caches, in the order in which the
// inner loop reads them, as words of 32 bits. A word is one number in fp32 or, for bf16 dot
// instructions, two numbers of neighbouring depths as they are.

#pragma once

#include "kernels.h"
#include "simd.h"

namespace {

using fastllm::kMatmulBlock;
using fastllm::Matmul;
using fastllm::Matrix;

// The inner loop keeps kTileRows x 2 vectors of sums in registers.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTileRows = 14;  // of 32 registers: 28 sums, 2 vectors of b, 1 word of a
#else
constexpr int kTileRows = 6;  // of 16 registers: 12 sums, 2 vectors of b, 1 word of a
#endif
constexpr int kPanel = 2 * kLanes;      // columns of b that the inner loop reads side by side
constexpr int kDepth = 256;             // words; a panel of b of this depth stays in the L1 cache
constexpr int kColumns = kMatmulBlock;  // kDepth x kColumns of b stay in the L2 cache

// Words between the columns of a packed tile of a that is stored by columns: whole vectors.
constexpr int kColumnStride = (kTileRows + kLanes - 1) / kLanes * kLanes;

FASTLLM_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- Words ----------------------------------------------------------------------------------

// Numbers of any format, one to a word.
template <class T>
struct Single {
  using Number = T;
  static constexpr int kNumbers = 1;

  // Words of neighbouring depths.
  template <class Lanes>
  static FASTLLM_INLINE Vec along(const T* p, Lanes lanes) {
    return load(p, lanes);
  }
  // Words of one depth; the next depth is `stride` numbers on, if there is one.
  template <class Lanes>
  static FASTLLM_INLINE Vec across(const T* p, int64_t, bool, Lanes lanes) {
    return load(p, lanes);
  }
};

struct Multiply {
  static FASTLLM_INLINE Vec add(Vec sum, float a, Vec b) { return sum + a * b; }
};

#if defined(__AVX512BF16__)

// Pairs of bf16 numbers.
struct Pair {
  using Number = bf16;
  static constexpr int kNumbers = 2;

  template <class Lanes>
  static FASTLLM_INLINE Vec along(const bf16* p, Lanes lanes) {
    return load(reinterpret_cast<const float*>(p), lanes);
  }
  template <class Lanes>
  static FASTLLM_INLINE Vec across(const bf16* p, int64_t stride, bool has_next, Lanes lanes) {
    BitsVec word = bits(p, lanes);
    if (has_next) word |= bits(p + stride, lanes) << 16;
    return bit_cast<Vec>(word);
  }

 private:
  // bf16 numbers as fp32 have their bits in the upper half.
  template <class Lanes>
  static FASTLLM_INLINE BitsVec bits(const bf16* p, Lanes lanes) {
    return bit_cast<BitsVec>(load(p, lanes)) >> 16;
  }
};

struct Dot {
  static FASTLLM_INLINE Vec add(Vec sum, float a, Vec b) {
    return bit_cast<Vec>(_mm512_dpbf16_ps(bit_cast<__m512>(sum), bit_cast<__m512bh>(broadcast(a)),
                                          bit_cast<__m512bh>(b)));
  }
};

#else

using Pair = Single<bf16>;
using Dot = Multiply;

#endif

template <class Words>
FASTLLM_INLINE int64_t words(int64_t numbers) {
  return (numbers + Words::kNumbers - 1) / Words::kNumbers;
}

template <class Words>
FASTLLM_INLINE const typename Words::Number* at(const Matrix& m, int64_t row, int64_t column) {
  using Number = typename Words::Number;
  return static_cast<const Number*>(m.data) + row * m.row_stride + column * m.column_stride;
}

// ---- Operands whose depth lies along memory -------------------------------------------------

template <class Words>
FASTLLM_INLINE void copy_along(float* to, const typename Words::Number* from, int64_t count) {
  for_each_vector(count, [&](int64_t i, auto lanes) {
    store(to + i, Words::along(from + i * Words::kNumbers, lanes), lanes);
  });
}

typedef float Four __attribute__((vector_size(16)));

// Four rows of four words, transposed into four columns.
FASTLLM_INLINE void transpose_4x4(const float* from, int64_t stride, float* to) {
  Four rows[4];
  for (int i = 0; i < 4; ++i) rows[i] = load_bits<Four>(from + i * stride);
  for (int i = 0; i < 4; ++i) {
    const Four column = {rows[0][i], rows[1][i], rows[2][i], rows[3][i]};
    __builtin_memcpy(to + i * kPanel, &column, sizeof(column));
  }
}

// to [count][kPanel] = from^T for four rows of `count` words.
FASTLLM_INLINE void transpose_rows(float* to, const float* from, int64_t count) {
  int64_t d = 0;
  for (; d + 4 <= count; d += 4) transpose_4x4(from + d, kDepth, to + d * kPanel);
  for (; d < count; ++d) {
    for (int i = 0; i < 4; ++i) to[d * kPanel + i] = from[i * kDepth + d];
  }
}

// A panel [count][kPanel] of the transpose of `rows` rows, zeros beyond them.
template <class Words>
void copy_transposed(float* to, const typename Words::Number* from, int64_t stride, int64_t rows,
                     int64_t count) {
  alignas(64) float four[4 * kDepth] = {};
  for (int64_t r = 0; r < kPanel; r += 4) {
    for (int64_t i = 0; i < 4; ++i) {
      if (r + i < rows) {
        copy_along<Words>(four + i * kDepth, from + (r + i) * stride, count);
      } else {
        for (int64_t d = 0; d < kDepth; d += kLanes) store(four + i * kDepth + d, Vec{});
      }
    }
    transpose_rows(to + r, four, count);
  }
}

// A tile of a that is stored by rows: [kTileRows][kDepth].
template <class Words>
void pack_rows(float* packed, const Matmul& m, int64_t first, int64_t rows, int64_t depth_begin,
               int64_t depth) {
  for (int64_t r = 0; r < rows; ++r) {
    copy_along<Words>(packed + r * kDepth, at<Words>(m.a, first + r, depth_begin),
                      words<Words>(depth));
  }
}

// Asks for the numbers of a tile that pack_rows will copy, while there is arithmetic to hide the
// wait behind.
template <class Words>
void prefetch_rows(float*, const Matmul& m, int64_t first, int64_t rows, int64_t depth_begin,
                   int64_t depth) {
  constexpr int64_t kLine = 64 / sizeof(typename Words::Number);
  for (int64_t r = 0; r < rows; ++r) {
    const auto* from = at<Words>(m.a, first + r, depth_begin);
    for (int64_t d = 0; d < depth; d += kLine) __builtin_prefetch(from + d);
  }
}

// ---- Operands whose depth lies across memory ------------------------------------------------

// A tile's words of one depth, of which `rows` exist. Whole vectors are written: masked stores are
// slow on some processors, and what lies beyond the tile is never used.
template <class Words>
FASTLLM_INLINE void copy_tile(float* to, const typename Words::Number* from, int64_t stride,
                              bool has_next, int rows) {
#pragma GCC unroll 2
  for (int r = 0; r < kColumnStride; r += kLanes) {
    const int count = rows - r;
    if (count >= kLanes) {
      store(to + r, Words::across(from + r, stride, has_next, AllLanes{}));
    } else if (count > 0) {
      store(to + r, Words::across(from + r, stride, has_next, SomeLanes{count}));
    }
  }
}

// All tiles of a block of a that is stored by columns, each [kDepth][kColumnStride]. The memory is
// read in its own order.
template <class Words>
void pack_columns(float* packed, const Matmul& m, int64_t first, int64_t rows, int64_t depth_begin,
                  int64_t depth) {
  const int64_t stride = m.a.column_stride;
  for (int64_t d = 0; d < words<Words>(depth); ++d) {
    const int64_t number = d * Words::kNumbers;
    const bool has_next = number + 1 < depth;
    const auto* from = at<Words>(m.a, first, depth_begin + number);
    float* to = packed + d * kColumnStride;
    int64_t i = 0;
    for (; i + kTileRows <= rows; i += kTileRows, to += kDepth * kColumnStride) {
      copy_tile<Words>(to, from + i, stride, has_next, kTileRows);
    }
    if (i < rows) copy_tile<Words>(to, from + i, stride, has_next, static_cast<int>(rows - i));
  }
}

// Words of one depth, panel after panel, zeros beyond the columns.
template <class Words>
FASTLLM_INLINE void copy_row(float* to, const typename Words::Number* from, int64_t stride,
                             bool has_next, int64_t columns, int64_t panel) {
  int64_t j = 0;
  for (; j + kPanel <= columns; j += kPanel, to += panel) {
    store(to, Words::across(from + j, stride, has_next, AllLanes{}));
    store(to + kLanes, Words::across(from + j + kLanes, stride, has_next, AllLanes{}));
  }
  if (j == columns) return;
  for (int64_t i = 0; i < kPanel; i += kLanes) store(to + i, Vec{});
  for_each_vector(columns - j, [&](int64_t i, auto lanes) {
    store(to + i, Words::across(from + j + i, stride, has_next, lanes), lanes);
  });
}

// Panel after panel, each [words][kPanel]. The memory is read in its own order.
template <class Words>
void pack_b(float* packed, const Matmul& m, int64_t depth_begin, int64_t depth, int64_t first,
            int64_t columns) {
  const int64_t count = words<Words>(depth), panel = kPanel * count;
  const auto* from = at<Words>(m.b, depth_begin, first);
  if (m.b.column_stride == 1) {
    for (int64_t d = 0; d < count; ++d) {
      const int64_t number = d * Words::kNumbers;
      copy_row<Words>(packed + d * kPanel, from + number * m.b.row_stride, m.b.row_stride,
                      number + 1 < depth, columns, panel);
    }
    return;
  }
  for (int64_t j = 0; j < columns; j += kPanel, packed += panel) {
    copy_transposed<Words>(packed, from + j * m.b.column_stride, m.b.column_stride,
                           smaller(kPanel, columns - j), count);
  }
}

// By format; last, pairs of bf16.
using Pack = void (*)(float*, const Matmul&, int64_t, int64_t, int64_t, int64_t);
#define FASTLLM_WORDS(pack) {pack<Single<float>>, pack<Single<bf16>>, pack<Single<fp16>>, pack<Pair>}
constexpr Pack kPackRows[] = FASTLLM_WORDS(pack_rows);
constexpr Pack kPrefetchRows[] = FASTLLM_WORDS(prefetch_rows);
constexpr Pack kPackColumns[] = FASTLLM_WORDS(pack_columns);
constexpr Pack kPackB[] = FASTLLM_WORDS(pack_b);
#undef FASTLLM_WORDS

}  // namespace
