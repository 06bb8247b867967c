// The kernels for AVX-512 (F, BW, DQ, VL: Intel Skylake-X, AMD Zen 4 and later).

#include "avx512_vector.h"
#include "kernels_impl.h"

namespace vtp_cpu {
const Kernels kAvx512Float32 = make_kernels<Float32Dot, Float32Dot>("avx512");
const Kernels kAvx512BFloat16 = make_kernels<WideningDot, Float32Dot>("avx512");
}  // namespace vtp_cpu
