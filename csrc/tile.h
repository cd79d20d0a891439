// Small matrices that fit the first caches, and their products: what the attention kernels are made
// of. The lanes of a vector are query rows (or, in the gradients of keys and values, numbers of a
// head), so no product or softmax ever has to combine the lanes of a vector.
//
// A factor is made of cells of 32 bits: fp32 numbers, or pairs of bf16 numbers that follow each
// other along the sum, for processors with an instruction for the products of pairs. Sums are fp32.

#pragma once

#include "kernels.h"
#include "simd.h"

namespace {

using fastllm::kMaxHeadSize;

constexpr int kKeys = 64;           // keys per tile
constexpr int kRows = 128;          // query rows per tile: one row is one head of one query
constexpr int kPanel = 2 * kLanes;  // columns that a product works on at once
constexpr int kHeadAlign = 16;      // rows of a head are padded to multiples of this
static_assert(kRows % kPanel == 0 && kHeadAlign % kLanes == 0, "tiles are made of whole vectors");

// Rows that a product keeps in registers: AVX-512 and NEON have 32 of them, others 16.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kBlock = 8;
#else
constexpr int kBlock = 4;
#endif

FASTLLM_INLINE constexpr int64_t rounded_up(int64_t n, int64_t unit) {
  return (n + unit - 1) / unit * unit;
}
FASTLLM_INLINE int padded(int64_t n) { return static_cast<int>(rounded_up(n, kHeadAlign)); }
FASTLLM_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
FASTLLM_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// ---- Cells ----------------------------------------------------------------------------------

// Two bf16 numbers, the first in the lower half.
typedef uint32_t Pair;

// How many numbers a cell holds.
template <class Cell>
constexpr int kNumbers = 1;
template <>
constexpr int kNumbers<Pair> = 2;

FASTLLM_INLINE Vec load_cells(const float* p) { return load(p); }
FASTLLM_INLINE BitsVec load_cells(const Pair* p) { return load_bits<BitsVec>(p); }

FASTLLM_INLINE Vec add_product(Vec sum, float a, Vec b) { return sum + a * b; }

#if defined(__AVX512BF16__)

FASTLLM_INLINE Vec add_product(Vec sum, Pair a, BitsVec b) {
  return bit_cast<Vec>(_mm512_dpbf16_ps(bit_cast<__m512>(sum), bit_cast<__m512bh>(BitsVec{} + a),
                                        bit_cast<__m512bh>(b)));
}

FASTLLM_INLINE HalfBitsVec rounded_to_bf16(Vec x) {
  return bit_cast<HalfBitsVec>(_mm512_cvtneps_pbh(bit_cast<__m512>(x)));
}

// A cell for each lane.
FASTLLM_INLINE BitsVec pairs(HalfBitsVec first, HalfBitsVec second) {
  return widen(first) | (widen(second) << 16);
}

#endif

// ---- Products -------------------------------------------------------------------------------

// Is the left factor of a product stored as it is, or as its transpose?
enum Left { kStored, kTransposed };

// kBlock rows of a [kBlock, depth] b [depth, vectors * kLanes], with the sums in registers. What
// they start from and where they go is up to `result`; row and column say which block it is.
template <Left left, int vectors, class Cell, class Result>
FASTLLM_INLINE void multiply_block(const Cell* a, int a_stride, const Cell* b, int b_stride,
                                   int depth, Result& result, int row, int column) {
  Vec sums[kBlock][vectors];
  result.start(sums, row, column);
  for (int d = 0; d < depth; ++d) {
    decltype(load_cells(b)) right[vectors];
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) right[v] = load_cells(b + d * b_stride + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kBlock; ++r) {
      const Cell cell = left == kStored ? a[r * a_stride + d] : a[d * a_stride + r];
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) sums[r][v] = add_product(sums[r][v], cell, right[v]);
    }
  }
  result.finish(sums, row, column);
}

