// One vector of fp32 numbers, as wide as the instruction set has registers, and what kernels need
// of it: loads and stores of fp32, bf16 and fp16, exp, tanh, sums. Written with the vector
// extensions of GCC and Clang, so one source serves SSE2, AVX2, AVX-512 and NEON; intrinsics
// appear only where a compiler cannot find the instruction by itself (fp16).
//
// The kernels are compiled several times with different flags and linked into one library. An
// inline function with external linkage would exist once per build, and the linker keeps any one
// of them: perhaps the AVX-512 one, on a CPU that has none. Hence two rules for every file
// that includes this one: no C++ standard headers, and everything in the unnamed namespace.

#pragma once

#include <stdint.h>

#if defined(__F16C__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define FASTLLM_INLINE inline __attribute__((always_inline))

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IntVec __attribute__((vector_size(kLanes * 4)));
typedef uint32_t BitsVec __attribute__((vector_size(kLanes * 4)));
typedef uint16_t HalfBitsVec __attribute__((vector_size(kLanes * 2)));

// Storage formats. Arithmetic is always in fp32.
struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

// ---- Bits -----------------------------------------------------------------------------------

template <class To, class From>
FASTLLM_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

FASTLLM_INLINE Vec broadcast(float x) { return x - Vec{}; }

FASTLLM_INLINE BitsVec widen(HalfBitsVec bits) {
  // GCC would widen two halves and join them: five instructions, three of them between lanes.
#if defined(__AVX512F__)
  return bit_cast<BitsVec>(_mm512_maskz_cvtepu16_epi32(0xffff, bit_cast<__m256i>(bits)));
#elif defined(__AVX2__)
  return bit_cast<BitsVec>(_mm256_cvtepu16_epi32(bit_cast<__m128i>(bits)));
#else
  return __builtin_convertvector(bits, BitsVec);
#endif
}

FASTLLM_INLINE HalfBitsVec narrow(BitsVec bits) {
  return __builtin_convertvector(bits, HalfBitsVec);
}

FASTLLM_INLINE Vec from_bf16(HalfBitsVec bits) { return bit_cast<Vec>(widen(bits) << 16); }

// Round to nearest even; NaN stays NaN.
FASTLLM_INLINE HalfBitsVec to_bf16_bits(Vec x) {
  BitsVec bits = bit_cast<BitsVec>(x);
  BitsVec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  BitsVec quiet_nan = BitsVec{} + 0x7fc0;
  return narrow(x == x ? rounded : quiet_nan);
}

FASTLLM_INLINE HalfBitsVec to_bf16(Vec x) {
#if defined(__AVX512BF16__)
  // The instruction takes subnormals for zero. They are rare: a branch costs less than a blend.
  constexpr int kSubnormal = 0x20;
  const bool exact = _mm512_fpclass_ps_mask(bit_cast<__m512>(x), kSubnormal) == 0;
  if (__builtin_expect(exact, true)) {
    return bit_cast<HalfBitsVec>(_mm512_cvtneps_pbh(bit_cast<__m512>(x)));
  }
#endif
  return to_bf16_bits(x);
}

#if defined(__AVX512F__)

FASTLLM_INLINE Vec from_fp16(HalfBitsVec bits) {
  // The masked form with all lanes on: the plain one warns of uninitialised memory in GCC 12.
  return bit_cast<Vec>(_mm512_maskz_cvtph_ps(0xffff, bit_cast<__m256i>(bits)));
}
FASTLLM_INLINE HalfBitsVec to_fp16(Vec x) {
  return bit_cast<HalfBitsVec>(
      _mm512_maskz_cvtps_ph(0xffff, bit_cast<__m512>(x), _MM_FROUND_TO_NEAREST_INT));
}

#elif defined(__F16C__)

FASTLLM_INLINE Vec from_fp16(HalfBitsVec bits) {
  return bit_cast<Vec>(_mm256_cvtph_ps(bit_cast<__m128i>(bits)));
}
FASTLLM_INLINE HalfBitsVec to_fp16(Vec x) {
  return bit_cast<HalfBitsVec>(_mm256_cvtps_ph(bit_cast<__m256>(x), _MM_FROUND_TO_NEAREST_INT));
}

