// Rotary position embedding, half-split pairing: channels (i, i + D/2) of a head are rotated by the
// angle of the token's position. The inverse rotation is also the gradient.

#include "kernels.h"
#include "simd.h"

namespace fastllm {
namespace {

template <class T>
FASTLLM_INLINE void rotate(const T* in, T* out, const float* cos, const float* sin, float sign,
                           int64_t half) {
  for_each_vector(half, [&](int64_t i, auto lanes) {
    Vec a = load(in + i, lanes);
    Vec b = load(in + half + i, lanes);
    Vec c = load(cos + i, lanes);
    Vec s = load(sin + i, lanes) * sign;
    store(out + i, a * c - b * s, lanes);
    store(out + half + i, b * c + a * s, lanes);
  });
}

template <class T>
void rotate_heads(const Heads& heads, int64_t token, int64_t head_size, const float* cos,
                  const float* sin, float sign) {
  const T* in = static_cast<const T*>(heads.in) + token * heads.token_stride;
  T* out = static_cast<T*>(heads.out) + token * heads.out_token_stride;
  for (int64_t head = 0; head < heads.count; ++head) {
    rotate(in, out, cos, sin, sign, head_size / 2);
    in += heads.head_stride;
    out += heads.out_head_stride;
  }
}

template <class T>
void forward(const RopeForward& a, int64_t begin, int64_t end) {
  const float sign = a.inverse ? -1.0f : 1.0f;
  for (int64_t token = begin; token < end; ++token) {
    const int64_t angles = a.positions[token] * (a.head_size / 2);
    const float* cos = a.cos + angles;
    const float* sin = a.sin + angles;
    rotate_heads<T>(a.q, token, a.head_size, cos, sin, sign);
    rotate_heads<T>(a.k, token, a.head_size, cos, sin, sign);
  }
}

}  // namespace

const RopeKernels FASTLLM_ISA::rope = {FASTLLM_FORMATS(forward)};

}  // namespace fastllm
