// Each kernel alone, on one piece of work.

#include "checks.h"

namespace test {
namespace {

double half_precision(const Kernels& k) { return k.activation_bytes == 2 ? kBFloat16Eps : 0.0; }

// -------------------------------------------------------------------------------------------------- linear

struct LinearCase {
  const char* name;
  Nonlinearity nonlinearity;
  bool bias, out_float, residual, in_place;
};
const LinearCase kLinearCases[] = {
    {"plain", Nonlinearity::kNone, false, false, false, false},
    {"bias", Nonlinearity::kNone, true, false, false, false},
    {"gelu", Nonlinearity::kGelu, true, false, false, false},
    {"float-out", Nonlinearity::kNone, true, true, false, false},
    {"residual-in-place", Nonlinearity::kNone, true, true, true, true},
    {"residual-elsewhere", Nonlinearity::kNone, true, true, true, false},
};
const LinearCase kSwiGluCases[] = {
    {"swiglu", Nonlinearity::kSwiGlu, true, false, false, false},
    {"swiglu-without-bias", Nonlinearity::kSwiGlu, false, false, false, false},
    {"swiglu-float-out", Nonlinearity::kSwiGlu, true, true, false, false},
};

// All that the kernel reads and writes. Behind an input of odd width lies what must not count.
struct LinearData {
  LinearData(const Kernels& k, Dtype dtype, const LinearCase& which, const int64_t (&size)[3], Random& random)
      : c(which),
        rows(size[0]),
        inputs(size[1]),
        outputs(size[2]),
        panels_width(round_up(outputs, kPanel)),
        a_stride(round_up(inputs, k.input_step) + kPanel),
        padding(c.out_float ? 0 : padding_of(k, c, panels_width)),
        out_stride(panels_width + padding + 3),
        residual_stride(c.in_place ? out_stride : panels_width + 5),
        out_bytes(c.out_float ? 4 : k.activation_bytes),
        a((rows - 1) * a_stride + round_up(inputs, k.input_step), k.activation_bytes),
        out((rows - 1) * out_stride + panels_width + padding, out_bytes),
        elsewhere((rows - 1) * residual_stride + panels_width, 4),
        bias(panels_width, 4),
        scratch(round_up(rows, k.row_step) * panels_width, 4),
        weight(random.numbers(inputs * outputs, dtype)),
        panels(panels_of(weight, inputs, outputs, dtype)) {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < inputs; ++j) a.set(i * a_stride + j, random.normal());
      for (int64_t j = inputs; j < round_up(inputs, k.input_step); ++j) a.set(i * a_stride + j, 1e30);
      for (int64_t j = 0; j < outputs; ++j) residual().set(i * residual_stride + j, random.normal());
    }
    for (int64_t j = 0; j < panels_width; ++j) bias.set(j, j < outputs ? random.normal() : 0.0);
  }

  // Behind the panels, of which SwiGLU leaves half.
  static int64_t padding_of(const Kernels& k, const LinearCase& c, int64_t panels_width) {
    const int64_t written = c.nonlinearity == Nonlinearity::kSwiGlu ? panels_width / 2 : panels_width;
    return round_up(written, k.input_step) - written;
  }

  Numbers& residual() { return c.in_place ? out : elsewhere; }

  vtp_cpu::LinearTile tile() {
    vtp_cpu::LinearTile t{};
    t.a = a.data();
    t.a_stride = a_stride;
    t.weight = panels.data();
    t.bias = c.bias ? bias.floats() : nullptr;
    t.inputs = inputs;
    t.rows = rows;
    t.columns = outputs;
    t.nonlinearity = c.nonlinearity;
    t.residual = c.residual ? residual().floats() : nullptr;
    t.residual_stride = residual_stride;
    t.out = out.data();
    t.out_float = c.out_float;
    t.out_stride = out_stride;
    t.padding = padding;
    t.scratch = scratch.floats();
    return t;
  }

