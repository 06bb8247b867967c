// The one source of the kernels. A file of an instruction set defines, in an unnamed namespace,
//
// - Vector: `kWidth` floats, with load, store, broadcast, fma and so on;
// - kSums: sums that are held in registers, in tiles of kPanels panels of 16 columns, or of fewer columns;
// - store_as: of a vector as bfloat16, if activations are bfloat16;
//
// and includes this file. Nothing here may be shared between instruction sets (no inline function of a
// library): the linker would keep one copy, perhaps one that this machine cannot run.

#pragma once

#include <stdint.h>
#include <string.h>

#include "bfloat16.h"
#include "kernels.h"

namespace vtp_cpu {
namespace {

constexpr int kVectors = kPanel / Vector::kWidth;    // of a panel
constexpr int kRows = kSums / (kPanels * kVectors);  // of a full tile

// Inputs between two visits to a tile of results: a panel of them (16 KB) stays in the first-level cache.
constexpr int64_t kInputChunk = 256;

constexpr int64_t kCacheLine = 64;

// ----------------------------------------------------------------------------------------------- elements

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) { return widen(x); }

template <class T>
inline T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline BFloat16 from_float<BFloat16>(float x) {
  return narrow(x);
}

// ----------------------------------------------------------------------------------------------- functions

// 2^t for t < 127.5, to 1.6e-7 relative, infinite from there to 128; 2^-126 below -126, NaN for NaN. Degree
// 5, fitted to |r| <= 1 / 2.
inline Vector exp2(Vector t) {
  t = Vector::max(Vector::broadcast(-126.0f), t);
  // 1.5 * 2^23, adding which rounds to an integer, and the bias of an exponent.
  const Vector magic = Vector::broadcast(12582912.0f + 127.0f);
  const Vector shifted = t + magic;
  const Vector r = t - (shifted - magic);
  Vector p = Vector::broadcast(1.326957950e-03f);
  p = Vector::fma(p, r, Vector::broadcast(9.671293199e-03f));
  p = Vector::fma(p, r, Vector::broadcast(5.550710857e-02f));
  p = Vector::fma(p, r, Vector::broadcast(2.402224690e-01f));
  p = Vector::fma(p, r, Vector::broadcast(6.931470037e-01f));
  p = Vector::fma(p, r, Vector::broadcast(1.0f));
  return p * Vector::power_of_two(shifted);
}

// x Phi(x), exact GELU, as max(x, 0) - a Phi(-a) for a = |x|. Phi(a) - 1 / 2 is odd: a P(a^2) / Q(a^2),
// fitted on [0, 5.5] to 1e-8. All x below -5.36 get what rounding leaves there: -7e-8, in truth -2e-7.
inline Vector gelu(Vector x) {
  const Vector a = Vector::min(Vector::abs(x), Vector::broadcast(5.36f)), s = a * a;
  Vector p = Vector::broadcast(2.274933131e-08f), q = Vector::broadcast(1.197503821e-06f);
  p = Vector::fma(p, s, Vector::broadcast(6.352132459e-06f));
  p = Vector::fma(p, s, Vector::broadcast(1.688271586e-04f));
  p = Vector::fma(p, s, Vector::broadcast(4.677269608e-03f));
  p = Vector::fma(p, s, Vector::broadcast(3.385278583e-02f));
  p = Vector::fma(p, s, Vector::broadcast(3.989422321e-01f));
  q = Vector::fma(q, s, Vector::broadcast(7.364800695e-05f));
  q = Vector::fma(q, s, Vector::broadcast(1.884453115e-03f));
  q = Vector::fma(q, s, Vector::broadcast(2.864595130e-02f));
  q = Vector::fma(q, s, Vector::broadcast(2.515222728e-01f));
  q = Vector::fma(q, s, Vector::broadcast(1.0f));
  const Vector below = Vector::fma(a, p, q * Vector::broadcast(-0.5f)) / q;  // -Phi(-a)
  return Vector::fma(a, below, Vector::max(Vector::broadcast(0.0f), x));
}

// x / (1 + e^-x). Below -88, where that is less than 4e-37 away from 0, the power is infinite.
inline Vector silu(Vector x) {
  const Vector t = Vector::min(Vector::broadcast(128.0f), x * Vector::broadcast(-1.44269504f));
  return x / (Vector::broadcast(1.0f) + exp2(t));
}

// ------------------------------------------------------------------------------------------------ products

// Our own micro-kernels and not oneDNN's: GFLOP/s of x [1576, K] by a packed weight [N, K] in float32, 2
// threads of an AMD EPYC (Zen 3), medians of 12 rounds (bench/compare.py --cases gemm, 2026-11-23):
//
//   K x N            115x461   231x1003   461x1843   1843x768
//   ours                  63        104        163        161
//   oneDNN, packed        63         95        156        141
//   PyTorch (MKL)         36         80         89        154
//
// At 197 rows such single calls measure the waking of threads more than the product.

// C [Rows, Vectors * kWidth] (+)= A [Rows, inputs] B, with C in registers meanwhile.
template <class Dot, int Rows, int Vectors>
inline void multiply_tile(const typename Dot::Activation* a, int64_t a_stride, const char* b,
                          int64_t b_stride, int64_t inputs, float* c, int64_t c_stride, bool add) {
  Vector sum[Rows][Vectors];
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 16
    for (int j = 0; j < Vectors; ++j) sum[i][j] = Vector::broadcast(0.0f);
  Dot::template run<Rows, Vectors>(a, a_stride, b, b_stride, inputs, sum);
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 16
    for (int j = 0; j < Vectors; ++j) {
      float* to = c + i * c_stride + j * Vector::kWidth;
      // What is there is added last, not first: rounding errors then grow with a chunk's inputs, not with
      // all.
      (add ? Vector::load(to) + sum[i][j] : sum[i][j]).store(to);
    }
}

// Weights that are wanted next: brought from memory piece by piece while tiles are computed. A new panel
// would otherwise stall the first tile that reads it.
struct Upcoming {
  const char* at;  // of the first of kPanels panels
  int64_t panel_stride, bytes, step;

