// Small random models: as plain numbers, computed naively in double precision, and packed for the engine as
// vtp/runtime/cpu.py does it.

#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <numeric>

#include "engine.h"
#include "reference.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#define ASAN_UNPOISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#endif

namespace test {

struct BlockShape {
  int64_t attention_kept;  // columns of the norm before qkv; 0: no attention
  std::vector<int64_t> key_widths, value_widths;
  bool head_norms;
  int64_t mlp_kept, hidden;  // 0: no MLP
  bool offset;
  bool swiglu = false;
  std::vector<int64_t> tables = {};  // of each head, within its block, -1 without; empty: no head has one
  int64_t proj_kept = 0, fc2_kept = 0;  // columns of the norms before proj and before fc2; 0: there is none
};

struct Shape {
  const char* name;
  Dtype dtype;
  int64_t embed_dim, head_dim;  // head_dim: of norms of heads
  std::vector<BlockShape> blocks;
  // of whole models; tokens in, tokens out if `channels` is 0
  int64_t channels, height, width, patch_height, patch_width, prefix, pooled, classes;
  int64_t tables_of_a_block = 0;  // 0: blocks share them

  bool whole() const { return channels > 0; }
  int64_t tables() const {
    int64_t most = 0, before = 0;
    for (const BlockShape& b : blocks) {
      for (int64_t table : b.tables)
        if (table >= 0) most = std::max(most, before + table + 1);
      before += tables_of_a_block;
    }
    return most;
  }
  int64_t patches() const { return whole() ? (height / patch_height) * (width / patch_width) : 0; }
};

inline int64_t sum(const std::vector<int64_t>& widths) {
  return std::accumulate(widths.begin(), widths.end(), int64_t{0});
}

// [tables][tokens][width]: cosines and sines of random angles, of the first token of 0.
inline std::vector<float> rotary_tables(int64_t tables, int64_t tokens, int64_t width) {
  Random random(3);
  std::vector<float> out(static_cast<size_t>(tables * tokens * width));
  for (int64_t row = 0; row < tables * tokens; ++row)
    for (int64_t i = 0; i < width / 2; ++i) {
      const double angle = row % tokens ? 3 * random.normal() : 0.0;
      out[static_cast<size_t>(row * width + i)] = static_cast<float>(std::cos(angle));
      out[static_cast<size_t>(row * width + width / 2 + i)] = static_cast<float>(std::sin(angle));
    }
  return out;
}

struct PlainLinear {
  int64_t inputs, outputs;
  std::vector<double> weight, bias;

  std::vector<double> operator()(const double* x) const {
    std::vector<double> out = bias;
    for (int64_t n = 0; n < outputs; ++n)
      for (int64_t k = 0; k < inputs; ++k)
        out[static_cast<size_t>(n)] += weight[static_cast<size_t>(n * inputs + k)] * x[k];
    return out;
  }
};

struct PlainNorm {
  std::vector<int32_t> index;  // all columns if it has as many as the input

  std::vector<double> operator()(const double* x, int64_t width, double eps) const {
    std::vector<double> row(x, x + width), out;
    normalize(row.data(), width, eps);
    for (int32_t j : index) out.push_back(row[static_cast<size_t>(j)]);
    return out;
  }
};

struct PlainBlock {
  BlockShape shape;
  PlainNorm norm1, norm2, proj_norm, fc2_norm;
  PlainLinear qkv, proj, fc1, fc2;
  std::vector<double> offset, head_norms;  // [4][head_dim]
  int64_t tables_before = 0;
};

using Tokens = std::vector<std::vector<double>>;

class PlainModel {
 public:
  PlainModel(const Shape& shape, uint64_t seed) : shape_(shape), random_(seed) {
    const Shape& s = shape_;
    if (s.whole()) {
      patches_ = linear(s.channels * s.patch_height * s.patch_width, s.embed_dim);
      std::fill(patches_.bias.begin(), patches_.bias.end(), 0.0);  // it is in the positions
      positions_ = random_.numbers((s.prefix + s.patches()) * s.embed_dim, Dtype::kFloat32);
      head_ = linear(s.pooled * s.embed_dim, s.classes);
    }
    for (const BlockShape& b : s.blocks) {
      const int64_t before = static_cast<int64_t>(blocks_.size()) * s.tables_of_a_block;
      blocks_.push_back(block(b));
      blocks_.back().tables_before = before;
    }
  }

  const Shape& shape() const { return shape_; }
  void spoil_index(int32_t value) { blocks_[0].norm1.index.back() = value; }
  double eps() const { return static_cast<double>(1e-5f); }
  double scale() const { return static_cast<double>(0.37f); }