  LinearCase c;
  int64_t rows, inputs, outputs, panels_width, a_stride, padding, out_stride, residual_stride, out_bytes;
  Numbers a, out, elsewhere, bias, scratch;
  std::vector<double> weight;
  std::vector<char> panels;
};

// A W^T + bias of one element, and the sum of the sizes of what is added.
std::pair<double, double> product(const LinearData& data, int64_t row, int64_t column) {
  double sum = data.c.bias ? data.bias.get(column) : 0.0, size = std::fabs(sum);
  for (int64_t j = 0; j < data.inputs; ++j) {
    const double x =
        data.a.get(row * data.a_stride + j) * data.weight[static_cast<size_t>(column * data.inputs + j)];
    sum += x;
    size += std::fabs(x);
  }
  return {sum, size};
}

// The next layer reads it, and has weights of zero there.
void expect_finite_behind(const LinearData& data, int64_t row, int64_t width, const Kernels& k,
                          const std::string& name) {
  for (int64_t n = width; n < round_up(width, k.input_step) && data.out_bytes == 2; ++n)
    expect(std::isfinite(data.out.get(row * data.out_stride + n)), name + ": a row ends in no number");
}

void check_linear(const Kernels& k, Dtype dtype, const LinearCase& c, const int64_t (&size)[3],
                  Random& random) {
  LinearData data(k, dtype, c, size, random);
  const Numbers before = data.residual();
  k.linear(data.tile());
  const std::string name =
      std::string(k.name) + " linear " + c.name + " " + text({size[0], size[1], size[2]});
  const double roundings = 8 + 2 * std::sqrt(static_cast<double>(data.inputs));
  for (int64_t i = 0; i < data.rows; ++i) {
    for (int64_t n = 0; n < data.outputs; ++n) {
      const auto [sum, sizes] = product(data, i, n);
      const double added = c.residual ? before.get(i * data.residual_stride + n) : 0.0;
      const double expected = (c.nonlinearity == Nonlinearity::kGelu ? gelu(sum) : sum) + added;
      const double stored = data.out_bytes == 2 ? kBFloat16Eps * std::fabs(expected) : 0.0;
      expect_close(data.out.get(i * data.out_stride + n), expected,
                   kFloatEps * roundings * (sizes + std::fabs(added)) + stored, name);
    }
    for (int64_t n = data.panels_width + data.padding; n < data.out_stride && i + 1 < data.rows; ++n)
      expect(data.out.is_untouched(i * data.out_stride + n), name + ": wrote between two rows");
    expect_finite_behind(data, i, data.outputs, k, name);
  }
}

// `columns` is of the product: pairs of panels.
void check_swiglu(const Kernels& k, Dtype dtype, const LinearCase& c, const int64_t (&size)[3],
                  Random& random) {
  LinearData data(k, dtype, c, size, random);
  k.linear(data.tile());
  const std::string name =
      std::string(k.name) + " linear " + c.name + " " + text({size[0], size[1], size[2]});
  const double roundings = 8 + 2 * std::sqrt(static_cast<double>(data.inputs));
  for (int64_t i = 0; i < data.rows; ++i) {
    for (int64_t n = 0; n < data.outputs / 2; ++n) {
      const int64_t column = n / kPanel * 2 * kPanel + n % kPanel;
      const auto [gate, gate_sizes] = product(data, i, column);
      const auto [x, sizes] = product(data, i, column + kPanel);
      const double expected = silu(gate) * x;
      const double stored = data.out_bytes == 2 ? kBFloat16Eps * std::fabs(expected) : 0.0;
      expect_close(
          data.out.get(i * data.out_stride + n), expected,  // SiLU is steeper than 1, by a tenth
          kFloatEps * roundings * (1.1 * gate_sizes * std::fabs(x) + std::fabs(silu(gate)) * sizes) + stored,
          name);
    }
    expect_finite_behind(data, i, data.outputs / 2, k, name);
    for (int64_t n = data.outputs / 2 + data.padding; n < data.out_stride && i + 1 < data.rows; ++n)
      expect(data.out.is_untouched(i * data.out_stride + n), name + ": wrote behind a row");
  }
}

