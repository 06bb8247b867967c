// What the CPU engine asks of an instruction set, and how it finds the best one of this machine.
//
// The engine (engine.cpp) decides who computes what; the kernels compute one piece each, on one thread.
// kernels_impl.h has their one source; portable.cpp, avx2.cpp, avx512.cpp, avx512_bf16.cpp and amx_bf16.cpp
// compile it for an instruction set each. A new one (NEON) is one more such file and a row in
// instruction_sets.cpp.

#pragma once

#include <cstdint>

namespace vtp_cpu {

// Columns of a panel of packed weights, the same for every instruction set, so that a packed model can be
// copied to another machine.
//   float32:  [ceil(N / 16)] panels of [K][16]
//   bfloat16: [ceil(N / 16)] panels of [ceil(K / 32) * 16][16][2]: two inputs side by side, as bf16 dot
//             products read them; sixteen such rows are one tile of AMX
// Columns beyond N and inputs beyond K are zeros.
constexpr int64_t kPanel = 16;
constexpr int64_t kTileInputs = 32;  // of a panel in bfloat16 there is a whole multiple

enum class Dtype : int64_t { kFloat32 = 0, kBFloat16 = 1 };

// `static`: each instruction set has copies of its own, see kernels_impl.h.
static inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

// Bytes of one panel of weights with `inputs` inputs.
static inline int64_t panel_bytes(Dtype dtype, int64_t inputs) {
  return dtype == Dtype::kFloat32 ? inputs * kPanel * 4 : round_up(inputs, kTileInputs) * kPanel * 2;
}

// What is made of A W^T + bias. kSwiGlu makes one column of two: panels of what SiLU is applied to and panels
// of what that is multiplied with take turns, so a whole panel comes of each pair.
enum class Nonlinearity : int64_t { kNone, kGelu, kSwiGlu };

// A tile of C = act(A W^T + bias) + residual. Rows of C have room for whole panels; what lies there beyond
// `columns` is undefined, but where activations are bfloat16: there it is computed from the weight's zeros, and
// so finite. Rows of A have, up to a multiple of `Kernels::input_step`, any finite numbers behind the inputs.
struct LinearTile {
  const void* a;          // activations of the first row
  int64_t a_stride;       // elements between rows
  const void* weight;     // the first panel
  const float* bias;      // of the first panel's columns, or null
  int64_t inputs;         // K
  int64_t rows, columns;  // of A W^T; it starts with a whole panel, and is pairs of them for kSwiGlu
  Nonlinearity nonlinearity;
  const float* residual;  // of the first element, or null, as for kSwiGlu; may be what is written
  int64_t residual_stride;
  void* out;  // first element: float32 with `out_float`, else activations
  bool out_float;
  int64_t out_stride;
  int64_t padding;  // columns behind the panels that are written as zeros, where activations are written
  float* scratch;   // rows rounded up to `Kernels::row_step`, times columns rounded up to panels
};

// Rows [first, last) of `(x - mean) / sqrt(var + eps)` at the columns `index`.
struct NormRows {
  const void* x;  // float32, or with `of_activations` such
  int64_t x_stride;
  int64_t width;         // over which the statistics are
  const int32_t* index;  // [kept] or null: all columns
  int64_t kept;
  float eps;
  void* out;           // activations
  int64_t out_stride;  // columns from `kept` up to `padded` are written as zeros
  int64_t padded;
  bool of_activations;
  float* scratch;  // with `of_activations` [width]
};

// Rows [first_row, last_row) of one head's softmax(scale q k^T) v.
struct AttentionRows {
  const void *q, *k, *v;  // activations of token 0
  int64_t stride;         // elements between tokens
  int64_t tokens, key_width, value_width;  // key_width: of the query too
  float scale;
  int64_t first_row, last_row;
  void* out;  // activations of token 0
  int64_t out_stride;
  int64_t padding;  // columns behind the head's that are written as zeros
  float* scratch;   // attention_scratch(tokens, key_width, value_width) floats
  // LayerNorm of queries and keys (qk_norm) or null: weight and bias [key_width] each
  const float *q_weight, *q_bias, *k_weight, *k_bias;
  float eps;
  // Rotary embedding or null: for each token the cosines [key_width / 2] of its angles, then their sines. A
  // query or key x becomes, behind its norm, x[i] c[i] - x[i + key_width / 2] s[i] and x[i + key_width / 2]
  // c[i] + x[i] s[i].
  const float* rotary;
};

// Pixels of one row of patches, in the order of a convolution's weight: [channels][patch height][patch
// width].
struct PatchRow {
  const void* image;  // [channels][height][width] of the image, at the first pixel of the row of patches
  bool bfloat16;      // else float32
  int64_t channels, height, width, patch_height, patch_width;
  void* out;  // activations [width / patch_width][out_stride]
  int64_t out_stride, padded;
};

// Rows of `weight * gate`, rounded once to what `out` has. No padding anywhere: rows are `columns` apart.
struct FoldRows {
  const float *weight, *gate;
  int64_t rows, columns;
  void* out;
  bool out_bfloat16;
};

// Rows of G = dY^T X: what they add to `sum_n G[n, k] W[n, k]`, the gate's gradient, and `G diag(gate)`, the
// weight's. In one pass, where tensor operators need three.
struct UnfoldRows {
  const void* product;
  bool product_bfloat16;
  const float *weight, *gate;
  int64_t rows, columns;
  float* sums;  // [columns], added to
  float* out;   // or null; may be `product`
};

struct Kernels {
  const char* name;
  int64_t activation_bytes;  // 4: float32; 2: bfloat16
  int64_t row_step;          // rows of a tile are best multiples of it
  int64_t input_step;        // activations that `linear` reads are finite up to a multiple of it
  void (*begin)();           // by each thread, before the first kernel that it runs
  void (*end)();             // and after the last
  void (*linear)(const LinearTile&);
  void (*norm)(const NormRows&, int64_t first, int64_t last);
  void (*attention)(const AttentionRows&);
  void (*patches)(const PatchRow&);
  int64_t (*attention_scratch)(int64_t tokens, int64_t key_width, int64_t value_width);
  void (*fold)(const FoldRows&);
  void (*unfold)(const UnfoldRows&);
};

// One of each file; those of x86 exist on x86 alone.
extern const Kernels kPortableFloat32, kPortableBFloat16, kAvx2Float32, kAvx2BFloat16, kAvx512Float32,
    kAvx512BFloat16, kAvx512Bf16BFloat16, kAmxBf16BFloat16;

// The kernels for weights of `dtype` on this machine: in float32 of the best instruction set that it has, in
// bfloat16 the fastest of those that are as good in float32, by a trial the first time; or those of the set that
// the environment variable VTP_CPU_ISA names. Throws std::runtime_error if it names none that runs here.
const Kernels& kernels(Dtype dtype);

// Why those, in words; empty where there was nothing to choose.
const char* kernels_reason(Dtype dtype);

}  // namespace vtp_cpu
