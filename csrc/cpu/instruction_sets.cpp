// Which kernels this machine runs.

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "amx_support.h"
#include "kernels.h"
#include "trial.h"

namespace vtp_cpu {
namespace {

// From the plainest up. A set is used only if the processor has all of it and the operating system saves its
// registers: __builtin_cpu_supports asks CPUID and XGETBV for both.
struct InstructionSet {
  const Kernels *float32, *bfloat16;
  bool (*runs_here)();
};

#if defined(__x86_64__)
const std::string& amx_reason() {
  static const std::string reason = amx_unsupported_reason(this_machine());
  return reason;
}
#endif

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
#if !defined(VTP_WITHOUT_AMX)
    {&kAvx512Float32, &kAmxBf16BFloat16, [] { return amx_reason().empty(); }},
#endif
#endif
};

std::string name_of(const InstructionSet& set) { return set.bfloat16->name; }

std::vector<InstructionSet> sets_here() {
  std::vector<InstructionSet> out;
  for (const InstructionSet& set : kInstructionSets) {
    if (!set.runs_here()) break;  // each needs the ones before it
    out.push_back(set);
  }
  return out;
}

// Why a processor's AMX is not used, or nothing where it has none.
std::string amx_note(const std::string& before) {
#if defined(VTP_WITHOUT_AMX)
  return has_amx(this_machine()) ? before + "amx_bf16: the compiler of this build did not know it" : "";
#elif defined(__x86_64__)
  return has_amx(this_machine()) && !amx_reason().empty() ? before + "amx_bf16: " + amx_reason() : "";
#else
  (void)before;
  return "";
#endif
}

const InstructionSet& named(const std::vector<InstructionSet>& here, const std::string& wanted) {
  std::string names;
  for (const InstructionSet& set : here) {
    names += (names.empty() ? "" : ", ") + name_of(set);
    if (name_of(set) != wanted) continue;
    if (wanted == "amx_bf16" && !compute_the_same(*set.bfloat16, kPortableBFloat16))
      throw std::runtime_error("VTP_CPU_ISA: got \"amx_bf16\", which fails its self-test on this machine");
    return set;
  }
  throw std::runtime_error("VTP_CPU_ISA: got \"" + wanted + "\", expected one of " + names +
                           ", the instruction sets of this machine" + amx_note("; "));
}

Choice choose(Dtype dtype) {
  const std::vector<InstructionSet> here = sets_here();
  const char* wanted = std::getenv("VTP_CPU_ISA");
  if (wanted && *wanted) {
    const InstructionSet& set = named(here, wanted);
    return {dtype == Dtype::kFloat32 ? set.float32 : set.bfloat16, "as VTP_CPU_ISA has it"};
  }
  const Kernels* float32 = here.back().float32;
  if (dtype == Dtype::kFloat32) return {float32, ""};
  // Of the sets that compute the same in float32: the plainest of them widens weights to it.
  std::vector<const Kernels*> candidates;
  for (const InstructionSet& set : here)
    if (set.float32 == float32) candidates.push_back(set.bfloat16);
  Choice out = candidates.size() == 1 ? Choice{candidates[0], ""} : fastest(candidates);
  out.why += amx_note(out.why.empty() ? "" : "; ");
  return out;
}

// Once each: weights in float32 do not wait for a trial of the others.
const Choice& choice(Dtype dtype) {
  if (dtype == Dtype::kFloat32) {
    static const Choice chosen = choose(Dtype::kFloat32);
    return chosen;
  }
  static const Choice chosen = choose(Dtype::kBFloat16);
  return chosen;
}

}  // namespace

const Kernels& kernels(Dtype dtype) { return *choice(dtype).kernels; }

const char* kernels_reason(Dtype dtype) { return choice(dtype).why.c_str(); }

}  // namespace vtp_cpu
