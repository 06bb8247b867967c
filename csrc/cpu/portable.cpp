// The kernels in portable C++ (GCC and Clang vector types): the reference, and what runs where nothing better
// does.

#include <stdint.h>
#include <string.h>

#include "bfloat16.h"
#include "kernels.h"

namespace vtp_cpu {
namespace {

typedef float Four __attribute__((vector_size(16)));
typedef int32_t FourInts __attribute__((vector_size(16)));

struct Vector {
  static constexpr int kWidth = 4;
  Four v;

  static Vector load(const float* p) {
    Vector out;
    memcpy(&out.v, p, 16);
    return out;
  }
  void store(float* p) const { memcpy(p, &v, 16); }
  static Vector broadcast(float x) { return {Four{x, x, x, x}}; }
  static Vector fma(Vector a, Vector b, Vector c) { return {a.v * b.v + c.v}; }
  // Of a NaN and a number the second argument comes out, as x86 does.
  static Vector max(Vector a, Vector b) { return {a.v > b.v ? a.v : b.v}; }
  static Vector min(Vector a, Vector b) { return {a.v < b.v ? a.v : b.v}; }
  static Vector abs(Vector a) { return {(Four)((FourInts)a.v & 0x7fffffff)}; }
  // 2^n, where x is n + 127 + 1.5 * 2^23: the exponent is in its lowest bits.
  static Vector power_of_two(Vector x) { return {(Four)((FourInts)x.v << 23)}; }
  static Vector load_low_halves(const char* p) { return {(Four)(ints(p) << 16)}; }
  static Vector load_high_halves(const char* p) { return {(Four)(ints(p) & (int32_t)0xffff0000)}; }
  static FourInts ints(const char* p) {
    FourInts out;
    memcpy(&out, p, 16);
    return out;
  }
  float sum() const { return (v[0] + v[2]) + (v[1] + v[3]); }
  float max() const {
    const float a = v[0] > v[1] ? v[0] : v[1], b = v[2] > v[3] ? v[2] : v[3];
    return a > b ? a : b;
  }
};

inline Vector operator+(Vector a, Vector b) { return {a.v + b.v}; }
inline Vector operator-(Vector a, Vector b) { return {a.v - b.v}; }
inline Vector operator*(Vector a, Vector b) { return {a.v * b.v}; }
inline Vector operator/(Vector a, Vector b) { return {a.v / b.v}; }

constexpr int kSums = 8, kPanels = 1;  // with 4 weights and 1 activation in 16 registers

}  // namespace
}  // namespace vtp_cpu

#include "kernels_impl.h"

namespace vtp_cpu {
const Kernels kPortableFloat32 = make_kernels<Float32Dot, Float32Dot>("portable");
const Kernels kPortableBFloat16 = make_kernels<WideningDot, Float32Dot>("portable");
}  // namespace vtp_cpu