#elif defined(__aarch64__)

FASTLLM_INLINE Vec from_fp16(HalfBitsVec bits) {
  return bit_cast<Vec>(vcvt_f32_f16(bit_cast<float16x4_t>(bits)));
}
FASTLLM_INLINE HalfBitsVec to_fp16(Vec x) {
  return bit_cast<HalfBitsVec>(vcvt_f16_f32(bit_cast<float32x4_t>(x)));
}

#else

// An fp16 is an fp32 with a shorter exponent and mantissa. Moving its bits into place leaves the
// exponent short by 112; subnormals have no implicit one and are built as (1 + m) - 1 instead.
FASTLLM_INLINE Vec from_fp16(HalfBitsVec half) {
  BitsVec bits = widen(half);
  BitsVec sign = (bits & 0x8000) << 16;
  BitsVec magnitude = (bits & 0x7fff) << 13;
  BitsVec exponent = magnitude & (0x7c00u << 13);
  BitsVec normal = magnitude + (112u << 23);
  BitsVec infinite = magnitude + (224u << 23);
  Vec smallest_normal = bit_cast<Vec>(BitsVec{} + (113u << 23));
  Vec subnormal = bit_cast<Vec>(magnitude + (113u << 23)) - smallest_normal;
  BitsVec finite = exponent == 0 ? bit_cast<BitsVec>(subnormal) : normal;
  return bit_cast<Vec>(sign | (exponent == (0x7c00u << 13) ? infinite : finite));
}

// Round to nearest even. Adding a number whose last mantissa bit weighs 2^-24 rounds a subnormal.
FASTLLM_INLINE HalfBitsVec to_fp16(Vec x) {
  BitsVec bits = bit_cast<BitsVec>(x);
  BitsVec sign = bits & 0x80000000u;
  BitsVec magnitude = bits ^ sign;
  BitsVec aligner = BitsVec{} + (126u << 23);
  BitsVec subnormal =
      bit_cast<BitsVec>(bit_cast<Vec>(magnitude) + bit_cast<Vec>(aligner)) - aligner;
  BitsVec normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  BitsVec finite = magnitude < (113u << 23) ? subnormal : normal;
  BitsVec infinite = BitsVec{} + 0x7c00;
  BitsVec quiet_nan = BitsVec{} + 0x7e00;
  BitsVec overflowed = magnitude > (255u << 23) ? quiet_nan : infinite;
  return narrow((magnitude >= (143u << 23) ? overflowed : finite) | (sign >> 16));
}

#endif

// ---- Memory ---------------------------------------------------------------------------------

template <class V>
FASTLLM_INLINE V load_bits(const void* from) {
  V v;
  __builtin_memcpy(&v, from, sizeof(v));
  return v;
}

FASTLLM_INLINE Vec load(const float* p) { return load_bits<Vec>(p); }
FASTLLM_INLINE Vec load(const bf16* p) { return from_bf16(load_bits<HalfBitsVec>(p)); }
FASTLLM_INLINE Vec load(const fp16* p) { return from_fp16(load_bits<HalfBitsVec>(p)); }

FASTLLM_INLINE void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof(v)); }
FASTLLM_INLINE void store(bf16* p, Vec v) {
  HalfBitsVec bits = to_bf16(v);
  __builtin_memcpy(p, &bits, sizeof(bits));
}
FASTLLM_INLINE void store(fp16* p, Vec v) {
  HalfBitsVec bits = to_fp16(v);
  __builtin_memcpy(p, &bits, sizeof(bits));
}

// How many lanes of a vector count: all of them, or the last few of a row.
struct AllLanes {};
struct SomeLanes {
  int count;
};

template <class T>
FASTLLM_INLINE Vec load(const T* p, AllLanes) {
  return load(p);
}
template <class T>
FASTLLM_INLINE void store(T* p, Vec v, AllLanes) {
  store(p, v);
}

// The lanes that do not count are loaded as zero and not stored; their memory is not touched.
#if defined(__AVX512F__)

