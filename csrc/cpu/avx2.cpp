// The kernels for AVX2 with FMA (Intel Haswell, AMD Zen and later).

#include <immintrin.h>
#include <stdint.h>

#include "bfloat16.h"
#include "kernels.h"

namespace vtp_cpu {
namespace {

struct Vector {
  static constexpr int kWidth = 8;
  __m256 v;

  static Vector load(const float* p) { return {_mm256_loadu_ps(p)}; }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  static Vector broadcast(float x) { return {_mm256_set1_ps(x)}; }
  static Vector fma(Vector a, Vector b, Vector c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  // Of a NaN and a number the second argument comes out.
  static Vector max(Vector a, Vector b) { return {_mm256_max_ps(a.v, b.v)}; }
  static Vector min(Vector a, Vector b) { return {_mm256_min_ps(a.v, b.v)}; }
  static Vector abs(Vector a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
  // 2^n, where x is n + 127 + 1.5 * 2^23: the exponent is in its lowest bits.
  static Vector power_of_two(Vector x) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(x.v), 23))};
  }
  static __m256i ints(const char* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static Vector load_low_halves(const char* p) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(ints(p), 16))};
  }
  static Vector load_high_halves(const char* p) {
    return {_mm256_castsi256_ps(_mm256_and_si256(ints(p), _mm256_set1_epi32(static_cast<int>(0xffff0000))))};
  }
  float sum() const {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }
  float max() const {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
  }
};

inline Vector operator+(Vector a, Vector b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vector operator-(Vector a, Vector b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vector operator*(Vector a, Vector b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vector operator/(Vector a, Vector b) { return {_mm256_div_ps(a.v, b.v)}; }

constexpr int kSums = 12, kPanels = 1;  // with 2 weights and 1 activation in 16 registers

}  // namespace
}  // namespace vtp_cpu

#include "kernels_impl.h"

namespace vtp_cpu {
const Kernels kAvx2Float32 = make_kernels<Float32Dot, Float32Dot>("avx2");
const Kernels kAvx2BFloat16 = make_kernels<WideningDot, Float32Dot>("avx2");
}  // namespace vtp_cpu