  Upcoming(const char* next, int64_t stride, int64_t size, int64_t tiles)
      : at(next),
        panel_stride(stride),
        bytes(next ? size : 0),
        step(round_up(divide_up(size, tiles), kCacheLine)) {}
  inline void fetch() {
    for (int64_t i = 0; i < step && bytes > 0; i += kCacheLine, at += kCacheLine, bytes -= kCacheLine)
      for (int j = 0; j < kPanels; ++j) __builtin_prefetch(at + j * panel_stride, 0, 2);
  }
};

// All rows against `Vectors` columns of vectors: tiles of as many rows as registers hold, and what is left in
// one smaller tile.
template <class Dot, int Vectors, int Rows = kSums / Vectors>
inline void multiply_rows(const typename Dot::Activation* a, int64_t a_stride, int64_t rows, const char* b,
                          int64_t b_stride, int64_t inputs, float* c, int64_t c_stride, bool add,
                          Upcoming& upcoming) {
  if constexpr (Rows > 0) {
    for (; rows >= Rows; rows -= Rows, a += Rows * a_stride, c += Rows * c_stride) {
      multiply_tile<Dot, Rows, Vectors>(a, a_stride, b, b_stride, inputs, c, c_stride, add);
      upcoming.fetch();
    }
    if (rows)
      multiply_rows<Dot, Vectors, Rows - 1>(a, a_stride, rows, b, b_stride, inputs, c, c_stride, add,
                                            upcoming);
  }
}

constexpr int kFull = kPanels * kVectors;             // vectors of a full tile
constexpr int kMostVectors = kFull == 2 ? 3 : kFull;  // of any tile

// All rows against `vectors` vectors of columns, at most `Most`.
template <class Dot, int Most>
inline void some_vectors(int64_t vectors, const typename Dot::Activation* a, int64_t a_stride, int64_t rows,
                         const char* b, int64_t b_stride, int64_t inputs, float* c, int64_t c_stride,
                         bool add, Upcoming& upcoming) {
  if constexpr (Most > 1) {
    if (vectors < Most)
      return some_vectors<Dot, Most - 1>(vectors, a, a_stride, rows, b, b_stride, inputs, c, c_stride, add,
                                         upcoming);
  }
  Dot::template rows<Most>(a, a_stride, rows, b, b_stride, inputs, c, c_stride, add, upcoming);
}

// C [rows, columns rounded up to vectors] = A B. B is in panels, `b_stride` bytes apart, of
// [inputs / Dot::kStep][16] units of 4 bytes. Chunks of inputs outside, panels inside: A's chunk stays in the
// second-level cache, the panel's in the first. Of a last panel only the vectors that are needed are
// computed.
template <class Dot>
void multiply(const typename Dot::Activation* a, int64_t a_stride, int64_t rows, const char* b,
              int64_t b_stride, int64_t columns, int64_t inputs, float* c, int64_t c_stride) {
  const int64_t chunks = divide_up(inputs, kInputChunk);
  const int64_t chunk = round_up(divide_up(inputs, chunks), 2);
  for (int64_t k = 0; k < inputs; k += chunk) {
    const int64_t size = inputs - k < chunk ? inputs - k : chunk;
    for (int64_t j = 0; j < columns;) {
      const char* from = b + j / kPanel * b_stride + k / Dot::kStep * kPanel * 4;
      float* to = c + j;
      const int64_t left = divide_up(columns - j, Vector::kWidth);
      // The last three at once: fewer loads for a sum than of a tile of two and one of one.
      const bool three = kFull == 2 && left == 3;
      const int64_t vectors = three || left < kFull ? left : kFull;
      const char* next = vectors < left       ? from + kPanels * b_stride
                         : k + chunk < inputs ? b + (k + chunk) / Dot::kStep * kPanel * 4
                                              : nullptr;
      Upcoming upcoming(next, b_stride, size / Dot::kStep * kPanel * 4, divide_up(rows, kRows));
      some_vectors<Dot, kMostVectors>(vectors, a + k, a_stride, rows, from, b_stride, size, to, c_stride,
                                      k > 0, upcoming);
      j += vectors * Vector::kWidth;
    }
  }
}

inline void store_as(float* out, Vector x) { x.store(out); }

template <class Out>
void finish_tile(const LinearTile& t) {
  for (int64_t i = 0; i < t.rows; ++i) {
    const float* from = t.scratch + i * round_up(t.columns, kPanel);
    Out* to = static_cast<Out*>(t.out) + i * t.out_stride;
    for (int64_t j = 0; j < t.columns; j += Vector::kWidth) {
      Vector x = Vector::load(from + j);
      if (t.bias) x = x + Vector::load(t.bias + j);
      if (t.nonlinearity == Nonlinearity::kGelu) x = gelu(x);
      if (t.residual) x = x + Vector::load(t.residual + i * t.residual_stride + j);
      store_as(to + j, x);
    }
    for (int64_t j = 0; j < t.padding; ++j) to[round_up(t.columns, kPanel) + j] = from_float<Out>(0.0f);
  }
}

// Of each pair of panels one.
template <class Out>
void finish_swiglu_tile(const LinearTile& t) {
  for (int64_t i = 0; i < t.rows; ++i) {
    const float* from = t.scratch + i * t.columns;
    Out* to = static_cast<Out*>(t.out) + i * t.out_stride;
    for (int64_t panel = 0; panel < t.columns; panel += 2 * kPanel)
      for (int64_t j = panel; j < panel + kPanel; j += Vector::kWidth, to += Vector::kWidth) {
        Vector gate = Vector::load(from + j), x = Vector::load(from + j + kPanel);
        if (t.bias) {
          gate = gate + Vector::load(t.bias + j);
          x = x + Vector::load(t.bias + j + kPanel);
        }
        store_as(to, silu(gate) * x);
      }
    for (int64_t j = 0; j < t.padding; ++j) to[j] = from_float<Out>(0.0f);
  }
}

// What comes behind the product, which is in the scratch memory.
template <class Activation>
void finish(const LinearTile& t) {
  const bool swiglu = t.nonlinearity == Nonlinearity::kSwiGlu;
  if (t.out_float)
    (swiglu ? finish_swiglu_tile<float> : finish_tile<float>)(t);
  else
    (swiglu ? finish_swiglu_tile<Activation> : finish_tile<Activation>)(t);
}

template <class Dot>
void linear(const LinearTile& t) {
  using Activation = typename Dot::Activation;
  constexpr Dtype kWeights = Dot::kStep == 1 ? Dtype::kFloat32 : Dtype::kBFloat16;
  multiply<Dot>(static_cast<const Activation*>(t.a), t.a_stride, t.rows, static_cast<const char*>(t.weight),
                panel_bytes(kWeights, t.inputs), t.columns, t.inputs, t.scratch, round_up(t.columns, kPanel));
  finish<Activation>(t);
}

// ----------------------------------------------------------------------------------------------- LayerNorm

// The sum of f(x[j]) over j < width. Four sums at once, so that additions need not wait for one another.
template <class F>
inline float sum_of(const float* x, int64_t width, const F& f) {
  Vector total[4];
  for (Vector& t : total) t = Vector::broadcast(0.0f);
  int64_t j = 0;
  for (; j + 4 * Vector::kWidth <= width; j += 4 * Vector::kWidth)
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) total[i] = total[i] + f(Vector::load(x + j + i * Vector::kWidth));
  for (; j + Vector::kWidth <= width; j += Vector::kWidth) total[0] = total[0] + f(Vector::load(x + j));
  float rest[Vector::kWidth] = {};
  if (j < width) {  // the last few, each summed as those before it
    float last[Vector::kWidth] = {};
    for (int64_t i = 0; i < width - j; ++i) last[i] = x[j + i];
    f(Vector::load(last)).store(rest);
  }
  float sum = ((total[0] + total[1]) + (total[2] + total[3])).sum();
  for (int64_t i = 0; i < width - j; ++i) sum += rest[i];
  return sum;
}

