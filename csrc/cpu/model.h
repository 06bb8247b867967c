// A packed model: one block of bytes with all weights, and a list of integers that says what lies where.
// vtp/runtime/cpu.py writes both; the numbers below are the contract between the two.

#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"

namespace vtp_cpu {

struct Linear {
  int64_t inputs, outputs;
  const void* weight;  // panels
  const float* bias;   // [panels * kPanel], zeros beyond `outputs`
  int64_t panels() const { return divide_up(outputs, kPanel); }
};

struct Norm {
  int64_t kept;          // 0: there is none
  const int32_t* index;  // or null
  int64_t width;         // over which the statistics are
};

struct Attention {
  Norm norm;
  Linear qkv, proj;
  // Of each head: its query and its key, as wide as one another, and its values.
  std::vector<int64_t> key_widths, value_widths;
  int64_t total_keys, total_width;  // their sums
  std::vector<int64_t> tables;      // of each head: of the rotary embedding, -1 without
  const float* head_norms;          // [4][head_dim]: weight and bias for q, then for k; or null
  Norm inner;                       // before proj, over the values of all heads
};

struct Mlp {
  Norm norm;
  // SwiGLU, else GELU. With it fc1 has panels in turn of what SiLU is applied to and of what that is
  // multiplied with, either half filled up to whole panels with zeros.
  bool swiglu;
  Linear fc1, fc2;
  Norm inner;  // before fc2, over all hidden units

  // What the nonlinearity puts out.
  int64_t hidden() const { return inner.kept ? inner.width : fc2.inputs; }
};

struct Block {
  bool has_attention, has_mlp;
  Attention attention;
  Mlp mlp;
  const float* offset;  // [embed_dim], added to the input, or null
};

struct Model {
  Dtype dtype;
  int64_t embed_dim, head_dim;  // head_dim: of the dense model, over which norms of heads are
  float eps, scale;
  std::vector<Block> blocks;
  int64_t tables;  // of rotary embeddings that calls have to bring: one more than the largest index of a head

  // From images: patches, and a table [tokens][embed_dim rounded to panels] that is added to them, whose
  // first `prefix` rows are the tokens that are no patches. Else the input is tokens.
  bool from_images;
  int64_t channels, height, width, patch_height, patch_width, tokens, prefix;
  Linear patches;
  const float* positions;

  // To logits: the normalized tokens 0 .. pooled - 1 side by side into one linear layer. Else tokens come
  // out.
  bool to_logits;
  int64_t pooled;
  Linear head;

  // Throws std::runtime_error if the list is not one of a packed model of `size` bytes. Memory that `this`
  // holds from an earlier model is used again.
  void read(const int64_t* layout, int64_t length, const char* bytes, int64_t size);

  int64_t widest_input() const;   // of the linear layers that read normalized rows, attention or patches
  int64_t widest_hidden() const;  // of what qkv puts out, and what the nonlinearity of a branch
};

}  // namespace vtp_cpu
