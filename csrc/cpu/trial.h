// Which of several kernels for the same weights are right and fastest on this machine: what a newer instruction
// set is worth is not known from its name. Dot products of bfloat16 are twice as fast as float32 on AMD Zen 4,
// and slower than float32 on Intel Sapphire Rapids.

#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace vtp_cpu {

struct Choice {
  const Kernels* kernels;
  std::string why;  // in words, or empty where there was nothing to choose
};

// Whether kernels for bfloat16 weights compute what others do, the same bits each time. A few milliseconds of
// plain C++ at most.
bool compute_the_same(const Kernels& kernels, const Kernels& as);

// Of kernels for bfloat16 weights, the plainest first, the fastest of those that compute what the plainest do.
// Takes a few milliseconds. A newer set is left only for one that is clearly faster, so that the choice is the
// same each time.
Choice fastest(const std::vector<const Kernels*>& candidates);

}  // namespace vtp_cpu