// A product of some multiple of kBlock rows and of kLanes columns.
template <Left left, class Cell, class Result>
FASTLLM_INLINE void multiply(const Cell* a, int a_stride, const Cell* b, int b_stride, int rows,
                             int columns, int depth, Result result) {
  const int step = left == kStored ? a_stride : 1;
  int column = 0;
  for (; column + kPanel <= columns; column += kPanel) {
    for (int row = 0; row < rows; row += kBlock) {
      multiply_block<left, 2>(a + row * step, a_stride, b + column, b_stride, depth, result, row,
                              column);
    }
  }
  if (column == columns) return;
  for (int row = 0; row < rows; row += kBlock) {
    multiply_block<left, 1>(a + row * step, a_stride, b + column, b_stride, depth, result, row,
                            column);
  }
}

// Calls step(r, v) for the vectors of a block.
template <int vectors, class Step>
FASTLLM_INLINE void for_each_sum(const Step& step) {
#pragma GCC unroll 8
  for (int r = 0; r < kBlock; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) step(r, v);
  }
}

struct FromZero {
  template <int vectors>
  FASTLLM_INLINE void start(Vec (&sums)[kBlock][vectors], int, int) const {
    for_each_sum<vectors>([&](int r, int v) { sums[r][v] = Vec{}; });
  }
};

// c += a b.
struct AddTo {
  float* c;
  int stride;

  template <int vectors>
  FASTLLM_INLINE void start(Vec (&sums)[kBlock][vectors], int row, int column) const {
    const float* from = c + row * stride + column;
    for_each_sum<vectors>(
        [&](int r, int v) { sums[r][v] = load(from + r * stride + v * kLanes); });
  }
  template <int vectors>
  FASTLLM_INLINE void finish(Vec (&sums)[kBlock][vectors], int row, int column) const {
    float* to = c + row * stride + column;
    for_each_sum<vectors>(
        [&](int r, int v) { store(to + r * stride + v * kLanes, sums[r][v]); });
  }
};

// ---- Rows in and out ------------------------------------------------------------------------

template <class Cell>
FASTLLM_INLINE void clear(Cell* cells, int64_t count) {
  if (count > 0) __builtin_memset(cells, 0, count * sizeof(Cell));
}

// A row of numbers as cells, in the order they have.
template <class T>
FASTLLM_INLINE void load_row(float* row, const T* source, int64_t size) {
  for_each_vector(size, [&](int64_t i, auto lanes) { store(row + i, load(source + i, lanes)); });
  const int64_t written = rounded_up(size, kLanes);
  clear(row + written, padded(size) - written);
}
FASTLLM_INLINE void load_row(Pair* row, const bf16* source, int64_t size) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    const HalfBitsVec numbers = load_bits<HalfBitsVec>(source + i);
    __builtin_memcpy(row + i / 2, &numbers, sizeof(numbers));
  }
  for (; i < padded(size); i += 2) row[i / 2] = i < size ? load_bits<Pair>(source + i) : 0;
}

// to = from * factor, in another format.
template <class T>
FASTLLM_INLINE void store_row(T* to, const float* from, int64_t size, float factor) {
  for_each_vector(
      size, [&](int64_t i, auto lanes) { store(to + i, load(from + i, lanes) * factor, lanes); });
}

// The first `count` rows of a [?, size] matrix with `stride` numbers between rows; below, zeros up
// to a multiple of kBlock rows.
template <class Cell, class T>
FASTLLM_INLINE void load_tile(Cell* tile, const T* source, int64_t stride, int64_t count,
                              int64_t size) {
  const int width = padded(size) / kNumbers<Cell>;
  for (int64_t i = 0; i < count; ++i) load_row(tile + i * width, source + i * stride, size);
  clear(tile + count * width, (rounded_up(count, kBlock) - count) * width);
}

// The same matrix with the numbers of a cell below each other: [count / 2, width] of pairs, from
// [count, width / 2]. A cell of one number is the same either way.
FASTLLM_INLINE const float* stacked(float* /*to*/, const float* from, int64_t, int) { return from; }
#if defined(__AVX512BF16__)
FASTLLM_INLINE const Pair* stacked(Pair* to, const Pair* from, int64_t count, int width) {
  for (int64_t i = 0; i < count; i += 2) {
    const uint16_t* upper = reinterpret_cast<const uint16_t*>(from + i * (width / 2));
    const uint16_t* lower = upper + width;
    for (int j = 0; j < width; j += kLanes) {
      const BitsVec cells =
          pairs(load_bits<HalfBitsVec>(upper + j), load_bits<HalfBitsVec>(lower + j));
      __builtin_memcpy(to + i / 2 * width + j, &cells, sizeof(cells));
    }
  }
  return to;
}
#endif