// Mean and 1 / sqrt(var + eps) of x [width], in two passes.
inline void statistics(const float* x, int64_t width, float eps, float& mean, float& rstd) {
  mean = sum_of(x, width, [](Vector v) { return v; }) / static_cast<float>(width);
  const Vector center = Vector::broadcast(mean);
  const float squares = sum_of(x, width, [center](Vector v) { return (v - center) * (v - center); });
  rstd = 1.0f / __builtin_sqrtf(squares / static_cast<float>(width) + eps);
}

constexpr int64_t kGathered = 64;

// A row of activations in float32: itself, or a copy in `room`.
inline const float* widened(const float* x, int64_t, float*) { return x; }
inline const float* widened(const BFloat16* x, int64_t width, float* room) {
  for (int64_t j = 0; j < width; ++j) room[j] = widen(x[j]);
  return room;
}

template <class Activation>
void norm(const NormRows& t, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    const float* x =
        t.of_activations
            ? widened(static_cast<const Activation*>(t.x) + row * t.x_stride, t.width, t.scratch)
            : static_cast<const float*>(t.x) + row * t.x_stride;
    Activation* out = static_cast<Activation*>(t.out) + row * t.out_stride;
    float mean, rstd;
    statistics(x, t.width, t.eps, mean, rstd);
    const Vector center = Vector::broadcast(mean), scale = Vector::broadcast(rstd);
    int64_t j = 0;
    // Gathered one by one and a block at a time: gather instructions took three times as long (AMD Zen 3).
    for (float block[kGathered]; j + kGathered <= t.kept; j += kGathered) {
      if (t.index)
        for (int64_t i = 0; i < kGathered; ++i) block[i] = x[t.index[j + i]];
      const float* from = t.index ? block : x + j;
      for (int64_t i = 0; i < kGathered; i += Vector::kWidth)
        store_as(out + j + i, (Vector::load(from + i) - center) * scale);
    }
    for (; j < t.kept; ++j) out[j] = from_float<Activation>((x[t.index ? t.index[j] : j] - mean) * rstd);
    for (; j < t.padded; ++j) out[j] = from_float<Activation>(0.0f);
  }
}

