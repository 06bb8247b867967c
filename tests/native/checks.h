// What main.cpp runs, by name.

#pragma once

#include "reference.h"

namespace test {

// One instruction set's kernels for each dtype of weights.
struct Set {
  const char* name;
  const Kernels *float32, *bfloat16;
};
extern Set current;  // what the engine runs on

void check_kernels(const Kernels& kernels, Dtype dtype);

void check_tiles();  // where AVX-512 and AMX are emulated

void check_choice();

void check_models();
void check_batches();
void check_threads();
void check_callers();
void check_steady();
void check_garbled();
void check_wrong();
void check_claims();

inline std::string text(std::initializer_list<int64_t> numbers) {
  std::string out;
  for (int64_t n : numbers) out += (out.empty() ? "" : " x ") + std::to_string(n);
  return out;
}

}  // namespace test
