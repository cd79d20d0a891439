// out = silu(gate) * up, and its gradient, element by element. With s = sigmoid(gate):
//   d silu / d gate = s + gate s (1 - s)

#include "kernels.h"
#include "rows.h"
#include "simd.h"

namespace fastllm {
namespace {

template <class T>
void forward(const SwigluForward& a, int64_t begin, int64_t end) {
  for_each_piece(a.columns, begin, end, [&](int64_t row, int64_t column, int64_t count) {
    const T* gate = at<T>(a.gate, row) + column;
    const T* up = at<T>(a.up, row) + column;
    T* out = at<T>(a.out, row) + column;
    for_each_vector(count, [&](int64_t i, auto lanes) {
      Vec g = load(gate + i, lanes);
      store(out + i, g * sigmoid(g) * load(up + i, lanes), lanes);
    });
  });
}

template <class T>
void backward(const SwigluBackward& a, int64_t begin, int64_t end) {
  for_each_piece(a.columns, begin, end, [&](int64_t row, int64_t column, int64_t count) {
    const T* dout = at<T>(a.dout, row) + column;
    const T* gate = at<T>(a.gate, row) + column;
    const T* up = at<T>(a.up, row) + column;
    T* dgate = at<T>(a.dgate, row) + column;
    T* dup = at<T>(a.dup, row) + column;
    for_each_vector(count, [&](int64_t i, auto lanes) {
      Vec d = load(dout + i, lanes);
      Vec g = load(gate + i, lanes);
      Vec u = load(up + i, lanes);
      Vec s = sigmoid(g);
      Vec silu = g * s;
      store(dup + i, d * silu, lanes);
      store(dgate + i, d * u * (s + silu * (1.0f - s)), lanes);
    });
  });
}

}  // namespace

const SwigluKernels FASTLLM_ISA::swiglu = {FASTLLM_FORMATS(forward), FASTLLM_FORMATS(backward)};

}  // namespace fastllm
