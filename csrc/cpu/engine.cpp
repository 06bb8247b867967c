#include "engine.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <thread>

#if __has_include(<unistd.h>)
#include <unistd.h>
#endif

#include "bfloat16.h"

namespace vtp_cpu {

namespace {

// A task reads W's panels from beyond the second-level cache once for its rows, and A's rows, where they do not
// all stay in the cache, once for its panels. Of both there are as many as leave half of the cache to what passes
// by: a chunk of each row's inputs, which is read again for each panel, and the row's sums stay in the other half.
constexpr int64_t kChunkBytes = 1024;      // of a row: 256 inputs in float32, 512 in bfloat16 for tiles
constexpr int64_t kSumBytes = kPanel * 4;  // of a row and a panel
// Up to 1 MB: with 512 KB (AMD Zen 3) 100 to 200 rows and 4 to 8 panels were equally fast. Larger caches have more
// of both, in proportion: for processors with tiles, whose cores have 2 MB, what is beyond it is far away.
constexpr int64_t kRowsAtOnce = 200;
constexpr int64_t kPanelsAtOnce = 4;
constexpr int64_t kMegabyte = 1 << 20;
constexpr int64_t kLeastCache = kMegabyte / 8;
constexpr int64_t kMostCache = 4 * kMegabyte;  // what is larger several cores have in common

constexpr int64_t kTasksPerThread = 4;  // wanted of a stage, so that threads end together
constexpr int64_t kChunkRows = 400;  // tokens per thread between reading all weights and reading them again
constexpr int64_t kNormRows = 16;    // of a task

constexpr int64_t kCacheLine = 64;

// Elements between rows of `width` elements: whole cache lines, an odd number of them, so that rows above one
// another fall into different sets of the first-level cache.
int64_t row_stride(int64_t width, int64_t bytes) {
  const int64_t lines = divide_up(round_up(width, kPanel) * bytes, kCacheLine) | 1;
  return lines * kCacheLine / bytes;
}

}  // namespace

Blocks blocks_for(int64_t cache) {
  const int64_t usable = std::clamp(cache, kLeastCache, kMostCache), size = std::max(usable, kMegabyte);
  const int64_t panels = kPanelsAtOnce * (size / kMegabyte);
  return {std::min(kRowsAtOnce * size / kMegabyte, usable / 2 / (kChunkBytes + panels * kSumBytes)), panels};
}

int64_t second_level_cache() {
  static const int64_t bytes = [] {
#if defined(_SC_LEVEL2_CACHE_SIZE)
    const int64_t known = sysconf(_SC_LEVEL2_CACHE_SIZE);
    if (known > 0) return known;
#endif
    return kMegabyte;
  }();
  return bytes;
}

struct Stage {
  enum Kind {
    kPatches,
    kEmbed,
    kTokensIn,
    kOffset,
    kNorm,
    kInnerNorm,
    kLinear,
    kAttention,
    kPool,
    kLogitsOut,
    kTokensOut
  };
  Kind kind;
  int64_t tasks;
  // kOffset, kAttention: of the block; kNorm, kInnerNorm, kLinear, kEmbed: the layer
  const Block* block;
  const Norm* norm;
  const Linear* layer;
  const void* from;
  int64_t from_stride;
  void* to;
  int64_t to_stride;
  Nonlinearity nonlinearity;             // of a linear layer
  bool to_float, add;                    // likewise; add: to what is there
  int64_t rows, row_block, panel_block;  // of a linear layer; of one image for kEmbed
  int64_t parts;                         // of a head's rows, for kAttention
};

// Of one stage, on a cache line each. Tasks are handed out and counted when done: a stage ends when its last
// task has, whatever the number of threads that came to help, even if it is one.
struct Workspace::Counters {
  alignas(kCacheLine) std::atomic<int64_t> next;
  alignas(kCacheLine) std::atomic<int64_t> done;
};

Workspace::Workspace() = default;
Workspace::~Workspace() { std::free(memory_); }

char* Workspace::bytes(size_t size) {
  if (size > size_) {
    std::free(memory_);
    memory_ = nullptr;
    size_ = 0;
    const size_t rounded = (size + kCacheLine - 1) / kCacheLine * kCacheLine;
    memory_ = static_cast<char*>(std::aligned_alloc(kCacheLine, rounded));
    if (!memory_) throw std::bad_alloc();
    size_ = rounded;
  }
  return memory_;
}

class Engine {
 public:
  Engine(Workspace& workspace, const Call& call, int64_t threads, int64_t cache)
      : Engine(workspace, threads, cache) {
    call_ = call;
    tokens_ = m_.from_images ? m_.tokens : call.tokens;
    chunk_ = std::min(call.images, std::max<int64_t>(1, kChunkRows * threads / tokens_));
    lay_out_memory();
  }

