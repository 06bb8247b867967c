// The AVX-512 intrinsics that csrc/cpu uses, in plain C++, so that its AVX-512 kernels can be tested on any
// machine. In the compiler's include path before its own <immintrin.h>. What a real instruction does with
// NaN, denormal numbers and rounding is done here too. One that is missing is a compile error: add it.

#pragma once

#include <stdint.h>
#include <string.h>

typedef float __m512 __attribute__((vector_size(64)));
typedef uint32_t __m512i __attribute__((vector_size(64)));  // as 32-bit integers: there are no others
typedef uint16_t __m512bh __attribute__((vector_size(64)));
typedef uint16_t __m256bh __attribute__((vector_size(32)));

namespace emulated {

template <class To, class From>
inline To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

template <class F>
inline __m512 each(const F& f) {
  __m512 out;
  for (int i = 0; i < 16; ++i) out[i] = f(i);
  return out;
}

// The bf16 instructions do not read MXCSR: a denormal number counts as zero, in and out.
inline float flushed(float x) {
  return __builtin_fabsf(x) < 1.17549435e-38f ? __builtin_copysignf(0.0f, x) : x;
}
inline float widened(uint16_t x) { return flushed(bits<float>(static_cast<uint32_t>(x) << 16)); }

inline uint16_t narrowed(float x) {  // to nearest, ties to even; a NaN becomes quiet
  const uint32_t b = bits<uint32_t>(flushed(x));
  return static_cast<uint16_t>(x != x ? (b >> 16) | 0x40 : (b + 0x7fff + ((b >> 16) & 1)) >> 16);
}

}  // namespace emulated

inline __m512 _mm512_loadu_ps(const void* p) {
  __m512 out;
  memcpy(&out, p, 64);
  return out;
}
inline void _mm512_storeu_ps(void* p, __m512 v) { memcpy(p, &v, 64); }
inline __m512i _mm512_loadu_si512(const void* p) {
  __m512i out;
  memcpy(&out, p, 64);
  return out;
}

inline __m512 _mm512_set1_ps(float x) {
  return emulated::each([x](int) { return x; });
}
inline __m512i _mm512_set1_epi32(int x) { return __m512i{} + static_cast<uint32_t>(x); }

inline __m512 _mm512_add_ps(__m512 a, __m512 b) { return a + b; }
inline __m512 _mm512_sub_ps(__m512 a, __m512 b) { return a - b; }
inline __m512 _mm512_mul_ps(__m512 a, __m512 b) { return a * b; }
inline __m512 _mm512_div_ps(__m512 a, __m512 b) { return a / b; }
inline __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
  return emulated::each([&](int i) { return __builtin_fmaf(a[i], b[i], c[i]); });
}
// If either is a NaN the second argument comes out.
inline __m512 _mm512_max_ps(__m512 a, __m512 b) {
  return emulated::each([&](int i) { return a[i] > b[i] ? a[i] : b[i]; });
}
inline __m512 _mm512_min_ps(__m512 a, __m512 b) {
  return emulated::each([&](int i) { return a[i] < b[i] ? a[i] : b[i]; });
}
inline __m512 _mm512_abs_ps(__m512 a) {
  return emulated::each([&](int i) { return __builtin_fabsf(a[i]); });
}

inline __m512i _mm512_castps_si512(__m512 a) { return (__m512i)a; }
inline __m512 _mm512_castsi512_ps(__m512i a) { return (__m512)a; }
inline __m512i _mm512_and_si512(__m512i a, __m512i b) { return a & b; }
inline __m512i _mm512_slli_epi32(__m512i a, unsigned n) { return n > 31 ? __m512i{} : a << n; }

// Halves are added to one another until one number is left, as GCC and Clang do.
inline float _mm512_reduce_add_ps(__m512 a) {
  for (int half = 8; half; half /= 2)
    for (int i = 0; i < half; ++i) a[i] = a[i] + a[i + half];
  return a[0];
}
inline float _mm512_reduce_max_ps(__m512 a) {
  for (int half = 8; half; half /= 2)
    for (int i = 0; i < half; ++i) a[i] = a[i] > a[i + half] ? a[i] : a[i + half];
  return a[0];
}

inline __m256bh _mm512_cvtneps_pbh(__m512 a) {
  __m256bh out;
  for (int i = 0; i < 16; ++i) out[i] = emulated::narrowed(a[i]);
  return out;
}
// Two fused steps, the odd elements first, each rounded to nearest.
inline __m512 _mm512_dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
  return emulated::each([&](int i) {
    using emulated::flushed;
    using emulated::widened;
    const float odd = __builtin_fmaf(widened(a[2 * i + 1]), widened(b[2 * i + 1]), flushed(sum[i]));
    return flushed(__builtin_fmaf(widened(a[2 * i]), widened(b[2 * i]), flushed(odd)));
  });
}