// ----------------------------------------------------------------------------------------------- attention

// Rows of queries whose scores are in memory at once, where a product does not want another number of them.
constexpr int64_t kQueryRows = 24;  // 20 KB of scores at 197 tokens

struct AttentionLayout {  // of the scratch memory, in bytes
  int64_t keys, values, scores, results, queries, row, end;
};

// Activations between two queries, or keys, that were copied.
template <class Dot>
inline int64_t query_stride(int64_t key_width) {
  return round_up(key_width, Dot::kInputs > kPanel ? Dot::kInputs : kPanel);
}

template <class Dot>
inline AttentionLayout attention_layout(int64_t tokens, int64_t key_width, int64_t value_width) {
  const int64_t columns = round_up(tokens, kPanel), value_columns = round_up(value_width, kPanel);
  AttentionLayout at;
  at.keys = 0;
  at.values = at.keys + columns * round_up(key_width, Dot::kInputs) / Dot::kStep * 4;
  at.scores = at.values + value_columns * round_up(tokens, Dot::kInputs) / Dot::kStep * 4;
  at.results = at.scores + Dot::kQueries * columns * 4;
  at.queries = at.results + Dot::kQueries * value_columns * 4;
  at.row = at.queries + Dot::kQueries * query_stride<Dot>(key_width) * sizeof(typename Dot::Activation);
  at.end = at.row + round_up(key_width, kPanel) * 4;
  return at;
}

// Each pair (x[i], x[i + width / 2]), turned by the angle whose cosine and sine are in `angles`, in place.
inline void rotate(float* x, const float* angles, int64_t width) {
  const int64_t half = width / 2;
  float *first = x, *second = x + half;
  const float *cosines = angles, *sines = angles + half;
  int64_t i = 0;
  for (; i + Vector::kWidth <= half; i += Vector::kWidth) {
    const Vector a = Vector::load(first + i), b = Vector::load(second + i);
    const Vector c = Vector::load(cosines + i), s = Vector::load(sines + i);
    (a * c - b * s).store(first + i);
    (b * c + a * s).store(second + i);
  }
  for (; i < half; ++i) {
    const float a = first[i], b = second[i];
    first[i] = a * cosines[i] - b * sines[i];
    second[i] = b * cosines[i] + a * sines[i];
  }
}