  // Of the workspace's model, its dtype alone is used.
  Engine(Workspace& workspace, int64_t threads, int64_t cache)
      : w_(workspace),
        m_(workspace.model),
        k_(kernels(m_.dtype)),
        threads_(threads),
        most_(blocks_for(cache)),
        scratch_stride_((most_.rows + 2 * k_.row_step) * most_.panels * kPanel) {}

  void run(const Linear& layer, const void* x, int64_t rows, float* out, Parallel parallel) {
    scratch_ = reinterpret_cast<float*>(w_.bytes(static_cast<size_t>(threads_ * scratch_stride_ * 4)));
    w_.stages_.clear();
    linear(layer, x, layer.inputs, out, layer.panels() * kPanel, rows, true);
    start(parallel);
  }

  void run(Parallel parallel) {
    for (int64_t first = 0; first < call_.images; first += chunk_) {
      first_image_ = first;
      plan_stages(std::min(chunk_, call_.images - first));
      start(parallel);
    }
  }

 private:
  // ------------------------------------------------------------------------------------------- memory

  void lay_out_memory() {
    const int64_t act = k_.activation_bytes, rows = chunk_ * tokens_;
    x_stride_ = row_stride(m_.embed_dim, 4);
    input_stride_ = row_stride(std::max(m_.widest_input(), m_.to_logits ? m_.head.inputs : 1), act);
    hidden_stride_ = row_stride(std::max<int64_t>(m_.widest_hidden(), 1), act);
    logits_stride_ = m_.to_logits ? m_.head.panels() * kPanel : 0;
    int64_t scratch = std::max(scratch_stride_, m_.widest_hidden());  // which rows of an inner norm are within
    for (const Block& b : m_.blocks)
      if (b.has_attention)
        for (size_t h = 0; h < b.attention.key_widths.size(); ++h)
          scratch = std::max(scratch, k_.attention_scratch(tokens_, b.attention.key_widths[h],
                                                           b.attention.value_widths[h]));
    scratch_stride_ = round_up(scratch, 2 * kCacheLine / 4);

    const int64_t sizes[] = {rows * x_stride_ * 4, rows * input_stride_ * act, rows * hidden_stride_ * act,
                             chunk_ * logits_stride_ * 4, threads_ * scratch_stride_ * 4};
    int64_t total = 0;
    for (int64_t size : sizes) total += round_up(size, kCacheLine);
    char* at = w_.bytes(static_cast<size_t>(total));
    char* parts[5];
    for (int i = 0; i < 5; ++i) {
      parts[i] = at;
      at += round_up(sizes[i], kCacheLine);
    }
    x_ = reinterpret_cast<float*>(parts[0]);
    input_ = parts[1];
    hidden_ = parts[2];
    logits_ = reinterpret_cast<float*>(parts[3]);
    scratch_ = reinterpret_cast<float*>(parts[4]);
  }

  // ------------------------------------------------------------------------------------------- stages

  void plan_stages(int64_t images) {
    images_ = images;
    const int64_t rows = images * tokens_;
    std::vector<Stage>& s = w_.stages_;
    s.clear();
    if (m_.from_images) {
      add(Stage::kPatches, images * (m_.height / m_.patch_height));
      Stage& embed = linear(m_.patches, input_, input_stride_, x_, x_stride_, tokens_ - m_.prefix, true);
      embed.kind = Stage::kEmbed;
      embed.tasks *= images;
    } else {
      add(Stage::kTokensIn, divide_up(rows, kNormRows));
    }
    for (const Block& b : m_.blocks) {
      if (b.offset) add(Stage::kOffset, divide_up(rows, kNormRows)).block = &b;
      if (b.has_attention) {
        norm(b.attention.norm, rows);
        linear(b.attention.qkv, input_, input_stride_, hidden_, hidden_stride_, rows, false);
        attention(b);
        last_layer(b.attention.proj, b.attention.inner, input_, input_stride_, hidden_, hidden_stride_, rows);
      }
      if (b.has_mlp) {
        norm(b.mlp.norm, rows);
        linear(b.mlp.fc1, input_, input_stride_, hidden_, hidden_stride_, rows, false).nonlinearity =
            b.mlp.swiglu ? Nonlinearity::kSwiGlu : Nonlinearity::kGelu;
        last_layer(b.mlp.fc2, b.mlp.inner, hidden_, hidden_stride_, input_, input_stride_, rows);
      }
    }
    if (m_.to_logits) {
      add(Stage::kPool, images);
      linear(m_.head, input_, input_stride_, logits_, logits_stride_, images, true);
      add(Stage::kLogitsOut, images);
    } else {
      add(Stage::kTokensOut, divide_up(rows, kNormRows));
    }
  }

