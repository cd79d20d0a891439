// Where the rows of a matrix lie.

#pragma once

#include "kernels.h"
#include "simd.h"

namespace {

template <class T>
FASTLLM_INLINE const T* at(fastllm::Rows rows, int64_t row) {
  return static_cast<const T*>(rows.data) + row * rows.stride;
}

template <class T>
FASTLLM_INLINE T* at(fastllm::OutRows rows, int64_t row) {
  return static_cast<T*>(rows.data) + row * rows.stride;
}

// Calls step(row, column, count) for the pieces of rows that the elements [begin, end) are.
template <class Step>
FASTLLM_INLINE void for_each_piece(int64_t columns, int64_t begin, int64_t end, Step step) {
  int64_t row = begin / columns, column = begin % columns;
  while (begin < end) {
    const int64_t left = end - begin, in_row = columns - column;
    const int64_t count = left < in_row ? left : in_row;
    step(row, column, count);
    begin += count;
    column = 0;
    ++row;
  }
}

}  // namespace