// SiLU of a fine grid, as biases of a layer whose weights are zero, times 1.
void check_silu(const Kernels& k, Dtype dtype) {
  const int64_t count = 4096;
  Random random(0);
  LinearData data(k, dtype, {"", Nonlinearity::kSwiGlu, true, true, false, false}, {1, 1, 2 * count}, random);
  data.panels.assign(data.panels.size(), '\0');
  const double odd[] = {NAN,   INFINITY, -1e4,  1e30,  -1e30, -1e-30,   0.0,
                        -87.3, -88.0,    -88.5, -88.8, 88.5,  -INFINITY};
  for (int64_t j = 0; j < count; ++j) {
    const int64_t at = j / kPanel * 2 * kPanel + j % kPanel;
    data.bias.set(at, j < 13 ? odd[j] : static_cast<double>(j - count / 2) / 64);
    data.bias.set(at + kPanel, 1.0);
  }
  k.linear(data.tile());
  for (int64_t j = 0; j < count; ++j) {
    const double x = data.bias.get(j / kPanel * 2 * kPanel + j % kPanel), got = data.out.get(j);
    const std::string name = std::string(k.name) + " silu of " + std::to_string(x);
    if (x == INFINITY)
      expect(got == x, name);
    else  // of minus infinity NaN, as of an overflow
      expect_close(got, silu(x), 2e-7 * std::fabs(x) + 1e-37, name);
  }
}

// GELU of a fine grid, as biases of a layer whose weights are zero.
void check_gelu(const Kernels& k, Dtype dtype) {
  const int64_t count = 4096;
  Random random(0);
  LinearData data(k, dtype, {"", Nonlinearity::kGelu, true, true, false, false}, {1, 1, count}, random);
  data.panels.assign(data.panels.size(), '\0');
  for (int64_t j = 0; j < count; ++j) data.bias.set(j, static_cast<double>(j - count / 2) / 128);
  const double odd[] = {NAN, INFINITY, -1e4, 1e30, -1e-30, 0.0};
  for (int64_t j = 0; j < 6; ++j) data.bias.set(j, odd[j]);
  k.linear(data.tile());
  for (int64_t j = 0; j < count; ++j) {
    const double x = data.bias.get(j), got = data.out.get(j);
    const std::string name = std::string(k.name) + " gelu of " + std::to_string(x);
    if (std::isinf(x))
      expect(got == x, name);
    else
      expect_close(got, gelu(x), 2e-7 * std::fabs(x) + 1e-37, name);
  }
}

// ---------------------------------------------------------------------------------------------------- norm

void expect_norm(const double* x, const vtp_cpu::NormRows& t, const Numbers& out, int64_t at, double stored,
                 const std::string& name) {
  std::vector<double> row(x, x + t.width);
  double largest = 0, square = 0;
  for (double value : row) largest = std::fmax(largest, std::fabs(value));
  normalize(row.data(), t.width, static_cast<double>(t.eps));
  for (double value : row) square += value * value / static_cast<double>(t.width);
  // 1 / sqrt(var + eps): how much larger results, and with them the roundings of x, are than x.
  const double rstd = std::sqrt((1 - std::fmin(square, 1.0) + 1e-12) / static_cast<double>(t.eps));
  for (int64_t j = 0; j < t.padded; ++j) {
    const bool kept = j < t.kept;
    const double expected = kept ? row[static_cast<size_t>(t.index ? t.index[j] : j)] : 0.0;
    const double allowed = 4 * kFloatEps * largest * rstd + (16 * kFloatEps + stored) * std::fabs(expected);
    expect_close(out.get(at + j), expected, kept ? allowed : 0.0, name);
  }
}

