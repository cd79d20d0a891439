// Root-mean-square normalisation with an optional residual add, and its gradient:
//   h = x + residual,  r = 1 / sqrt(mean(h^2) + eps),  y = h r w
//   dh = r (g - h r^2 mean(g h)) + (gradient that reached h otherwise),  with g = dy w

#include "kernels.h"
#include "rows.h"
#include "simd.h"

namespace fastllm {
namespace {

// h = x + residual, rounded to the storage format; returns the sum of its squares.
template <class T>
float add_residual(const T* x, const T* residual, T* h, int64_t columns) {
  Vec squares = {};
  for_each_vector(columns, [&](int64_t i, auto lanes) {
    store(h + i, load(x + i, lanes) + load(residual + i, lanes), lanes);
    Vec rounded = load(h + i, lanes);
    squares += rounded * rounded;
  });
  return sum(squares);
}

template <class T>
float sum_of_squares(const T* h, int64_t columns) {
  Vec squares = {};
  for_each_vector(columns, [&](int64_t i, auto lanes) {
    Vec value = load(h + i, lanes);
    squares += value * value;
  });
  return sum(squares);
}

template <class T>
void forward(const RmsNormForward& a, int64_t begin, int64_t end) {
  const T* weight = static_cast<const T*>(a.weight);
  for (int64_t row = begin; row < end; ++row) {
    const T* h = at<T>(a.x, row);
    T* y = at<T>(a.y, row);
    float squares;
    if (a.residual.data) {
      T* added = at<T>(a.h, row);
      squares = add_residual(h, at<T>(a.residual, row), added, a.columns);
      h = added;
    } else {
      squares = sum_of_squares(h, a.columns);
    }
    const float rstd = 1.0f / __builtin_sqrtf(squares / a.columns + a.eps);
    for_each_vector(a.columns, [&](int64_t i, auto lanes) {
      store(y + i, load(h + i, lanes) * rstd * load(weight + i, lanes), lanes);
    });
    a.rstd[row] = rstd;
  }
}

// mean(dy w h) of one row.
template <class T>
float mean_product(const T* dy, const T* weight, const T* h, int64_t columns) {
  Vec products = {};
  for_each_vector(columns, [&](int64_t i, auto lanes) {
    products += load(dy + i, lanes) * load(weight + i, lanes) * load(h + i, lanes);
  });
  return sum(products) / columns;
}

template <class T, bool add_dh, bool weight_grad>
void backward_row(const RmsNormBackward& a, int64_t row, float* dweight) {
  const T* dy = at<T>(a.dy, row);
  const T* dh = add_dh ? at<T>(a.dh, row) : nullptr;
  const T* h = at<T>(a.h, row);
  const T* weight = static_cast<const T*>(a.weight);
  T* dx = at<T>(a.dx, row);
  const float rstd = a.rstd[row];
  const float pull = rstd * rstd * mean_product(dy, weight, h, a.columns);
  for_each_vector(a.columns, [&](int64_t i, auto lanes) {
    Vec d = load(dy + i, lanes);
    Vec value = load(h + i, lanes);
    Vec gradient = rstd * (d * load(weight + i, lanes) - value * pull);
    if (add_dh) gradient += load(dh + i, lanes);
    store(dx + i, gradient, lanes);
    if (weight_grad) store(dweight + i, load(dweight + i, lanes) + d * (value * rstd), lanes);
  });
}

// The range is one of blocks of rows: each block adds up its own gradient of the weight, so that
// the order of the sum does not depend on the threads.
template <class T, bool add_dh, bool weight_grad>
void backward_blocks(const RmsNormBackward& a, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * a.block;
    const int64_t last = first + a.block < a.rows ? first + a.block : a.rows;
    float* dweight = weight_grad ? a.dweight + block * a.columns : nullptr;
    for (int64_t row = first; row < last; ++row) {
      backward_row<T, add_dh, weight_grad>(a, row, dweight);
    }
  }
}

template <class T>
void backward(const RmsNormBackward& a, int64_t begin, int64_t end) {
  if (a.dh.data) {
    return a.dweight ? backward_blocks<T, true, true>(a, begin, end)
                     : backward_blocks<T, true, false>(a, begin, end);
  }
  return a.dweight ? backward_blocks<T, false, true>(a, begin, end)
                   : backward_blocks<T, false, false>(a, begin, end);
}

}  // namespace

const RmsNormKernels FASTLLM_ISA::rms_norm = {FASTLLM_FORMATS(forward), FASTLLM_FORMATS(backward)};

}  // namespace fastllm