// Queries and keys alike: LayerNorm, if there is one, and the rotation, if there is one.
struct HeadRows {
  int64_t width;
  const float *weight, *bias, *rotary;
  float eps;
  float* row;  // room for one

  bool change() const { return weight || rotary; }

  // Of one token, from `x` to `to`, rounded once.
  template <class Activation>
  void prepare(const Activation* x, int64_t token, Activation* to) const {
    for (int64_t j = 0; j < width; ++j) row[j] = to_float(x[j]);
    if (weight) {
      float mean, rstd;
      statistics(row, width, eps, mean, rstd);
      for (int64_t j = 0; j < width; ++j) row[j] = (row[j] - mean) * rstd * weight[j] + bias[j];
    }
    if (rotary) rotate(row, rotary + token * width, width);
    int64_t j = 0;
    for (; j + Vector::kWidth <= width; j += Vector::kWidth) store_as(to + j, Vector::load(row + j));
    for (; j < width; ++j) to[j] = from_float<Activation>(row[j]);
  }
};

typedef float FourUnits __attribute__((vector_size(16)));

// Those of the eight units of a and b at these places.
template <int i, int j, int k, int l>
inline FourUnits pick(FourUnits a, FourUnits b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, i, j, k, l);
#else
  typedef int32_t Places __attribute__((vector_size(16)));
  return __builtin_shuffle(a, b, Places{i, j, k, l});
#endif
}

// Four rows of four units of 4 bytes become four columns. Strides are in bytes.
inline void transpose_four(const void* from, int64_t from_stride, void* to, int64_t to_stride) {
  FourUnits x[4];
  for (int i = 0; i < 4; ++i) memcpy(&x[i], static_cast<const char*>(from) + i * from_stride, 16);
  const FourUnits a = pick<0, 4, 1, 5>(x[0], x[1]), b = pick<0, 4, 1, 5>(x[2], x[3]);
  const FourUnits c = pick<2, 6, 3, 7>(x[0], x[1]), d = pick<2, 6, 3, 7>(x[2], x[3]);
  const FourUnits columns[4] = {pick<0, 1, 4, 5>(a, b), pick<2, 3, 6, 7>(a, b), pick<0, 1, 4, 5>(c, d),
                                pick<2, 3, 6, 7>(c, d)};
  for (int i = 0; i < 4; ++i) memcpy(static_cast<char*>(to) + i * to_stride, &columns[i], 16);
}

// Keys as weights of a linear layer from d to N: panels of 16 columns, zeros behind the last.
template <class Dot>
inline void pack_keys(const AttentionRows& t, const HeadRows& rows, typename Dot::Activation* keys,
                      typename Dot::Activation* room) {
  using Activation = typename Dot::Activation;
  constexpr int64_t kStep = Dot::kStep;
  const int64_t N = t.tokens, d = t.key_width, units = round_up(d, Dot::kInputs) / kStep;
  const auto* k = static_cast<const Activation*>(t.k);
  const Activation zero = from_float<Activation>(0.0f);
  int64_t token = 0;
  // Four tokens at once; of each, the last few units one by one.
  for (; token + 4 <= N; token += 4) {
    const Activation* from = k + token * t.stride;
    int64_t stride = t.stride;
    if (rows.change()) {
      stride = query_stride<Dot>(d);
      for (int64_t i = 0; i < 4; ++i) rows.prepare(from + i * t.stride, token + i, room + i * stride);
      from = room;
    }
    Activation* to = keys + (token / kPanel * units * kPanel + token % kPanel) * kStep;
    int64_t j = 0;
    for (; j + 4 * kStep <= d; j += 4 * kStep)
      transpose_four(from + j, stride * sizeof(Activation), to + j * kPanel, kPanel * 4);
    for (; j < units * kStep; ++j)
      for (int64_t i = 0; i < 4; ++i)
        to[j / kStep * kPanel * kStep + i * kStep + j % kStep] = j < d ? from[i * stride + j] : zero;
  }
  for (; token < round_up(N, kPanel); ++token) {
    Activation* to = keys + (token / kPanel * units * kPanel + token % kPanel) * kStep;
    if (token >= N) {
      for (int64_t u = 0; u < units; ++u)
        for (int64_t s = 0; s < kStep; ++s) to[u * kPanel * kStep + s] = zero;
      continue;
    }
    const Activation* from = k + token * t.stride;
    if (rows.change()) {
      rows.prepare(from, token, room);
      from = room;
    }
    for (int64_t j = 0; j < units * kStep; ++j)
      to[j / kStep * kPanel * kStep + j % kStep] = j < d ? from[j] : zero;
  }
}