void check_norm(const Kernels& k, int64_t width, int64_t kept, double offset, bool of_activations,
                Random& random) {
  const int64_t rows = 3, x_stride = width + 5, padded = round_up(kept, k.input_step), out_stride = padded + 3;
  Numbers x((rows - 1) * x_stride + width, of_activations ? k.activation_bytes : 4), room(width, 4), out((rows - 1) * out_stride + padded, k.activation_bytes);
  std::vector<int32_t> index(static_cast<size_t>(kept));
  for (int32_t& j : index) j = static_cast<int32_t>(random.below(width));
  std::vector<double> numbers(static_cast<size_t>(rows * width));
  for (int64_t i = 0; i < rows * width; ++i) {
    const int64_t at = i / width * x_stride + i % width;
    x.set(at, random.normal() + offset);
    numbers[static_cast<size_t>(i)] = x.get(at);
  }
  const vtp_cpu::NormRows t = {x.data(), x_stride, width,      kept < width ? index.data() : nullptr,
                               kept,     1e-5f,    out.data(), out_stride,
                               padded,   of_activations, room.floats()};
  k.norm(t, 0, 1);  // in two parts, as two tasks do it
  k.norm(t, 1, rows);
  for (int64_t i = 0; i < rows; ++i)
    expect_norm(numbers.data() + i * width, t, out, i * out_stride, half_precision(k),
                std::string(k.name) + " norm " + text({width, kept, of_activations}));
}

// ----------------------------------------------------------------------------------------------- attention

// The first of two heads; the second has keys of another width and one value, so that other numbers lie on
// either side of everything.
struct AttentionData {
  AttentionData(const Kernels& k, int64_t n, int64_t key_width, int64_t value_width, bool norms, bool rotate,
                Random& random)
      : tokens(n),
        d(key_width),
        w(value_width),
        head_norms(norms),
        rotated(rotate),
        keys(d + 3),
        total(2 * keys + w + 1),
        stride(round_up(total, kPanel) + kPanel),
        padding(round_up(w, k.input_step) - w),
        out_stride(w + padding + 3),
        qkv((tokens - 1) * stride + total, k.activation_bytes),
        out((tokens - 1) * out_stride + w + padding, k.activation_bytes),
        norm(4 * d, 4),
        rotary(tokens * d, 4),
        scratch(k.attention_scratch(tokens, d, w), 4) {
    for (int64_t i = 0; i < tokens; ++i)
      for (int64_t j = 0; j < total; ++j) qkv.set(i * stride + j, random.normal());
    for (int64_t j = 0; j < 4 * d; ++j) norm.set(j, random.normal());
    for (int64_t j = 0; j < tokens * (d / 2); ++j) {
      const int64_t at = j / (d / 2) * d + j % (d / 2);
      const double angle = 3 * random.normal();
      rotary.set(at, std::cos(angle));
      rotary.set(at + d / 2, std::sin(angle));
    }
  }

  vtp_cpu::AttentionRows rows(int64_t first, int64_t last) {
    vtp_cpu::AttentionRows t{};
    t.q = qkv.data();
    t.k = qkv.data(keys);
    t.v = qkv.data(2 * keys);
    t.stride = stride;
    t.tokens = tokens;
    t.key_width = d;
    t.value_width = w;
    t.scale = 0.25f;
    t.first_row = first;
    t.last_row = last;
    t.out = out.data();
    t.out_stride = out_stride;
    t.padding = padding;
    t.scratch = scratch.floats();
    t.eps = 1e-5f;
    if (head_norms) {
      t.q_weight = norm.floats();
      t.q_bias = norm.floats(d);
      t.k_weight = norm.floats(2 * d);
      t.k_bias = norm.floats(3 * d);
    }
    if (rotated) t.rotary = rotary.floats();
    return t;
  }