  // Pixels of an image to logits.
  std::vector<double> logits(const double* image) const {
    const Tokens x = through_blocks(embed(image));
    std::vector<double> pooled;
    for (int64_t t = 0; t < shape_.pooled; ++t) {
      std::vector<double> row = x[static_cast<size_t>(t)];
      normalize(row.data(), shape_.embed_dim, eps());
      pooled.insert(pooled.end(), row.begin(), row.end());
    }
    return head_(pooled.data());
  }

  Tokens through_blocks(Tokens x) const {
    for (const PlainBlock& b : blocks_) {
      for (std::vector<double>& row : x)
        for (size_t j = 0; j < b.offset.size(); ++j) row[j] += b.offset[j];
      if (b.shape.attention_kept) attention(b, x);
      if (b.shape.mlp_kept)
        for (std::vector<double>& row : x) {
          std::vector<double> hidden = b.fc1(b.norm2(row.data(), shape_.embed_dim, eps()).data());
          for (int64_t j = 0; j < b.shape.hidden; ++j) {
            double& h = hidden[static_cast<size_t>(j)];
            h = b.shape.swiglu ? silu(h) * hidden[static_cast<size_t>(b.shape.hidden + j)] : gelu(h);
          }
          if (b.shape.fc2_kept) hidden = b.fc2_norm(hidden.data(), b.shape.hidden, eps());
          add(row, b.fc2(hidden.data()));
        }
    }
    return x;
  }

 private:
  friend class Packed;

  PlainLinear linear(int64_t inputs, int64_t outputs) {
    const double scale = 1.0 / std::sqrt(static_cast<double>(inputs));
    return {inputs, outputs, random_.numbers(inputs * outputs, shape_.dtype, scale),
            random_.numbers(outputs, Dtype::kFloat32, 0.5)};
  }

  PlainNorm norm(int64_t kept, int64_t width) {
    PlainNorm out;
    out.index.resize(static_cast<size_t>(width));
    std::iota(out.index.begin(), out.index.end(), 0);
    while (static_cast<int64_t>(out.index.size()) > kept)
      out.index.erase(out.index.begin() + random_.below(static_cast<int64_t>(out.index.size())));
    return out;
  }

  PlainBlock block(const BlockShape& s) {
    PlainBlock out;
    out.shape = s;
    if (s.offset) out.offset = random_.numbers(shape_.embed_dim, Dtype::kFloat32);
    if (s.attention_kept) {
      out.norm1 = norm(s.attention_kept, shape_.embed_dim);
      out.qkv = linear(s.attention_kept, 2 * sum(s.key_widths) + sum(s.value_widths));
      if (s.head_norms) out.head_norms = random_.numbers(4 * shape_.head_dim, Dtype::kFloat32);
      if (s.proj_kept) out.proj_norm = norm(s.proj_kept, sum(s.value_widths));
      out.proj = linear(s.proj_kept ? s.proj_kept : sum(s.value_widths), shape_.embed_dim);
    }
    if (s.mlp_kept) {
      out.norm2 = norm(s.mlp_kept, shape_.embed_dim);
      out.fc1 = linear(s.mlp_kept, s.swiglu ? 2 * s.hidden : s.hidden);
      if (s.fc2_kept) out.fc2_norm = norm(s.fc2_kept, s.hidden);
      out.fc2 = linear(s.fc2_kept ? s.fc2_kept : s.hidden, shape_.embed_dim);
    }
    return out;
  }

  Tokens embed(const double* image) const {
    const Shape& s = shape_;
    Tokens x;
    for (int64_t token = 0; token < s.prefix + s.patches(); ++token) {
      const double* position = positions_.data() + token * s.embed_dim;
      x.emplace_back(position, position + s.embed_dim);
      if (token < s.prefix) continue;
      const int64_t per_row = s.width / s.patch_width, patch = token - s.prefix;
      std::vector<double> pixels;
      for (int64_t c = 0; c < s.channels; ++c)
        for (int64_t y = 0; y < s.patch_height; ++y)
          for (int64_t column = 0; column < s.patch_width; ++column)
            pixels.push_back(image[(c * s.height + patch / per_row * s.patch_height + y) * s.width +
                                   patch % per_row * s.patch_width + column]);
      add(x.back(), patches_(pixels.data()));
    }
    return x;
  }