FASTLLM_INLINE __mmask16 mask(SomeLanes lanes) {
  return static_cast<__mmask16>((1u << lanes.count) - 1);
}
FASTLLM_INLINE HalfBitsVec load_halves(const void* p, SomeLanes lanes) {
  return bit_cast<HalfBitsVec>(_mm256_maskz_loadu_epi16(mask(lanes), p));
}
FASTLLM_INLINE void store_halves(void* p, HalfBitsVec bits, SomeLanes lanes) {
  _mm256_mask_storeu_epi16(p, mask(lanes), bit_cast<__m256i>(bits));
}
FASTLLM_INLINE Vec load(const float* p, SomeLanes lanes) {
  return bit_cast<Vec>(_mm512_maskz_loadu_ps(mask(lanes), p));
}
FASTLLM_INLINE Vec load(const bf16* p, SomeLanes lanes) { return from_bf16(load_halves(p, lanes)); }
FASTLLM_INLINE Vec load(const fp16* p, SomeLanes lanes) { return from_fp16(load_halves(p, lanes)); }
FASTLLM_INLINE void store(float* p, Vec v, SomeLanes lanes) {
  _mm512_mask_storeu_ps(p, mask(lanes), bit_cast<__m512>(v));
}
FASTLLM_INLINE void store(bf16* p, Vec v, SomeLanes lanes) { store_halves(p, to_bf16(v), lanes); }
FASTLLM_INLINE void store(fp16* p, Vec v, SomeLanes lanes) { store_halves(p, to_fp16(v), lanes); }

#else

template <class T>
FASTLLM_INLINE Vec load(const T* p, SomeLanes lanes) {
  T buffer[kLanes] = {};
  for (int i = 0; i < lanes.count; ++i) buffer[i] = p[i];
  return load(buffer);
}
template <class T>
FASTLLM_INLINE void store(T* p, Vec v, SomeLanes lanes) {
  T buffer[kLanes];
  store(buffer, v);
  for (int i = 0; i < lanes.count; ++i) p[i] = buffer[i];
}

#endif

// The lanes that count, and `other` in the lanes that do not.
FASTLLM_INLINE Vec only(Vec v, AllLanes, float /*other*/) { return v; }
FASTLLM_INLINE Vec only(Vec v, SomeLanes lanes, float other) {
#if defined(__AVX512F__)
  const __m512 others = bit_cast<__m512>(broadcast(other));
  return bit_cast<Vec>(_mm512_mask_blend_ps(mask(lanes), others, bit_cast<__m512>(v)));
#else
  for (int i = lanes.count; i < kLanes; ++i) v[i] = other;
  return v;
#endif
}

// Calls step(i, lanes) for the vectors that start at i = 0, kLanes, ... of a row of n numbers.
template <class Step>
FASTLLM_INLINE void for_each_vector(int64_t n, Step step) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) step(i, AllLanes{});
  if (i < n) step(i, SomeLanes{static_cast<int>(n - i)});
}

// ---- Arithmetic -----------------------------------------------------------------------------

// The left operand where neither is larger, and NaN where `a` is NaN.
#if defined(__AVX512F__)
// GCC compares and then blends. The instructions return their second operand for a NaN in either.
FASTLLM_INLINE Vec max(Vec a, Vec b) {
  return bit_cast<Vec>(_mm512_maskz_max_ps(0xffff, bit_cast<__m512>(b), bit_cast<__m512>(a)));
}
FASTLLM_INLINE Vec min(Vec a, Vec b) {
  return bit_cast<Vec>(_mm512_maskz_min_ps(0xffff, bit_cast<__m512>(b), bit_cast<__m512>(a)));
}
#elif defined(__AVX2__)
FASTLLM_INLINE Vec max(Vec a, Vec b) {
  return bit_cast<Vec>(_mm256_max_ps(bit_cast<__m256>(b), bit_cast<__m256>(a)));
}
FASTLLM_INLINE Vec min(Vec a, Vec b) {
  return bit_cast<Vec>(_mm256_min_ps(bit_cast<__m256>(b), bit_cast<__m256>(a)));
}
#else
FASTLLM_INLINE Vec max(Vec a, Vec b) { return a < b ? b : a; }
FASTLLM_INLINE Vec min(Vec a, Vec b) { return a > b ? b : a; }
#endif
FASTLLM_INLINE Vec abs(Vec a) { return bit_cast<Vec>(bit_cast<BitsVec>(a) & 0x7fffffffu); }