  // Queries (part 0) or keys (part 1) [tokens][d], with their LayerNorm and rotation.
  std::vector<double> prepared(int64_t part) {
    std::vector<double> out;
    for (int64_t i = 0; i < tokens; ++i) {
      std::vector<double> row;
      for (int64_t j = 0; j < d; ++j) row.push_back(qkv.get(i * stride + part * keys + j));
      if (head_norms) normalize(row.data(), d, static_cast<double>(1e-5f));
      for (int64_t j = 0; j < d && head_norms; ++j)
        row[static_cast<size_t>(j)] =
            row[static_cast<size_t>(j)] * norm.get(2 * part * d + j) + norm.get((2 * part + 1) * d + j);
      if (rotated) rotate(row.data(), rotary.floats(i * d), d);
      out.insert(out.end(), row.begin(), row.end());
    }
    return out;
  }

  // How large they are: of a rotated pair, each as large as both together, which its rounding is relative to.
  std::vector<double> sizes(const std::vector<double>& rows) const {
    std::vector<double> out;
    for (int64_t i = 0; i < tokens * d; ++i) {
      const int64_t other = i % d < d / 2 ? i + d / 2 : i - d / 2;
      out.push_back(rotated ? std::hypot(rows[static_cast<size_t>(i)], rows[static_cast<size_t>(other)])
                            : std::fabs(rows[static_cast<size_t>(i)]));
    }
    return out;
  }

  int64_t tokens, d, w;
  bool head_norms, rotated;
  int64_t keys, total, stride, padding, out_stride;  // keys: columns of both heads
  Numbers qkv, out, norm, rotary, scratch;
};

// The largest of sum |q| |k| scale over all keys, of their sizes: roundings of scores are relative to it.
double largest_score(const double* q, const std::vector<double>& keys, int64_t d) {
  double largest = 0;
  for (size_t key = 0; key < keys.size(); key += static_cast<size_t>(d)) {
    double size = 0;
    for (size_t j = 0; j < static_cast<size_t>(d); ++j) size += q[j] * keys[key + j] * 0.25;
    largest = std::fmax(largest, size);
  }
  return largest;
}

void check_attention(const Kernels& k, int64_t tokens, int64_t d, int64_t w, bool norms, bool rotated,
                     Random& random) {
  AttentionData data(k, tokens, d, w, norms, rotated, random);
  const int64_t middle = (tokens + 1) / 2;  // in two parts, as two tasks do it
  k.attention(data.rows(0, middle));
  if (middle < tokens) k.attention(data.rows(middle, tokens));

  const std::string name = std::string(k.name) + " attention " + text({tokens, d, w}) +
                           (norms ? " norms" : "") + (rotated ? " rotary" : "");
  const std::vector<double> q = data.prepared(0), keys = data.prepared(1);
  const std::vector<double> q_sizes = data.sizes(q), key_sizes = data.sizes(keys);
  const double stored = half_precision(k), root = std::sqrt(static_cast<double>(d));
  const double of_scores =
      kFloatEps * (2 * root + 12 + (rotated ? 9 : 0)) + (norms || rotated ? 2 * stored : 0.0);
  const double of_sums = kFloatEps * (2 * std::sqrt(static_cast<double>(tokens)) + 16) + stored;
  for (int64_t i = 0; i < tokens; ++i) {
    const double* query = &q[static_cast<size_t>(i * d)];
    const std::vector<double> p = softmax_weights(query, keys.data(), d, tokens, d, 0.25);
    const double relative =
        of_sums + 2 * of_scores * largest_score(&q_sizes[static_cast<size_t>(i * d)], key_sizes, d);
    for (int64_t j = 0; j < w + data.padding; ++j) {
      double expected = 0, size = 0;
      for (int64_t other = 0; other < tokens && j < w; ++other) {
        const double x = p[static_cast<size_t>(other)] * data.qkv.get(other * data.stride + 2 * data.keys + j);
        expected += x;
        size += std::fabs(x);
      }
      expect_close(data.out.get(i * data.out_stride + j), expected,
                   relative * size + stored * std::fabs(expected), name);
    }
  }
}

// ------------------------------------------------------------------------------------------------- patches

