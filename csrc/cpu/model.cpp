#include "model.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

namespace vtp_cpu {
namespace {

constexpr int64_t kFormat = 6;      // of the list; vtp/runtime/cpu.py has the same
constexpr int64_t kMost = 1 << 24;  // of any width or count: products of two stay far from overflow

[[noreturn]] void refuse(const std::string& why) {
  throw std::runtime_error("layout: " + why + "; expected the one that vtp.optimize made with the weights");
}

class Reader {
 public:
  Reader(const int64_t* layout, int64_t length, const char* bytes, int64_t size)
      : at_(layout), end_(layout + length), bytes_(bytes), size_(size) {}

  int64_t next() {
    if (at_ == end_) refuse("it ends too early");
    return *at_++;
  }

  int64_t count(const char* what, int64_t least = 0) {
    const int64_t n = next();
    if (n < least || n > kMost) refuse(std::string(what) + " is " + std::to_string(n));
    return n;
  }

  // A count of things that take at least one number each of what is left of the list.
  int64_t count_listed(const char* what, int64_t least = 0) {
    const int64_t n = count(what, least);
    if (n > end_ - at_) refuse("it ends too early");
    return n;
  }

  // The widths of so many heads; returns their sum.
  int64_t widths(std::vector<int64_t>& out, int64_t heads, const char* what) {
    out.resize(static_cast<size_t>(heads));
    int64_t total = 0;
    for (int64_t& w : out) {
      total += w = count(what, 1);
      if (total > kMost) refuse("heads are too wide");
    }
    return total;
  }

  // The table of each head, `before` more than in the list; keys of heads that have one are `width` wide.
  // Returns how many there have to be.
  int64_t tables(Attention& a, int64_t before, int64_t width) {
    a.tables.resize(a.key_widths.size());
    int64_t most = 0;
    for (size_t h = 0; h < a.tables.size(); ++h) {
      int64_t table = count("the table of a head", -1);
      if (table >= 0) table += before;
      a.tables[h] = table;
      most = std::max(most, table + 1);
      if (table >= 0 && (a.key_widths[h] != width || width % 2))
        refuse("a key width is " + std::to_string(a.key_widths[h]) + " where pairs of " +
               std::to_string(width) + " are rotated");
    }
    return most;
  }

  template <class T>
  const T* memory(int64_t count, const char* what) {
    const int64_t offset = next();
    const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
    if (offset < 0 || offset % 4 || offset > size_ || bytes > size_ - offset)
      refuse(std::string(what) + " lies at byte " + std::to_string(offset) + " of " + std::to_string(size_));
    return reinterpret_cast<const T*>(bytes_ + offset);
  }

  // The norm before the last layer of a branch, where there is one, over so many columns.
  Norm inner(int64_t width) { return next() ? norm(width) : Norm{0, nullptr, 0}; }

  void expect_end() const {
    if (at_ != end_) refuse("it goes on behind its end");
  }

  // 0 inputs or outputs: any number of them.
  Linear linear(Dtype dtype, int64_t inputs, int64_t outputs) {
    Linear out;
    out.inputs = count("the inputs of a layer", 1);
    out.outputs = count("the outputs of a layer", 1);
    if ((inputs && out.inputs != inputs) || (outputs && out.outputs != outputs))
      refuse("a layer has " + std::to_string(out.inputs) + " inputs and " + std::to_string(out.outputs) +
             " outputs where " + std::to_string(inputs) + " and " + std::to_string(outputs) + " belong");
    out.weight = memory<char>(out.panels() * panel_bytes(dtype, out.inputs), "a weight");
    out.bias = memory<float>(out.panels() * kPanel, "a bias");
    return out;
  }

  Norm norm(int64_t width) {
    Norm out{count("the kept columns of a norm", 1), nullptr, width};
    if (out.kept > width) refuse("a norm keeps " + std::to_string(out.kept) + " of " + std::to_string(width));
    if (next()) {
      out.index = memory<int32_t>(out.kept, "an index");
      for (int64_t j = 0; j < out.kept; ++j)
        if (out.index[j] < 0 || out.index[j] >= width) refuse("an index is " + std::to_string(out.index[j]));
    } else if (out.kept != width) {
      refuse("a norm without an index keeps " + std::to_string(out.kept) + " of " + std::to_string(width));
    }
    return out;
  }