struct Add {
  template <class V>
  FASTLLM_INLINE V operator()(V a, V b) const {
    return a + b;
  }
};
struct Max {
  template <class V>
  FASTLLM_INLINE V operator()(V a, V b) const {
    return a < b ? b : a;
  }
};

// Folds the upper half of a vector onto the lower half until four lanes are left.
template <int lanes, class V, class Combine>
FASTLLM_INLINE float fold(V v, Combine combine) {
  if constexpr (lanes == 4) {
    return combine(combine(v[0], v[2]), combine(v[1], v[3]));
  } else {
    typedef float Half __attribute__((vector_size(lanes * 2)));
    Half halves[2];
    __builtin_memcpy(halves, &v, sizeof(v));
    return fold<lanes / 2>(combine(halves[0], halves[1]), combine);
  }
}

FASTLLM_INLINE float sum(Vec v) { return fold<kLanes>(v, Add{}); }
FASTLLM_INLINE float largest(Vec v) { return fold<kLanes>(v, Max{}); }

constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer

#if defined(__AVX512F__)
// p 2^n, or 0 where x < lowest.
FASTLLM_INLINE Vec times_power_of_2(Vec p, Vec n, Vec x, float lowest) {
  const __mmask16 counts =
      _mm512_cmp_ps_mask(bit_cast<__m512>(x), bit_cast<__m512>(broadcast(lowest)), _CMP_NLT_UQ);
  return bit_cast<Vec>(_mm512_maskz_scalef_ps(counts, bit_cast<__m512>(p), bit_cast<__m512>(n)));
}
#endif

// 2^x to 2.2 units in the last place for x < 127; 0 below -126. With n = round(x) and f = x - n,
// 2^x = 2^n 2^f: the second factor is a polynomial, and n is added to its exponent.
FASTLLM_INLINE Vec exp2(Vec x) {
  Vec shifted = x + kRounder;
  Vec f = x - (shifted - kRounder);
  Vec p = f * 1.3264727e-3f + 9.6715130e-3f;
  p = p * f + 5.5507336e-2f;
  p = p * f + 2.4022242e-1f;
  p = p * f + 6.9314700e-1f;
  p = p * f + 1.0f;
#if defined(__AVX512F__)
  return times_power_of_2(p, shifted - kRounder, x, -126.0f);
#else
  IntVec exponent = bit_cast<IntVec>(shifted) << 23;
  return x < -126.0f ? Vec{} : bit_cast<Vec>(bit_cast<IntVec>(p) + exponent);
#endif
}

// e^x to 2 units in the last place; 0 below -86.9 and infinity above 88.7. With n = round(x / ln 2),
// e^x = 2^n e^r, where r lies in +-ln(2)/2 and e^r is a polynomial.
FASTLLM_INLINE Vec exp(Vec x) {
  Vec clamped = min(x, broadcast(89.0f));
  Vec shifted = clamped * 1.44269504088896341f + kRounder;
  Vec n = shifted - kRounder;
  Vec r = clamped - n * 0.693359375f + n * 2.12194440e-4f;
  Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
#if defined(__AVX512F__)
  return times_power_of_2(p, n, x, -86.9f);
#else
  // 2^n as 2 * 2^(n - 1), because 2^128 is no fp32.
  IntVec exponent = (bit_cast<IntVec>(shifted) << 23) + (126 << 23);
  Vec result = (p + p) * bit_cast<Vec>(exponent);
  return x < -86.9f ? Vec{} : result;
#endif
}

FASTLLM_INLINE Vec sigmoid(Vec x) { return 1.0f / (1.0f + exp(-x)); }

// A polynomial near zero, where 1 - 2 / (e^2x + 1) would cancel.
FASTLLM_INLINE Vec tanh(Vec x) {
  Vec square = x * x;
  Vec p = square * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  Vec near_zero = p * square * x + x;
  Vec elsewhere = 1.0f - 2.0f / (exp(x + x) + 1.0f);
  return abs(x) < 0.625f ? near_zero : elsewhere;
}

}  // namespace
