// out = silu(gate) * up, and its gradient, element by element. With s = sigmoid(gate):
//   d silu / d gate = s + gate s (1 - s)

#include "kernels.h"
#include "simd.h"

namespace fastllm {
namespace {

template <class T>
void forward(const SwigluForward& a, int64_t begin, int64_t end) {
  const T* gate = static_cast<const T*>(a.gate) + begin;
  const T* up = static_cast<const T*>(a.up) + begin;
  T* out = static_cast<T*>(a.out) + begin;
  for_each_vector(end - begin, [&](int64_t i, auto lanes) {
    Vec g = load(gate + i, lanes);
    store(out + i, g * sigmoid(g) * load(up + i, lanes), lanes);
  });
}

template <class T>
void backward(const SwigluBackward& a, int64_t begin, int64_t end) {
  const T* dout = static_cast<const T*>(a.dout) + begin;
  const T* gate = static_cast<const T*>(a.gate) + begin;
  const T* up = static_cast<const T*>(a.up) + begin;
  T* dgate = static_cast<T*>(a.dgate) + begin;
  T* dup = static_cast<T*>(a.dup) + begin;
  for_each_vector(end - begin, [&](int64_t i, auto lanes) {
    Vec d = load(dout + i, lanes);
    Vec g = load(gate + i, lanes);
    Vec s = sigmoid(g);
    Vec silu = g * s;
    store(dup + i, d * silu, lanes);
    store(dgate + i, d * load(up + i, lanes) * (s + silu * (1.0f - s)), lanes);
  });
}

}  // namespace

const SwigluKernels FASTLLM_ISA::swiglu = {FASTLLM_FORMATS(forward), FASTLLM_FORMATS(backward)};

}  // namespace fastllm