 private:
  const int64_t *at_, *end_;
  const char* bytes_;
  int64_t size_;
};

float float_of(int64_t bits) {  // floats travel as their bits
  const uint32_t low = static_cast<uint32_t>(bits);
  float out;
  std::memcpy(&out, &low, 4);
  return out;
}

}  // namespace

void Model::read(const int64_t* layout, int64_t length, const char* bytes, int64_t size) {
  Reader in(layout, length, bytes, size);
  const int64_t format = in.next();
  if (format != kFormat) refuse("its format is " + std::to_string(format));
  const int64_t kind = in.next();
  if (kind != 0 && kind != 1) refuse("its dtype is " + std::to_string(kind));
  dtype = static_cast<Dtype>(kind);
  embed_dim = in.count("the embedding width", 1);
  head_dim = in.count("the head width");
  eps = float_of(in.next());
  scale = float_of(in.next());
  // Tables of a block, if blocks have their own: heads are numbered within theirs, so that a block's part of
  // the list is the same in that of this block alone.
  const int64_t tables_of_a_block = in.count("the tables of a block");

  from_images = in.next() != 0;
  if (from_images) {
    channels = in.count("channels", 1);
    height = in.count("the height", 1);
    width = in.count("the width", 1);
    patch_height = in.count("the height of a patch", 1);
    patch_width = in.count("the width of a patch", 1);
    prefix = in.count("the number of prefix tokens");
    if (height % patch_height || width % patch_width) refuse("patches do not fill the image");
    const int64_t rows = height / patch_height, columns = width / patch_width;
    if (channels > kMost / patch_height / patch_width || rows > kMost / columns)
      refuse("patches are too many");
    tokens = prefix + rows * columns;
    patches = in.linear(dtype, channels * patch_height * patch_width, embed_dim);
    positions = in.memory<float>(tokens * round_up(embed_dim, kPanel), "the positions");
  }

  tables = 0;
  blocks.resize(in.count_listed("the number of blocks"));
  int64_t tables_before = 0;
  for (Block& block : blocks) {
    block.offset = in.next() ? in.memory<float>(embed_dim, "an offset") : nullptr;
    block.has_attention = in.next() != 0;
    if (block.has_attention) {
      Attention& a = block.attention;
      a.norm = in.norm(embed_dim);
      const int64_t heads = in.count_listed("the number of heads", 1);
      a.total_keys = in.widths(a.key_widths, heads, "a key width");
      a.total_width = in.widths(a.value_widths, heads, "a value width");
      tables = std::max(tables, in.tables(a, tables_before, head_dim));
      a.qkv = in.linear(dtype, a.norm.kept, 2 * a.total_keys + a.total_width);
      a.head_norms = in.next() ? in.memory<float>(4 * head_dim, "the norms of heads") : nullptr;
      if (a.head_norms)
        for (int64_t d : a.key_widths)
          if (d != head_dim)
            refuse("a key width is " + std::to_string(d) + " where norms are over " +
                   std::to_string(head_dim));
      a.inner = in.inner(a.total_width);
      a.proj = in.linear(dtype, a.inner.kept ? a.inner.kept : a.total_width, embed_dim);
    }
    block.has_mlp = in.next() != 0;
    if (block.has_mlp) {
      Mlp& m = block.mlp;
      m.norm = in.norm(embed_dim);
      const int64_t nonlinearity = in.count("the nonlinearity");
      if (nonlinearity > 1) refuse("a nonlinearity is " + std::to_string(nonlinearity));
      m.swiglu = nonlinearity == 1;
      const int64_t hidden = in.count("the hidden units", 1);
      m.fc1 = in.linear(dtype, m.norm.kept, m.swiglu ? 2 * round_up(hidden, kPanel) : hidden);
      m.inner = in.inner(hidden);
      m.fc2 = in.linear(dtype, m.inner.kept ? m.inner.kept : hidden, embed_dim);
    }
    tables_before += tables_of_a_block;
  }
  if (from_images && tables) refuse("a whole model has rotary embeddings");

  to_logits = in.next() != 0;
  if (to_logits) {
    pooled = in.count("the number of pooled tokens", 1);
    if (from_images && pooled > tokens) refuse("more tokens are pooled than there are");
    head = in.linear(dtype, pooled * embed_dim, 0);
  }
  in.expect_end();
}

int64_t Model::widest_input() const {
  int64_t widest = from_images ? patches.inputs : 0;
  for (const Block& b : blocks) {
    if (b.has_attention) widest = std::max({widest, b.attention.qkv.inputs, b.attention.total_width});
    if (b.has_mlp) widest = std::max({widest, b.mlp.fc1.inputs, b.mlp.inner.kept});
  }
  return widest;
}

int64_t Model::widest_hidden() const {
  int64_t widest = 0;
  for (const Block& b : blocks) {
    if (b.has_attention) widest = std::max(widest, b.attention.qkv.outputs);
    if (b.has_mlp) widest = std::max(widest, b.mlp.hidden());
  }
  return widest;
}

}  // namespace vtp_cpu