// Values as weights of a linear layer from N to w.
template <class Dot>
inline void pack_values(const AttentionRows& t, typename Dot::Activation* values) {
  using Activation = typename Dot::Activation;
  constexpr int64_t kStep = Dot::kStep;
  const int64_t N = t.tokens, w = t.value_width, inputs = round_up(N, Dot::kInputs);
  const auto* v = static_cast<const Activation*>(t.v);
  const Activation zero = from_float<Activation>(0.0f);
  for (int64_t p = 0; p < divide_up(w, kPanel); ++p) {
    const int64_t size = w - p * kPanel < kPanel ? w - p * kPanel : kPanel;
    for (int64_t token = 0; token < inputs; ++token) {
      Activation* to = values + p * inputs * kPanel + token / kStep * kPanel * kStep + token % kStep;
      const Activation* from = v + token * t.stride + p * kPanel;
      if (kStep == 1 && size == kPanel) {
        memcpy(to, from, kPanel * sizeof(Activation));
        continue;
      }
      const int64_t filled = token < N ? size : 0;
      for (int64_t j = 0; j < filled; ++j) to[j * kStep] = from[j];
      for (int64_t j = filled; j < kPanel; ++j) to[j * kStep] = zero;
    }
  }
}

// Scores [rows][stride] become e^(scale (score - the row's largest)), activations in the same place, and
// `sums` their sums.
template <class Dot>
inline void exponentials(float* scores, int64_t stride, int64_t rows, int64_t columns, float scale,
                         float* sums) {
  using Activation = typename Dot::Activation;
  const int64_t width = round_up(columns, Vector::kWidth);
  const Activation zero = from_float<Activation>(0.0f);
  const float scale2 = scale * 1.44269504f;  // by log2 e: e^x is 2^(x log2 e)
  float shifts[Dot::kQueries];
  // All rows' largest first: no row's exponentials then wait for the end of its own.
  for (int64_t i = 0; i < rows; ++i) {
    float* s = scores + i * stride;
    for (int64_t j = columns; j < width; ++j) s[j] = -__builtin_inff();
    Vector top = Vector::load(s);
    for (int64_t j = Vector::kWidth; j < width; j += Vector::kWidth)
      top = Vector::max(top, Vector::load(s + j));
    shifts[i] = -top.max() * scale2;
  }
  // A NaN among the scores may be lost above, but not here: its own weight, and with it the sum, is NaN.
  for (int64_t i = 0; i < rows; ++i) {
    const float* s = scores + i * stride;
    auto* to = reinterpret_cast<Activation*>(scores + i * stride);
    const Vector shift = Vector::broadcast(shifts[i]), factor = Vector::broadcast(scale2);
    Vector total = Vector::broadcast(0.0f);
    int64_t j = 0;
    for (; j < width; j += Vector::kWidth) {
      const Vector e = exp2(Vector::fma(Vector::load(s + j), factor, shift));
      store_as(to + j, e);
      total = total + e;
    }
    for (int64_t j = columns; j < round_up(columns, Dot::kInputs); ++j) to[j] = zero;
    sums[i] = total.sum();
  }
}