  void attention(const PlainBlock& b, Tokens& x) const {
    const int64_t keys = sum(b.shape.key_widths);
    const int64_t tokens = static_cast<int64_t>(x.size()), width = b.qkv.outputs;
    std::vector<double> qkv;
    for (const std::vector<double>& row : x) {
      std::vector<double> out = b.qkv(b.norm1(row.data(), shape_.embed_dim, eps()).data());
      if (b.shape.head_norms) normalize_heads(b, out.data());
      rotate_heads(b, out.data(), static_cast<int64_t>(qkv.size()) / width, tokens);
      qkv.insert(qkv.end(), out.begin(), out.end());
    }
    for (int64_t t = 0; t < tokens; ++t) {
      std::vector<double> out;
      int64_t key = 0, value = 2 * keys;
      for (size_t h = 0; h < b.shape.key_widths.size(); ++h) {
        const std::vector<double> weights =
            softmax_weights(&qkv[static_cast<size_t>(t * width + key)], &qkv[static_cast<size_t>(keys + key)],
                            width, tokens, b.shape.key_widths[h], scale());
        for (int64_t j = 0; j < b.shape.value_widths[h]; ++j) {
          double total = 0;
          for (int64_t other = 0; other < tokens; ++other)
            total += weights[static_cast<size_t>(other)] * qkv[static_cast<size_t>(other * width + value + j)];
          out.push_back(total);
        }
        key += b.shape.key_widths[h];
        value += b.shape.value_widths[h];
      }
      if (b.shape.proj_kept) out = b.proj_norm(out.data(), sum(b.shape.value_widths), eps());
      add(x[static_cast<size_t>(t)], b.proj(out.data()));
    }
  }

  void normalize_heads(const PlainBlock& b, double* row) const {
    const int64_t d = shape_.head_dim, heads = static_cast<int64_t>(b.shape.value_widths.size());
    for (int64_t part = 0; part < 2 * heads; ++part) {
      const double* weight = b.head_norms.data() + (part < heads ? 0 : 2 * d);
      normalize(row + part * d, d, eps());
      for (int64_t j = 0; j < d; ++j) row[part * d + j] = row[part * d + j] * weight[j] + weight[d + j];
    }
  }

  // Of one token, queries and keys.
  void rotate_heads(const PlainBlock& b, double* row, int64_t token, int64_t tokens) const {
    const std::vector<float> all = rotary_tables(shape_.tables(), tokens, shape_.head_dim);
    for (int64_t part = 0; part < 2; ++part)
      for (size_t h = 0; h < b.shape.key_widths.size(); row += b.shape.key_widths[h++])
        if (!b.shape.tables.empty() && b.shape.tables[h] >= 0)
          rotate(row, all.data() + ((b.tables_before + b.shape.tables[h]) * tokens + token) * shape_.head_dim,
                 shape_.head_dim);
  }

  static void add(std::vector<double>& to, const std::vector<double>& x) {
    for (size_t j = 0; j < x.size(); ++j) to[j] += x[j];
  }

  Shape shape_;
  Random random_;
  PlainLinear patches_, head_;
  std::vector<double> positions_;
  std::vector<PlainBlock> blocks_;
};

// The bytes and the list of integers of a model. Under AddressSanitizer what lies between two parts is
// poisoned.
class Packed {
 public:
  explicit Packed(const PlainModel& model) : dtype_(model.shape_.dtype) {
    const Shape& s = model.shape_;
    layout = {6,
              static_cast<int64_t>(dtype_),
              s.embed_dim,
              s.head_dim,
              bits(model.eps()),
              bits(model.scale()),
              s.tables_of_a_block};
    layout.push_back(s.whole());
    if (s.whole()) {
      for (int64_t n : {s.channels, s.height, s.width, s.patch_height, s.patch_width, s.prefix})
        layout.push_back(n);
      linear(model.patches_);
      rows_of_panels(model.positions_, s.embed_dim);
    }
    layout.push_back(static_cast<int64_t>(model.blocks_.size()));
    for (const PlainBlock& b : model.blocks_) block(b, s.embed_dim);
    layout.push_back(s.whole());
    if (s.whole()) {
      layout.push_back(s.pooled);
      linear(model.head_);
    }
    finish();
  }
  ~Packed() { ASAN_UNPOISON_MEMORY_REGION(memory_.get(), static_cast<size_t>(size)); }

  const char* bytes() const { return memory_.get(); }

  std::vector<int64_t> layout;
  int64_t size = 0;

 private:
  static int64_t bits(double x) {
    const float single = static_cast<float>(x);
    uint32_t out;
    std::memcpy(&out, &single, 4);
    return out;
  }