  // All stages, on as many threads as come.
  void start(Parallel parallel) {
    const size_t stages = w_.stages_.size();
    if (stages > w_.counters_size_) {
      w_.counters_.reset(new Workspace::Counters[stages]);
      w_.counters_size_ = stages;
    }
    for (size_t i = 0; i < stages; ++i) {
      w_.counters_[i].next.store(0, std::memory_order_relaxed);
      w_.counters_[i].done.store(0, std::memory_order_relaxed);
    }
    workers_.store(0);
    parallel(threads_, [](void* self) { static_cast<Engine*>(self)->work(); }, this);
  }

  Stage& add(Stage::Kind kind, int64_t tasks) {
    Stage stage{};
    stage.kind = kind;
    stage.tasks = tasks;
    w_.stages_.push_back(stage);
    return w_.stages_.back();
  }

  // A stage of its own, and not within the first task that multiplies its rows. No instruction set packs A: a norm
  // writes rows as the product reads them, so one pass over them is all that could be saved. Shares of the cycles
  // of compact DeiTs, batch 1, one thread of an AMD EPYC (Zen 4); "in place": each row written over the one before,
  // in the first-level cache, which left products as fast; "fused": all cycles so, over all as it is, the same bits
  // (at batch 8 in bfloat16 1.002 for tiny, 1.000 for base), 2026-11-27:
  //
  //                    products  attention  norms  norms in place  fused
  //   tiny, float32       70.9%      22.4%  2.28%           2.25%  1.001
  //   tiny, bfloat16      67.0%      23.9%  4.53%           4.48%  1.001
  //   small, float32      82.3%      14.0%  1.19%           1.14%
  //   small, bfloat16     79.4%      15.8%  2.33%           2.31%  1.000
  //   base, float32       89.9%       8.1%  0.72%           0.59%
  //   base, bfloat16      88.2%       9.2%  1.23%           1.18%  1.001
  //
  // In tiles it is the same: a row is read for each two panels, 16 times for qkv of tiny, fused or not, and a tile
  // of A is sixteen cache lines whether its rows lie side by side or apart. What could be saved, the write of 197
  // rows of four lines, is 1,600 cycles at two a line, beside 26,000 of that product at the peak and 40,000 of the
  // norm at the 200 a row that it takes here. Several threads all read the rows: to wait for the one that makes
  // them is this stage.
  //
  // What would make norms faster is a faster gather: without one they took 0.61 of their cycles (tiny, bfloat16),
  // with compressed vectors, where kept columns ascend, 0.73: 1.2% of that model, 0.4% of small, 0.2% of base.
  void norm(const Norm& layer, int64_t rows) {
    Stage& s = add(Stage::kNorm, divide_up(rows, kNormRows));
    s.norm = &layer;
    s.rows = rows;
  }

  // The last layer of a branch, with the norm before it where there is one, whose results go to `room`.
  void last_layer(const Linear& layer, const Norm& inner, char* from, int64_t from_stride, char* room,
                  int64_t room_stride, int64_t rows) {
    if (inner.kept) {
      Stage& s = add(Stage::kInnerNorm, divide_up(rows, kNormRows));
      s.norm = &inner;
      s.from = from;
      s.from_stride = from_stride;
      s.to = room;
      s.to_stride = room_stride;
      s.rows = rows;
      from = room;
      from_stride = room_stride;
    }
    linear(layer, from, from_stride, x_, x_stride_, rows, true).add = true;
  }