template <class Dot>
void attention(const AttentionRows& t) {
  using Activation = typename Dot::Activation;
  constexpr int64_t kUnit = kPanel * 4 / Dot::kStep;  // bytes of a panel for each of its inputs
  const int64_t N = t.tokens, d = t.key_width, w = t.value_width;
  const int64_t key_inputs = round_up(d, Dot::kInputs), value_inputs = round_up(N, Dot::kInputs);
  const AttentionLayout at = attention_layout<Dot>(N, d, w);
  char* memory = reinterpret_cast<char*>(t.scratch);
  auto* keys = reinterpret_cast<Activation*>(memory + at.keys);
  auto* values = reinterpret_cast<Activation*>(memory + at.values);
  auto* scores = reinterpret_cast<float*>(memory + at.scores);
  auto* results = reinterpret_cast<float*>(memory + at.results);
  auto* queries = reinterpret_cast<Activation*>(memory + at.queries);
  auto* row = reinterpret_cast<float*>(memory + at.row);
  const auto* q = static_cast<const Activation*>(t.q);
  auto* out = static_cast<Activation*>(t.out);
  const Activation zero = from_float<Activation>(0.0f);
  const HeadRows query_rows = {d, t.q_weight, t.q_bias, t.rotary, t.eps, row};
  const HeadRows key_rows = {d, t.k_weight, t.k_bias, t.rotary, t.eps, row};
  pack_keys<Dot>(t, key_rows, keys, queries);
  pack_values<Dot>(t, values);

  const int64_t columns = round_up(N, kPanel), value_columns = round_up(w, kPanel);
  for (int64_t first = t.first_row; first < t.last_row; first += Dot::kQueries) {
    const int64_t rows = t.last_row - first < Dot::kQueries ? t.last_row - first : Dot::kQueries;
    const Activation* a = q + first * t.stride;
    int64_t a_stride = t.stride;
    // A product in tiles reads far beyond the last key of a row, where another head's may be.
    if (query_rows.change() || Dot::kInputs > Dot::kStep) {
      a_stride = query_stride<Dot>(d);
      for (int64_t i = 0; i < rows; ++i) {
        const Activation* from = q + (first + i) * t.stride;
        Activation* to = queries + i * a_stride;
        if (query_rows.change())
          query_rows.prepare(from, first + i, to);
        else
          memcpy(to, from, d * sizeof(Activation));
        for (int64_t j = d; j < key_inputs; ++j) to[j] = zero;  // they meet a key's zeros
      }
      a = queries;
    }
    multiply<Dot>(a, a_stride, rows, reinterpret_cast<const char*>(keys), key_inputs * kUnit, N, d, scores,
                  columns);
    float sums[Dot::kQueries];
    exponentials<Dot>(scores, columns, rows, N, t.scale, sums);
    multiply<Dot>(reinterpret_cast<const Activation*>(scores), columns * 4 / sizeof(Activation), rows,
                  reinterpret_cast<const char*>(values), value_inputs * kUnit, w, N, results, value_columns);
    for (int64_t i = 0; i < rows; ++i) {
      const float* from = results + i * value_columns;
      Activation* to = out + (first + i) * t.out_stride;
      const float inverse = 1.0f / sums[i];
      const Vector factor = Vector::broadcast(inverse);
      int64_t j = 0;
      for (; j + Vector::kWidth <= w; j += Vector::kWidth) store_as(to + j, Vector::load(from + j) * factor);
      for (; j < w; ++j) to[j] = from_float<Activation>(from[j] * inverse);
      for (; j < w + t.padding; ++j) to[j] = zero;
    }
  }
}

template <class Dot>
int64_t attention_scratch(int64_t tokens, int64_t key_width, int64_t value_width) {
  return attention_layout<Dot>(tokens, key_width, value_width).end / 4;
}

// --------------------------------------------------------------------------------------- patch embedding

template <class Pixel, class Activation>
void copy_patches(const PatchRow& t) {
  const auto* image = static_cast<const Pixel*>(t.image);
  auto* out = static_cast<Activation*>(t.out);
  const int64_t patches = t.width / t.patch_width, size = t.channels * t.patch_height * t.patch_width;
  for (int64_t p = 0; p < patches; ++p) {
    Activation* to = out + p * t.out_stride;
    for (int64_t c = 0; c < t.channels; ++c)
      for (int64_t y = 0; y < t.patch_height; ++y) {
        const Pixel* from = image + (c * t.height + y) * t.width + p * t.patch_width;
        for (int64_t x = 0; x < t.patch_width; ++x) *to++ = from_float<Activation>(to_float(from[x]));
      }
    for (int64_t j = size; j < t.padded; ++j) *to++ = from_float<Activation>(0.0f);
  }
}

template <class Activation>
void patches(const PatchRow& t) {
  if (t.bfloat16)
    copy_patches<BFloat16, Activation>(t);
  else
    copy_patches<float, Activation>(t);
}

// ----------------------------------------------------------------------- gates in training: left to the
// compiler

template <class Out>
void fold_rows(const FoldRows& t) {
  const float* __restrict gate = t.gate;
  for (int64_t i = 0; i < t.rows; ++i) {
    const float* __restrict from = t.weight + i * t.columns;
    Out* __restrict to = static_cast<Out*>(t.out) + i * t.columns;
    for (int64_t k = 0; k < t.columns; ++k) to[k] = from_float<Out>(from[k] * gate[k]);
  }
}

void fold(const FoldRows& t) {
  if (t.out_bfloat16)
    fold_rows<BFloat16>(t);
  else
    fold_rows<float>(t);
}