  void memory(const void* data, size_t bytes) {
    layout.push_back(size);
    parts_.emplace_back(static_cast<const char*>(data), static_cast<const char*>(data) + bytes);
    size += round_up(static_cast<int64_t>(bytes), 64);
  }

  void floats(const std::vector<double>& numbers) {
    const std::vector<float> out(numbers.begin(), numbers.end());
    memory(out.data(), out.size() * 4);
  }

  void rows_of_panels(const std::vector<double>& numbers, int64_t width) {
    std::vector<double> out;
    for (size_t row = 0; row < numbers.size() / static_cast<size_t>(width); ++row) {
      const auto from = numbers.begin() + static_cast<std::ptrdiff_t>(row) * width;
      out.insert(out.end(), from, from + width);
      out.resize((row + 1) * static_cast<size_t>(round_up(width, kPanel)));
    }
    floats(out);
  }

  void linear(const PlainLinear& layer) {
    layout.push_back(layer.inputs);
    layout.push_back(layer.outputs);
    const std::vector<char> panels = panels_of(layer.weight, layer.inputs, layer.outputs, dtype_);
    memory(panels.data(), panels.size());
    rows_of_panels(layer.bias, layer.outputs);
  }

  // Panels of the first half of the outputs and of the second in turn, with zeros behind each.
  static PlainLinear halves_by_panel(const PlainLinear& layer) {
    const int64_t half = layer.outputs / 2, inputs = layer.inputs;
    PlainLinear out{inputs, 2 * round_up(half, kPanel), {}, {}};
    out.weight.resize(static_cast<size_t>(out.outputs * inputs));
    out.bias.resize(static_cast<size_t>(out.outputs));
    for (int64_t n = 0; n < layer.outputs; ++n) {
      const int64_t j = n % half, to = j / kPanel * 2 * kPanel + n / half * kPanel + j % kPanel;
      out.bias[static_cast<size_t>(to)] = layer.bias[static_cast<size_t>(n)];
      std::copy_n(layer.weight.begin() + n * inputs, inputs, out.weight.begin() + to * inputs);
    }
    return out;
  }

  void norm(const PlainNorm& norm, int64_t width) {
    const int64_t kept = static_cast<int64_t>(norm.index.size());
    layout.push_back(kept);
    layout.push_back(kept < width);
    if (kept < width) memory(norm.index.data(), norm.index.size() * 4);
  }

  void inner(const PlainNorm& before, int64_t width) {
    layout.push_back(!before.index.empty());
    if (!before.index.empty()) norm(before, width);
  }

  void maybe(const std::vector<double>& numbers) {
    layout.push_back(!numbers.empty());
    if (!numbers.empty()) floats(numbers);
  }

  void block(const PlainBlock& b, int64_t width) {
    maybe(b.offset);
    layout.push_back(b.shape.attention_kept > 0);
    if (b.shape.attention_kept) {
      norm(b.norm1, width);
      layout.push_back(static_cast<int64_t>(b.shape.key_widths.size()));
      for (int64_t d : b.shape.key_widths) layout.push_back(d);
      for (int64_t w : b.shape.value_widths) layout.push_back(w);
      for (size_t h = 0; h < b.shape.key_widths.size(); ++h)
        layout.push_back(b.shape.tables.empty() ? -1 : b.shape.tables[h]);
      linear(b.qkv);
      maybe(b.head_norms);
      inner(b.proj_norm, sum(b.shape.value_widths));
      linear(b.proj);
    }
    layout.push_back(b.shape.mlp_kept > 0);
    if (b.shape.mlp_kept) {
      norm(b.norm2, width);
      layout.push_back(b.shape.swiglu);
      layout.push_back(b.shape.hidden);
      linear(b.shape.swiglu ? halves_by_panel(b.fc1) : b.fc1);
      inner(b.fc2_norm, b.shape.hidden);
      linear(b.fc2);
    }
  }

  void finish() {
    memory_.reset(static_cast<char*>(std::aligned_alloc(64, static_cast<size_t>(size))));
    char* at = memory_.get();
    for (const std::vector<char>& part : parts_) {
      const size_t room = static_cast<size_t>(round_up(static_cast<int64_t>(part.size()), 64));
      std::memcpy(at, part.data(), part.size());
      std::memset(at + part.size(), 0xff, room - part.size());
      ASAN_POISON_MEMORY_REGION(at + part.size(), room - part.size());
      at += room;
    }
  }

  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  Dtype dtype_;
  std::vector<std::vector<char>> parts_;
  std::unique_ptr<char, Free> memory_;
};

}  // namespace test
