#pragma once

#include <stdint.h>
#include <string.h>

namespace vtp_cpu {

struct BFloat16 {  // storage only: the upper half of a float32
  uint16_t bits;
};

// `static`: each instruction set has copies of its own, see kernels_impl.h.
static inline float widen(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float out;
  memcpy(&out, &bits, 4);
  return out;
}

static inline BFloat16 narrow(float x) {  // to nearest, ties to even; a NaN stays a quiet one
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if (x != x) return BFloat16{static_cast<uint16_t>((bits >> 16) | 0x40)};
  return BFloat16{static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

}  // namespace vtp_cpu