typedef uint32_t Four __attribute__((vector_size(16)));

FASTLLM_INLINE void transpose_4x4(void* to, int to_stride, const void* from, int from_stride) {
  Four rows[4];
  for (int r = 0; r < 4; ++r) {
    rows[r] = load_bits<Four>(static_cast<const uint32_t*>(from) + r * from_stride);
  }
  for (int c = 0; c < 4; ++c) {
    const Four column = {rows[0][c], rows[1][c], rows[2][c], rows[3][c]};
    __builtin_memcpy(static_cast<uint32_t*>(to) + c * to_stride, &column, sizeof(column));
  }
}

#if defined(__AVX512F__)

// In registers, in four steps. The masked forms, with all lanes on, for the reason in from_fp16.
FASTLLM_INLINE void transpose_16x16(void* to, int to_stride, const void* from, int from_stride) {
  __m512 a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    a[i] = load_bits<__m512>(static_cast<const uint32_t*>(from) + i * from_stride);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_maskz_unpacklo_ps(0xffff, a[i], a[i + 1]);
    b[i + 1] = _mm512_maskz_unpackhi_ps(0xffff, a[i], a[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const __m512d x = bit_cast<__m512d>(b[i + j]), y = bit_cast<__m512d>(b[i + 2 + j]);
      a[i + 2 * j] = bit_cast<__m512>(_mm512_maskz_unpacklo_pd(0xff, x, y));
      a[i + 2 * j + 1] = bit_cast<__m512>(_mm512_maskz_unpackhi_pd(0xff, x, y));
    }
  }
#pragma GCC unroll 2
  for (int i = 0; i < 16; i += 8) {
#pragma GCC unroll 4
    for (int j = i; j < i + 4; ++j) {
      b[j] = _mm512_maskz_shuffle_f32x4(0xffff, a[j], a[j + 4], 0x88);
      b[j + 4] = _mm512_maskz_shuffle_f32x4(0xffff, a[j], a[j + 4], 0xdd);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const __m512 first = _mm512_maskz_shuffle_f32x4(0xffff, b[i], b[i + 8], 0x88);
    const __m512 second = _mm512_maskz_shuffle_f32x4(0xffff, b[i], b[i + 8], 0xdd);
    __builtin_memcpy(static_cast<uint32_t*>(to) + i * to_stride, &first, sizeof(first));
    __builtin_memcpy(static_cast<uint32_t*>(to) + (i + 8) * to_stride, &second, sizeof(second));
  }
}

#endif

// to [columns, ...] = from^T for from [rows, columns], cells of 32 bits, multiples of four.
template <class Cell>
void transpose(Cell* to, int to_stride, const Cell* from, int from_stride, int rows, int columns) {
  int done = 0;  // columns
#if defined(__AVX512F__)
  for (; rows % 16 == 0 && done + 16 <= columns; done += 16) {
    for (int i = 0; i < rows; i += 16) {
      transpose_16x16(to + done * to_stride + i, to_stride, from + i * from_stride + done,
                      from_stride);
    }
  }
#endif
  for (; done < columns; done += 4) {
    for (int i = 0; i < rows; i += 4) {
      transpose_4x4(to + done * to_stride + i, to_stride, from + i * from_stride + done,
                    from_stride);
    }
  }
}

// Rows [count, width] as panels: [count / kPanel][width, kPanel], whose columns are the rows.
template <class Cell>
FASTLLM_INLINE void to_panels(Cell* panels, const Cell* rows, int count, int width) {
  for (int i = 0; i < count; i += kPanel) {
    transpose(panels + i * width, kPanel, rows + i * width, width, kPanel, width);
  }
}

}  // namespace