// The second row of patches of an image that ends with it.
void check_patches(const Kernels& k, bool bfloat16, const int64_t (&size)[4], Random& random) {
  const auto [channels, patch_height, patch_width, columns] = size;
  const int64_t height = 2 * patch_height, width = columns * patch_width, pixels = channels * height * width;
  const int64_t inputs = channels * patch_height * patch_width, padded = round_up(inputs, k.input_step),
                stride = padded + 3;
  Numbers image(pixels, bfloat16 ? 2 : 4), out((columns - 1) * stride + padded, k.activation_bytes);
  for (int64_t i = 0; i < pixels; ++i) image.set(i, random.normal());
  k.patches({image.data(patch_height * width), bfloat16, channels, height, width, patch_height, patch_width,
             out.data(), stride, padded});
  const Dtype dtype = k.activation_bytes == 2 ? Dtype::kBFloat16 : Dtype::kFloat32;
  for (int64_t p = 0; p < columns; ++p)
    for (int64_t j = 0; j < padded; ++j) {
      const int64_t c = j / (patch_height * patch_width), y = j / patch_width % patch_height,
                    x = j % patch_width;
      const int64_t from = (c * height + patch_height + y) * width + p * patch_width + x;
      const double expected = j < inputs ? static_cast<double>(rounded(dtype, image.get(from))) : 0.0;
      expect_close(out.get(p * stride + j), expected, 0.0,
                   std::string(k.name) + " patches " + text({channels, patch_height, patch_width, columns}));
    }
}

// --------------------------------------------------------------------------------------------------- gates

struct GateData {
  GateData(bool half, int64_t rows, int64_t columns, Random& random)
      : weight(rows * columns, 4),
        gate(columns, 4),
        sums(columns, 4),
        product(rows * columns, half ? 2 : 4),
        out(rows * columns, 4) {
    for (Numbers* each : {&weight, &gate, &sums, &product})
      for (int64_t i = 0; i < each->size(); ++i) each->set(i, random.normal());
  }
  Numbers weight, gate, sums, product, out;
};

void check_fold(const Kernels& k, bool half, int64_t rows, int64_t columns, Random& random) {
  GateData data(half, rows, columns, random);
  k.fold({data.weight.floats(), data.gate.floats(), rows, columns, data.product.data(), half});
  for (int64_t i = 0; i < rows * columns; ++i) {
    const double expected =
        rounded(half ? Dtype::kBFloat16 : Dtype::kFloat32, data.weight.get(i) * data.gate.get(i % columns));
    expect_close(data.product.get(i), expected, 0.0, std::string(k.name) + " fold " + text({rows, columns}));
  }
}

enum class Into { kNothing, kElsewhere, kProduct };

void check_unfold(const Kernels& k, bool half, Into into, int64_t rows, int64_t columns, Random& random) {
  GateData data(half, rows, columns, random);
  const GateData before = data;
  Numbers& out = into == Into::kProduct ? data.product : data.out;
  k.unfold({data.product.data(), half, data.weight.floats(), data.gate.floats(), rows, columns,
            data.sums.floats(), into == Into::kNothing ? nullptr : out.floats()});
  const std::string name = std::string(k.name) + " unfold " + text({rows, columns});
  for (int64_t column = 0; column < columns; ++column) {
    double sum = before.sums.get(column), size = std::fabs(sum);
    for (int64_t i = column; i < rows * columns; i += columns) {
      const double g = before.product.get(i),
                   expected = rounded(Dtype::kFloat32, g * before.gate.get(column));
      sum += g * before.weight.get(i);
      size += std::fabs(g * before.weight.get(i));
      if (into != Into::kNothing) expect_close(out.get(i), expected, 0.0, name);
    }
    const double roundings = 4 + 2 * std::sqrt(static_cast<double>(rows));
    expect_close(data.sums.get(column), sum, kFloatEps * roundings * size, name);
  }
}

}  // namespace

