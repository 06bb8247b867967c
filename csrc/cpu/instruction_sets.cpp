// Which kernels this machine runs.

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace vtp_cpu {
namespace {

// From the plainest up. A set is used only if the processor has all of it and the operating system saves its
// registers: __builtin_cpu_supports asks CPUID and XGETBV for both.
struct InstructionSet {
  const Kernels *float32, *bfloat16;
  bool (*runs_here)();
};

const InstructionSet kInstructionSets[] = {
    {&kPortableFloat32, &kPortableBFloat16, [] { return true; }},
#if defined(__x86_64__)
    {&kAvx2Float32, &kAvx2BFloat16,
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
    {&kAvx512Float32, &kAvx512BFloat16,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
     }},
    {&kAvx512Float32, &kAvx512Bf16BFloat16,
     [] { return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vl"); }},
#endif
};

const InstructionSet* choose() {
  const char* wanted = std::getenv("VTP_CPU_ISA");
  const InstructionSet* best = nullptr;
  std::string here;
  for (const InstructionSet& set : kInstructionSets) {
    if (!set.runs_here()) break;  // each needs the ones before it
    best = &set;
    here += (here.empty() ? "" : ", ") + std::string(set.bfloat16->name);
    if (wanted && wanted == std::string(set.bfloat16->name)) return best;
  }
  if (wanted && *wanted)
    throw std::runtime_error("VTP_CPU_ISA: got \"" + std::string(wanted) + "\", expected one of " + here +
                             ", the instruction sets of this machine");
  return best;
}

}  // namespace

const Kernels& kernels(Dtype dtype) {
  static const InstructionSet* chosen = choose();
  return dtype == Dtype::kFloat32 ? *chosen->float32 : *chosen->bfloat16;
}

}  // namespace vtp_cpu
