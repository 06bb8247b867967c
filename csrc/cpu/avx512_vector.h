// Sixteen floats in an AVX-512 register; for each file of an instruction set that has it, with a copy of its own.

#pragma once

#include <immintrin.h>
#include <stdint.h>

#include "bfloat16.h"

namespace vtp_cpu {
namespace {

struct Vector {
  static constexpr int kWidth = 16;
  __m512 v;

  static Vector load(const float* p) { return {_mm512_loadu_ps(p)}; }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  static Vector broadcast(float x) { return {_mm512_set1_ps(x)}; }
  static Vector fma(Vector a, Vector b, Vector c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  // Of a NaN and a number the second argument comes out.
  static Vector max(Vector a, Vector b) { return {_mm512_max_ps(a.v, b.v)}; }
  static Vector min(Vector a, Vector b) { return {_mm512_min_ps(a.v, b.v)}; }
  static Vector abs(Vector a) { return {_mm512_abs_ps(a.v)}; }
  // 2^n, where x is n + 127 + 1.5 * 2^23: the exponent is in its lowest bits.
  static Vector power_of_two(Vector x) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(x.v), 23))};
  }
  static Vector load_low_halves(const char* p) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16))};
  }
  static Vector load_high_halves(const char* p) {
    const __m512i mask = _mm512_set1_epi32(static_cast<int>(0xffff0000));
    return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p), mask))};
  }
  float sum() const { return _mm512_reduce_add_ps(v); }
  float max() const { return _mm512_reduce_max_ps(v); }
};

inline Vector operator+(Vector a, Vector b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vector operator-(Vector a, Vector b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vector operator*(Vector a, Vector b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vector operator/(Vector a, Vector b) { return {_mm512_div_ps(a.v, b.v)}; }

constexpr int kSums = 24, kPanels = 2;  // with 2 weights and 1 activation in 32 registers

}  // namespace
}  // namespace vtp_cpu
