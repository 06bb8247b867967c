// What kernels whose activations are bfloat16 have beside a Vector of AVX-512; for avx512_bf16.cpp and
// amx_bf16.cpp, each with a copy of its own.

#pragma once

#include "avx512_vector.h"

namespace vtp_cpu {
namespace {

inline void store_as(BFloat16* out, Vector x) {
  const __m256bh halves = _mm512_cvtneps_pbh(x.v);
  __builtin_memcpy(out, &halves, 32);
}

}  // namespace
}  // namespace vtp_cpu
