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

// Whether all of a product of cases is run, or a part of it in which every pair of values occurs; of a sweep over
// one size, each size occurs with some of the cases.
extern bool everything;

// Whether that part has the case whose values have indices of this sum: one case of so many has.
inline bool has_its_turn(int64_t sum_of_indices, int64_t of) {
  return everything || sum_of_indices % of == 0;
}

void check_kernels(const Kernels& kernels, Dtype dtype);

void check_tiles();  // where AVX-512 and AMX are emulated

void check_choice();

void check_models();
void check_batches();
void check_threads();
void check_blocks();
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