  Stage& linear(const Linear& layer, const void* from, int64_t from_stride, void* to, int64_t to_stride,
                int64_t rows, bool to_float) {
    Stage& s = add(Stage::kLinear, 0);
    s.layer = &layer;
    s.from = from;
    s.from_stride = from_stride;
    s.to = to;
    s.to_stride = to_stride;
    s.to_float = to_float;
    s.rows = rows;
    int64_t blocks = divide_up(rows, most_.rows), panels = most_.panels;
    const auto too_few = [&] {
      return blocks * divide_up(layer.panels(), panels) < kTasksPerThread * threads_;
    };
    if (too_few()) panels = kPanelsAtOnce;
    while (too_few() && rows / blocks > 8 * k_.row_step) blocks *= 2;
    s.panel_block = std::min(panels, layer.panels());
    const int64_t columns = divide_up(layer.panels(), s.panel_block);
    s.row_block = round_up(divide_up(rows, blocks), k_.row_step);
    s.tasks = divide_up(rows, s.row_block) * columns;
    return s;
  }

  void attention(const Block& block) {
    const int64_t heads = images_ * static_cast<int64_t>(block.attention.value_widths.size());
    int64_t parts = 1;
    while (heads * parts <= 2 * threads_ && tokens_ / parts > 8 * k_.row_step) parts *= 2;
    Stage& s = add(Stage::kAttention, heads * parts);
    s.block = &block;
    s.parts = parts;
  }

  // --------------------------------------------------------------------------------------------- work

  void work() {
    const int64_t worker = workers_.fetch_add(1);
    if (worker >= threads_) return;
    float* scratch = scratch_ + worker * scratch_stride_;
    k_.begin();
    for (size_t i = 0; i < w_.stages_.size(); ++i) {
      const Stage& stage = w_.stages_[i];
      Workspace::Counters& counters = w_.counters_[i];
      int64_t task;
      while ((task = counters.next.fetch_add(1, std::memory_order_relaxed)) < stage.tasks) {
        do_task(stage, task, scratch);
        counters.done.fetch_add(1, std::memory_order_acq_rel);
      }
      for (int spins = 0; counters.done.load(std::memory_order_acquire) < stage.tasks; ++spins)
        if (spins < 4096)
          pause();
        else
          std::this_thread::yield();
    }
    k_.end();
  }

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  void do_task(const Stage& s, int64_t task, float* scratch) {
    switch (s.kind) {
      case Stage::kPatches:
        return copy_patches(task);
      case Stage::kEmbed:
        return do_embed(s, task, scratch);
      case Stage::kTokensIn:
        return copy_tokens_in(task);
      case Stage::kOffset:
        return add_offset(s, task);
      case Stage::kNorm:
        return do_norm(s, task);
      case Stage::kInnerNorm:
        return do_inner_norm(s, task, scratch);
      case Stage::kLinear:
        return do_linear(s, task, scratch);
      case Stage::kAttention:
        return do_attention(s, task, scratch);
      case Stage::kPool:
        return pool(task);
      case Stage::kLogitsOut:
        return copy_out(logits_ + task * logits_stride_, m_.head.outputs, task);
      case Stage::kTokensOut:
        return copy_tokens_out(task);
    }
  }

  void copy_patches(int64_t task) {
    const int64_t rows = m_.height / m_.patch_height, columns = m_.width / m_.patch_width;
    const int64_t image = task / rows, row = task % rows;
    const int64_t pixel = call_.input_bfloat16 ? 2 : 4;
    PatchRow t{};
    t.image = static_cast<const char*>(call_.input) +
              ((first_image_ + image) * m_.channels * m_.height + row * m_.patch_height) * m_.width * pixel;
    t.bfloat16 = call_.input_bfloat16;
    t.channels = m_.channels;
    t.height = m_.height;
    t.width = m_.width;
    t.patch_height = m_.patch_height;
    t.patch_width = m_.patch_width;
    t.out = activation(input_, (image * rows + row) * columns * input_stride_);
    t.out_stride = input_stride_;
    t.padded = round_up(m_.patches.inputs, k_.input_step);
    k_.patches(t);
    if (row == 0)
      for (int64_t token = 0; token < m_.prefix; ++token)
        std::memcpy(x_row(image * tokens_ + token), m_.positions + token * round_up(m_.embed_dim, kPanel),
                    round_up(m_.embed_dim, kPanel) * 4);
  }