void check_kernels(const Kernels& k, Dtype dtype) {
  k.begin();
  Random random(1);
  const int64_t widths[] = {1, 2, 15, 16, 17, 31, 37, 61, 115};
  int64_t at = 0;  // the case, of those of a layer
  for (const LinearCase& c : kLinearCases) {
    for (int64_t i = 0; i < 9; ++i)
      for (int64_t j = 0; j < 9; ++j)
        if (has_its_turn(at + i + j, 4))
          check_linear(k, dtype, c, {1 + random.below(13), widths[i], widths[j]}, random);
    for (int64_t rows = 1; rows <= 26; ++rows)
      if (has_its_turn(at + rows, 3)) check_linear(k, dtype, c, {rows, 37, 45}, random);
    // More than one block of rows, the last one short, over several chunks of inputs.
    if (has_its_turn(at, 3)) check_linear(k, dtype, c, {50, 545, 37}, random);
    const int64_t chunks[] = {383, 384, 385, 769, 1153};
    for (int64_t i = 0; i < 5; ++i)
      if (has_its_turn(at + i, 3)) check_linear(k, dtype, c, {5, chunks[i], 23}, random);
    for (int64_t outputs = 1; outputs <= 64; ++outputs)
      if (has_its_turn(at + outputs, 3)) check_linear(k, dtype, c, {7, 9, outputs}, random);
    ++at;
  }
  at = 0;
  for (const LinearCase& c : kSwiGluCases) {
    for (int64_t i = 0; i < 9; ++i)
      for (int64_t columns : {32, 64, 96, 160})
        if (has_its_turn(at + i + columns / 32, 3))
          check_swiglu(k, dtype, c, {1 + random.below(13), widths[i], columns}, random);
    for (int64_t rows = 1; rows <= 26; ++rows)
      if (has_its_turn(at + rows, 3)) check_swiglu(k, dtype, c, {rows, 37, 64}, random);
    if (has_its_turn(at, 3)) check_swiglu(k, dtype, c, {5, 769, 64}, random);
    if (has_its_turn(at + 1, 3)) check_swiglu(k, dtype, c, {50, 545, 64}, random);
    ++at;
  }
  check_gelu(k, dtype);
  check_silu(k, dtype);
  for (int64_t width : {1, 2, 15, 16, 17, 37, 61, 64, 115, 129})
    for (int64_t kept : {int64_t{1}, (width + 1) / 2, width})
      for (double offset : {0.0, 30.0})
        for (bool of_activations : {false, true}) check_norm(k, width, kept, offset, of_activations, random);
  const int64_t tokens[] = {1, 2, 17, 37, 49, 115}, key_widths[] = {1, 2, 15, 37, 64},
                value_widths[] = {1, 15, 16, 37};
  for (int64_t n = 0; n < 6; ++n)
    for (int64_t d = 0; d < 5; ++d)
      for (int64_t w = 0; w < 4; ++w)
        for (bool norms : {false, true})
          if ((d > 0 || !norms) && has_its_turn(n + d + w + norms, 3))
            check_attention(k, tokens[n], key_widths[d], value_widths[w], norms, false, random);
  for (int64_t n : {1, 3, 17, 49})
    for (int64_t d : {2, 6, 16, 34, 64})
      for (bool norms : {false, true}) check_attention(k, n, d, 15, norms, true, random);
  for (bool bfloat16 : {false, true})
    for (int64_t columns : {1, 2, 5}) {
      check_patches(k, bfloat16, {1, 1, 1, columns}, random);
      check_patches(k, bfloat16, {3, 2, 5, columns}, random);
      check_patches(k, bfloat16, {3, 7, 5, columns}, random);
    }
  for (bool half : {false, true})
    for (int64_t columns : {1, 7, 16, 61, 115})
      for (int64_t rows : {1, 3, 32}) {
        check_fold(k, half, rows, columns, random);
        for (Into into : {Into::kNothing, Into::kElsewhere, Into::kProduct})
          if (!half || into != Into::kProduct) check_unfold(k, half, into, rows, columns, random);
      }
  k.end();
}

}  // namespace test
