// Runs a packed model on some images or tokens: cuts the work into stages and tasks for several threads.

#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "kernels.h"
#include "model.h"

namespace vtp_cpu {

// Calls `body(context)` on up to `threads` threads at once, at least on one, and returns when all are done.
using Parallel = void (*)(int64_t threads, void (*body)(void*), void* context);

// Pixels [images][channels][height][width] or tokens [images][tokens][embed_dim] in, logits [images][outputs]
// or tokens out, all contiguous.
struct Call {
  const void* input;
  bool input_bfloat16;
  int64_t images, tokens;
  void* output;
  bool output_bfloat16;
  const float* rotary;  // [model.tables][tokens][head_dim], cosines then sines, or null where there are none
};

// The most that one task computes of a linear layer, at a time.
struct Blocks {
  int64_t rows;    // of A
  int64_t panels;  // of W: a multiple of 4
};

// What a core with so many bytes of second-level cache computes at once; see engine.cpp for the rule.
Blocks blocks_for(int64_t cache);

// Bytes of this machine's second-level cache, of a core; 1 MB where the system does not say.
int64_t second_level_cache();

struct Stage;

// Memory that calls use one after another, so that a steady stream of them allocates nothing.
class Workspace {
 public:
  Workspace();
  ~Workspace();
  Model model;

 private:
  friend class Engine;
  char* bytes(size_t size);

  char* memory_ = nullptr;
  size_t size_ = 0;
  std::vector<Stage> stages_;
  struct Counters;
  std::unique_ptr<Counters[]> counters_;
  size_t counters_size_ = 0;
};

// One linear layer alone: rows of activations [rows][inputs] to float32 [rows][panels * kPanel].
void run_linear(Workspace& workspace, Dtype dtype, const Linear& layer, const void* x, int64_t rows,
                float* out, int64_t threads, Parallel parallel);

// Computes `workspace.model`, which must have been read, on `call`. Results have the same bits for any number
// of threads and any `cache`.
void run(Workspace& workspace, const Call& call, int64_t threads, Parallel parallel,
         int64_t cache = second_level_cache());

}  // namespace vtp_cpu
