// Small matrices in fp32 that fit the first caches, and their products: what the attention kernels
// are made of. A tile is row-major; its rows are padded with zeros to whole vectors.

#pragma once

#include "kernels.h"
#include "simd.h"

namespace {

using fastllm::kMaxHeadSize;

constexpr int kKeys = 64;   // keys per tile
constexpr int kRows = 64;   // query rows per tile: one row is one head of one query
constexpr int kAlign = 16;  // spans of keys are widened to multiples of this (and of any vector)

// Rows and vectors that a product keeps in registers: AVX-512 and NEON have 32 of them.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRowsInRegisters = 8;
#else
constexpr int kRowsInRegisters = 4;
#endif

FASTLLM_INLINE int padded(int64_t n) {
  return static_cast<int>((n + kAlign - 1) / kAlign * kAlign);
}
FASTLLM_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
FASTLLM_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// ---- Products -------------------------------------------------------------------------------

// Is the left factor of a product stored as it is, or as its transpose?
enum Left { kStored, kTransposed };
// Does a product replace the result or add to it?
enum Into { kReplace, kAdd };

// c [rows, vectors * kLanes] (+)= a [rows, depth] b [depth, ...], with c in registers.
template <Left left, Into into, int rows, int vectors>
FASTLLM_INLINE void multiply_block(const float* a, int a_stride, const float* b, int b_stride,
                                   float* c, int c_stride, int depth) {
  Vec sums[rows][vectors];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      sums[r][v] = into == kAdd ? load(c + r * c_stride + v * kLanes) : Vec{};
    }
  }
  for (int d = 0; d < depth; ++d) {
    Vec right[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) right[v] = load(b + d * b_stride + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      const float scalar = left == kStored ? a[r * a_stride + d] : a[d * a_stride + r];
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) sums[r][v] += scalar * right[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) store(c + r * c_stride + v * kLanes, sums[r][v]);
  }
}

template <Left left, Into into, int rows>
void multiply_rows(const float* a, int a_stride, const float* b, int b_stride, float* c,
                   int c_stride, int columns, int depth) {
  int j = 0;
  for (; j + 2 * kLanes <= columns; j += 2 * kLanes) {
    multiply_block<left, into, rows, 2>(a, a_stride, b + j, b_stride, c + j, c_stride, depth);
  }
  if (j < columns) {
    multiply_block<left, into, rows, 1>(a, a_stride, b + j, b_stride, c + j, c_stride, depth);
  }
}

// c [rows, columns] (+)= a b for rows <= kRowsInRegisters and whole vectors of columns.
template <Left left, Into into, int most = kRowsInRegisters>
FASTLLM_INLINE void multiply(const float* a, int a_stride, const float* b, int b_stride, float* c,
                             int c_stride, int rows, int columns, int depth) {
  if (rows == most) {
    multiply_rows<left, into, most>(a, a_stride, b, b_stride, c, c_stride, columns, depth);
  } else if constexpr (most > 1) {
    multiply<left, into, most - 1>(a, a_stride, b, b_stride, c, c_stride, rows, columns, depth);
  }
}

// ---- Rows in and out ------------------------------------------------------------------------

FASTLLM_INLINE void clear(float* tile, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) store(tile + i, Vec{});
}

// row = source * factor, padded with zeros.
template <class T>
FASTLLM_INLINE void load_row(float* row, const T* source, int64_t size, float factor = 1.0f) {
  for_each_vector(size,
                  [&](int64_t i, auto lanes) { store(row + i, load(source + i, lanes) * factor); });
  const int64_t written = (size + kLanes - 1) / kLanes * kLanes;
  clear(row + written, padded(size) - written);
}

// The first `count` rows of a [?, size] matrix with `stride` numbers between rows; zeros below, up
// to a multiple of kAlign rows.
template <class T>
void load_tile(float* tile, const T* source, int64_t stride, int64_t count, int64_t size) {
  const int width = padded(size);
  for (int64_t i = 0; i < count; ++i) load_row(tile + i * width, source + i * stride, size);
  clear(tile + count * width, (padded(count) - count) * width);
}

typedef float Four __attribute__((vector_size(16)));

FASTLLM_INLINE void transpose_4x4(const float* from, int from_stride, float* to, int to_stride) {
  Four rows[4];
  for (int i = 0; i < 4; ++i) __builtin_memcpy(&rows[i], from + i * from_stride, sizeof(Four));
  for (int i = 0; i < 4; ++i) {
    const Four column = {rows[0][i], rows[1][i], rows[2][i], rows[3][i]};
    __builtin_memcpy(to + i * to_stride, &column, sizeof(Four));
  }
}

// to [width, kKeys] = from^T, for from [padded(count), width].
void transpose_tile(float* to, const float* from, int64_t count, int width) {
  for (int i = 0; i < padded(count); i += 4) {
    for (int j = 0; j < width; j += 4) {
      transpose_4x4(from + i * width + j, width, to + j * kKeys + i, kKeys);
    }
  }
}

}  // namespace