  LinearTile tile(const Stage& s, int64_t task, float* scratch) const {
    const int64_t columns = divide_up(s.layer->panels(), s.panel_block);
    const int64_t row = task / columns * s.row_block, panel = task % columns * s.panel_block;
    LinearTile t{};
    t.a = static_cast<const char*>(s.from) + row * s.from_stride * k_.activation_bytes;
    t.a_stride = s.from_stride;
    t.weight = static_cast<const char*>(s.layer->weight) + panel * panel_bytes(m_.dtype, s.layer->inputs);
    t.bias = s.layer->bias + panel * kPanel;
    t.inputs = s.layer->inputs;
    t.rows = std::min(s.row_block, s.rows - row);
    t.columns = std::min(s.panel_block * kPanel, s.layer->outputs - panel * kPanel);
    t.nonlinearity = s.nonlinearity;
    const int64_t to_panel = s.nonlinearity == Nonlinearity::kSwiGlu ? panel / 2 : panel;
    t.out = static_cast<char*>(s.to) +
            (row * s.to_stride + to_panel * kPanel) * (s.to_float ? 4 : k_.activation_bytes);
    t.out_float = s.to_float;
    t.out_stride = s.to_stride;
    // What the next layer reads behind the last column.
    if (!s.to_float && panel + s.panel_block >= s.layer->panels()) {
      const int64_t panels = s.layer->panels() / (s.nonlinearity == Nonlinearity::kSwiGlu ? 2 : 1);
      t.padding = round_up(panels * kPanel, k_.input_step) - panels * kPanel;
    }
    t.scratch = scratch;
    if (s.add) {
      t.residual = static_cast<const float*>(t.out);
      t.residual_stride = s.to_stride;
    }
    return t;
  }

  void do_linear(const Stage& s, int64_t task, float* scratch) { k_.linear(tile(s, task, scratch)); }

  void do_embed(const Stage& s, int64_t task, float* scratch) {
    const int64_t per_image = s.tasks / images_, image = task / per_image;
    LinearTile t = tile(s, task % per_image, scratch);
    const int64_t at = static_cast<float*>(t.out) - x_;
    const int64_t row = at / x_stride_, column = at % x_stride_, width = round_up(m_.embed_dim, kPanel);
    t.a = static_cast<const char*>(t.a) + image * s.rows * s.from_stride * k_.activation_bytes;
    t.out = x_row(image * tokens_ + m_.prefix + row) + column;
    t.residual = m_.positions + (m_.prefix + row) * width + column;
    t.residual_stride = width;
    k_.linear(t);
  }

  void do_norm(const Stage& s, int64_t task) {
    const int64_t first = task * kNormRows;
    k_.norm(norm_rows(*s.norm, x_, input_, input_stride_, round_up(s.norm->kept, k_.input_step)), first,
            std::min(first + kNormRows, s.rows));
  }

  void do_inner_norm(const Stage& s, int64_t task, float* scratch) {
    const int64_t first = task * kNormRows;
    NormRows t = norm_rows(*s.norm, nullptr, s.to, s.to_stride, round_up(s.norm->kept, k_.input_step));
    t.x = s.from;
    t.x_stride = s.from_stride;
    t.of_activations = true;
    t.scratch = scratch;
    k_.norm(t, first, std::min(first + kNormRows, s.rows));
  }

  NormRows norm_rows(const Norm& norm, const float* x, void* out, int64_t out_stride, int64_t padded) const {
    NormRows t{};
    t.x = x;
    t.x_stride = x_stride_;
    t.width = norm.width;
    t.index = norm.index;
    t.kept = norm.kept;
    t.eps = m_.eps;
    t.out = out;
    t.out_stride = out_stride;
    t.padded = padded;
    return t;
  }

  void do_attention(const Stage& s, int64_t task, float* scratch) {
    const Attention& a = s.block->attention;
    const int64_t heads = static_cast<int64_t>(a.value_widths.size());
    const int64_t part = task % s.parts, head = task / s.parts % heads, image = task / s.parts / heads;
    int64_t keys_before = 0, before = 0;  // columns of the heads before this one: of keys, and of values
    for (size_t h = 0; h < static_cast<size_t>(head); ++h) {
      keys_before += a.key_widths[h];
      before += a.value_widths[h];
    }
    const int64_t row = image * tokens_ * hidden_stride_, d = a.key_widths[static_cast<size_t>(head)];
    AttentionRows t{};
    t.q = activation(hidden_, row + keys_before);
    t.k = activation(hidden_, row + a.total_keys + keys_before);
    t.v = activation(hidden_, row + 2 * a.total_keys + before);
    t.stride = hidden_stride_;
    t.tokens = tokens_;
    t.key_width = d;
    t.value_width = a.value_widths[static_cast<size_t>(head)];
    t.scale = m_.scale;
    const int64_t block = round_up(divide_up(tokens_, s.parts), k_.row_step);
    t.first_row = std::min(part * block, tokens_);
    t.last_row = std::min(t.first_row + block, tokens_);
    t.out = activation(input_, image * tokens_ * input_stride_ + before);
    t.out_stride = input_stride_;
    t.padding = head + 1 == heads ? round_up(a.total_width, k_.input_step) - a.total_width : 0;
    t.scratch = scratch;
    if (a.head_norms) {
      t.q_weight = a.head_norms;
      t.q_bias = a.head_norms + d;
      t.k_weight = a.head_norms + 2 * d;
      t.k_bias = a.head_norms + 3 * d;
    }
    t.eps = m_.eps;
    const int64_t table = a.tables[static_cast<size_t>(head)];
    if (table >= 0) t.rotary = call_.rotary + table * tokens_ * d;
    if (t.first_row < t.last_row) k_.attention(t);
  }

