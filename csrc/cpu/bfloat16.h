#pragma once

#include <stdint.h>

namespace vtp_cpu {
struct BFloat16 {  // storage only: the upper half of a float32
  uint16_t bits;
};
}  // namespace vtp_cpu
