// The kernels for AVX-512 with dot products of bfloat16 (Intel Cooper Lake and Sapphire Rapids, AMD Zen 4 and
// later): activations are bfloat16 too, sums float32.

#include "bfloat16_activations.h"
#include "kernels_impl.h"

namespace vtp_cpu {
namespace {

struct BFloat16Dot {
  using Activation = BFloat16;
  static constexpr int64_t kStep = 2, kInputs = 2, kQueries = kQueryRows;

  template <int Vectors>
  static void rows(const BFloat16* a, int64_t a_stride, int64_t rows, const char* b, int64_t b_stride,
                   int64_t inputs, float* c, int64_t c_stride, bool add, Upcoming& upcoming) {
    multiply_rows<BFloat16Dot, Vectors>(a, a_stride, rows, b, b_stride, inputs, c, c_stride, add, upcoming);
  }

  static inline __m512bh pairs(const void* p) {
    __m512bh out;
    __builtin_memcpy(&out, p, 64);
    return out;
  }
  static inline __m512bh broadcast_pair(const BFloat16* p) {
    int32_t bits;
    __builtin_memcpy(&bits, p, 4);
    return (__m512bh)_mm512_set1_epi32(bits);
  }

  template <int Rows, int Vectors>
  static inline void run(const BFloat16* a, int64_t a_stride, const char* b, int64_t b_stride, int64_t inputs,
                         Vector (&sum)[Rows][Vectors]) {
    // Rows of activations are padded, and an odd last input meets a weight of zero.
    for (int64_t k = 0; k < inputs; k += 2) {
      __m512bh w[Vectors];
#pragma GCC unroll 16
      for (int j = 0; j < Vectors; ++j) w[j] = pairs(b + j * b_stride + k * kPanel / 2 * 4);
#pragma GCC unroll 16
      for (int i = 0; i < Rows; ++i) {
        const __m512bh x = broadcast_pair(a + i * a_stride + k);
#pragma GCC unroll 16
        for (int j = 0; j < Vectors; ++j) sum[i][j].v = _mm512_dpbf16_ps(sum[i][j].v, x, w[j]);
      }
    }
  }
};

}  // namespace

const Kernels kAvx512Bf16BFloat16 = make_kernels<BFloat16Dot, BFloat16Dot>("avx512_bf16");
}  // namespace vtp_cpu
