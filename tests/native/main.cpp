// The kernels and the engine against plain loops in double precision, without PyTorch: made to be built with
// sanitizers. All memory has exactly the size that the interface asks for.
//
//   engine_test kernels | tiles | choice | models | batches | threads | blocks | callers | steady | garbled | wrong | claims
//   engine_test kernels everything

#include "checks.h"

namespace test {

Set current;
bool everything = false;

namespace {

// What it was built with and this machine runs.
std::vector<Set> sets() {
  using namespace vtp_cpu;
  std::vector<Set> out = {{"portable", &kPortableFloat32, &kPortableBFloat16}};
#if defined(WITH_AVX2)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    out.push_back({"avx2", &kAvx2Float32, &kAvx2BFloat16});
#endif
#if defined(WITH_AVX512)  // emulated: it runs everywhere
  out.push_back({"avx512", &kAvx512Float32, &kAvx512BFloat16});
  out.push_back({"avx512_bf16", &kAvx512Float32, &kAvx512Bf16BFloat16});
  out.push_back({"amx_bf16", &kAvx512Float32, &kAmxBf16BFloat16});
#endif
  return out;
}

// Two sets may have their kernels for float32 in common.
void check_all_kernels() {
  static const Kernels* checked = nullptr;
  if (current.float32 != checked) check_kernels(*current.float32, Dtype::kFloat32);
  checked = current.float32;
  check_kernels(*current.bfloat16, Dtype::kBFloat16);
}

struct Group {
  const char* name;
  void (*check)();
  enum { kOne, kTwo, kAll } sets;  // one: it is about the engine, whatever its kernels; two: those and tiles
};
const Group kGroups[] = {
    {"kernels", check_all_kernels, Group::kAll},
    {"choice", check_choice, Group::kTwo},
    {"models", check_models, Group::kAll},
    {"batches", check_batches, Group::kAll},
    {"threads", check_threads, Group::kTwo},
    {"blocks", check_blocks, Group::kTwo},
    {"callers", check_callers, Group::kOne},
    {"steady", check_steady, Group::kOne},
    {"garbled", check_garbled, Group::kOne},
    {"wrong", check_wrong, Group::kOne},
    {"claims", check_claims, Group::kOne},
#if defined(WITH_AVX512)
    {"tiles", check_tiles, Group::kOne},
#endif
};

int run_group(const Group& group) {
  std::vector<Set> all = sets();
  // The last has tiles, which each thread configures.
  const Set fast = all[all.size() > 1 ? 1 : 0];
  if (group.sets == Group::kTwo && all.size() > 2) all = {fast, all.back()};
  if (group.sets == Group::kOne) all = {fast};
  for (const Set& set : all) {
    current = set;
    group.check();
    std::printf("%s: %s, %d failures so far\n", group.name, set.name, failures());
  }
  return failures() ? 1 : 0;
}

}  // namespace
}  // namespace test

// In place of csrc/cpu/instruction_sets.cpp.
namespace vtp_cpu {
const Kernels& kernels(Dtype dtype) {
  return dtype == Dtype::kFloat32 ? *test::current.float32 : *test::current.bfloat16;
}
}  // namespace vtp_cpu

int main(int count, char** arguments) {
  test::everything = count == 3 && arguments[2] == std::string("everything");
  for (const test::Group& group : test::kGroups)
    if (count == 2 + test::everything && arguments[1] == std::string(group.name))
      return test::run_group(group);
  std::printf("expected the name of one group of checks, and perhaps 'everything'\n");
  return 2;
}