  void pool(int64_t image) {
    const Norm all{m_.embed_dim, nullptr, m_.embed_dim};
    for (int64_t token = 0; token < m_.pooled; ++token) {
      const int64_t padding = token + 1 == m_.pooled ? round_up(m_.head.inputs, k_.input_step) - m_.head.inputs : 0;
      k_.norm(norm_rows(all, x_row(image * tokens_ + token),
                        activation(input_, image * input_stride_ + token * m_.embed_dim), 0,
                        m_.embed_dim + padding),
              0, 1);
    }
  }

  void copy_tokens_in(int64_t task) {
    for_rows(task, [&](int64_t row) {
      float* to = x_row(row);
      const int64_t from = (first_image_ * tokens_ + row) * m_.embed_dim;
      if (call_.input_bfloat16)
        for (int64_t j = 0; j < m_.embed_dim; ++j)
          to[j] = widen(static_cast<const BFloat16*>(call_.input)[from + j]);
      else
        std::memcpy(to, static_cast<const float*>(call_.input) + from, static_cast<size_t>(m_.embed_dim) * 4);
      for (int64_t j = m_.embed_dim; j < round_up(m_.embed_dim, kPanel); ++j) to[j] = 0;
    });
  }

  void copy_tokens_out(int64_t task) {
    for_rows(task, [&](int64_t row) { copy_row(x_row(row), m_.embed_dim, first_image_ * tokens_ + row); });
  }

  void add_offset(const Stage& s, int64_t task) {
    for_rows(task, [&](int64_t row) {
      for (int64_t j = 0; j < m_.embed_dim; ++j) x_row(row)[j] += s.block->offset[j];
    });
  }

  template <class F>
  void for_rows(int64_t task, const F& f) const {
    for (int64_t row = task * kNormRows; row < std::min((task + 1) * kNormRows, images_ * tokens_); ++row)
      f(row);
  }

  void copy_out(const float* from, int64_t width, int64_t image) {
    copy_row(from, width, first_image_ + image);
  }

  void copy_row(const float* from, int64_t width, int64_t row) {
    if (!call_.output_bfloat16) {
      std::memcpy(static_cast<float*>(call_.output) + row * width, from, static_cast<size_t>(width) * 4);
      return;
    }
    BFloat16* to = static_cast<BFloat16*>(call_.output) + row * width;
    for (int64_t j = 0; j < width; ++j) to[j] = narrow(from[j]);
  }

  float* x_row(int64_t row) const { return x_ + row * x_stride_; }
  char* activation(char* base, int64_t elements) const { return base + elements * k_.activation_bytes; }

  Workspace& w_;
  const Model& m_;
  const Kernels& k_;
  Call call_{};
  const int64_t threads_;
  const Blocks most_;
  int64_t tokens_ = 0, chunk_ = 0, images_ = 0, first_image_ = 0;
  int64_t x_stride_, input_stride_, hidden_stride_, logits_stride_, scratch_stride_;
  float *x_, *logits_, *scratch_;  // the residual stream; the head's results; a part for each worker
  char *input_, *hidden_;  // activations: what linear layers read; what qkv and GELU or SwiGLU put out
  std::atomic<int64_t> workers_{0};
};

void run_linear(Workspace& workspace, Dtype dtype, const Linear& layer, const void* x, int64_t rows,
                float* out, int64_t threads, Parallel parallel) {
  if (rows == 0) return;
  workspace.model.dtype = dtype;
  Engine(workspace, threads, second_level_cache()).run(layer, x, rows, out, parallel);
}

void run(Workspace& workspace, const Call& call, int64_t threads, Parallel parallel, int64_t cache) {
  if (call.images == 0) return;
  Engine(workspace, call, threads, cache).run(parallel);
}

}  // namespace vtp_cpu