template <class Product>
void unfold_rows(const UnfoldRows& t) {
  const float* __restrict gate = t.gate;
  float* __restrict sums = t.sums;
  for (int64_t i = 0; i < t.rows; ++i) {
    const Product* product = static_cast<const Product*>(t.product) + i * t.columns;
    const float* __restrict weight = t.weight + i * t.columns;
    float* out = t.out ? t.out + i * t.columns : nullptr;
    if (out)
#pragma GCC ivdep
      for (int64_t k = 0; k < t.columns; ++k) {
        const float g = to_float(product[k]);
        sums[k] += g * weight[k];
        out[k] = g * gate[k];
      }
    else
      for (int64_t k = 0; k < t.columns; ++k) sums[k] += to_float(product[k]) * weight[k];
  }
}

void unfold(const UnfoldRows& t) {
  if (t.product_bfloat16)
    unfold_rows<BFloat16>(t);
  else
    unfold_rows<float>(t);
}

inline void nothing() {}

// What an instruction set offers for one dtype of weights. `Inner` is how activations meet one another.
template <class Dot, class Inner>
constexpr Kernels make_kernels(const char* name) {
  using Activation = typename Dot::Activation;
  return {name,
          sizeof(Activation),
          kRows,
          Inner::kInputs,
          nothing,
          nothing,
          linear<Dot>,
          norm<Activation>,
          attention<Inner>,
          patches<Activation>,
          attention_scratch<Inner>,
          fold,
          unfold};
}

// ---------------------------------------------------------------------- dot products of float32 activations

// Of each: `kStep`, inputs side by side in a unit of 4 bytes of a panel; of those that activations meet one
// another by also `kInputs`, up to a multiple of which inputs are filled up with zeros, and `kQueries`, rows of
// queries whose scores are in memory at once.
struct Float32Dot {
  using Activation = float;
  static constexpr int64_t kStep = 1, kInputs = 1, kQueries = kQueryRows;

  template <int Vectors>
  static void rows(const float* a, int64_t a_stride, int64_t rows, const char* b, int64_t b_stride,
                   int64_t inputs, float* c, int64_t c_stride, bool add, Upcoming& upcoming) {
    multiply_rows<Float32Dot, Vectors>(a, a_stride, rows, b, b_stride, inputs, c, c_stride, add, upcoming);
  }

  template <int Rows, int Vectors>
  static inline void run(const float* a, int64_t a_stride, const char* b, int64_t b_stride, int64_t inputs,
                         Vector (&sum)[Rows][Vectors]) {
    for (int64_t k = 0; k < inputs; ++k) {
      Vector w[Vectors];
#pragma GCC unroll 16
      for (int j = 0; j < Vectors; ++j)
        w[j] = Vector::load(reinterpret_cast<const float*>(b + j / kVectors * b_stride) + k * kPanel +
                            j % kVectors * Vector::kWidth);
#pragma GCC unroll 16
      for (int i = 0; i < Rows; ++i) {
        const Vector x = Vector::broadcast(a[i * a_stride + k]);
#pragma GCC unroll 16
        for (int j = 0; j < Vectors; ++j) sum[i][j] = Vector::fma(x, w[j], sum[i][j]);
      }
    }
  }
};

// bfloat16 weights, a chunk of a panel widened for all rows at once: exact, and half of the memory traffic.
struct WideningDot {
  using Activation = float;
  static constexpr int64_t kStep = 2;

  template <int Vectors>
  static void rows(const float* a, int64_t a_stride, int64_t rows, const char* b, int64_t b_stride,
                   int64_t inputs, float* c, int64_t c_stride, bool add, Upcoming& upcoming) {
    constexpr int Panels = (Vectors + kVectors - 1) / kVectors;
    alignas(64) float wide[Panels][kInputChunk * kPanel];
    for (int j = 0; j < Panels; ++j)
      for (int64_t k = 0; k < inputs; k += 2)
        for (int64_t column = 0; column < kPanel; column += Vector::kWidth) {
          const char* pair = b + j * b_stride + (k / 2 * kPanel + column) * 4;
          Vector::load_low_halves(pair).store(wide[j] + k * kPanel + column);
          Vector::load_high_halves(pair).store(wide[j] + (k + 1) * kPanel + column);
        }
    multiply_rows<Float32Dot, Vectors>(a, a_stride, rows, reinterpret_cast<const char*>(wide),
                                       sizeof(wide[0]), inputs, c, c_stride, add, upcoming);
  }
};

}  // namespace
}  // namespace vtp_cpu
