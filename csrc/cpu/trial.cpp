#include "trial.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>

#include "bfloat16.h"

namespace vtp_cpu {
namespace {

constexpr double kClearly = 1.1;  // times as fast
constexpr int kRounds = 12;       // in which kernels take turns

// Memory of exactly so many activations, and numbers that float32 and bfloat16 both have.
class Activations {
 public:
  Activations(const Kernels& k, int64_t count) : bytes_(k.activation_bytes), memory_(count * bytes_) {}
  void* at(int64_t i = 0) { return memory_.data() + i * bytes_; }
  void set(int64_t i, BFloat16 x) {
    const float wide = widen(x);
    std::memcpy(at(i), bytes_ == 4 ? static_cast<const void*>(&wide) : &x, static_cast<size_t>(bytes_));
  }
  std::vector<float> floats() const {
    std::vector<float> out(memory_.size() / static_cast<size_t>(bytes_));
    for (size_t i = 0; i < out.size(); ++i) {
      const char* from = memory_.data() + i * static_cast<size_t>(bytes_);
      if (bytes_ == 4) {
        std::memcpy(&out[i], from, 4);
      } else {
        BFloat16 x;
        std::memcpy(&x, from, 2);
        out[i] = widen(x);
      }
    }
    return out;
  }

 private:
  int64_t bytes_;
  std::vector<char> memory_;
};

class Random {
 public:
  BFloat16 next() {  // in (-1, 1)
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return narrow(static_cast<float>(static_cast<int32_t>(state_ >> 32)) * 0x1p-31f);
  }

 private:
  uint64_t state_ = 1;
};

// One layer as models have it, with a last row, input and column that fill no tile.
class Layer {
 public:
  explicit Layer(const Kernels& k)
      : k_(k),
        a_(k, kRows * kStride),
        weight_(static_cast<size_t>(round_up(kColumns, kPanel) / kPanel *
                                    panel_bytes(Dtype::kBFloat16, kInputs) / 2)),
        bias_(round_up(kColumns, kPanel), 0.25f),
        out_(static_cast<size_t>(kRows * round_up(kColumns, kPanel))),
        scratch_(static_cast<size_t>(round_up(kRows, k.row_step) * round_up(kColumns, kPanel))) {
    Random random;
    for (int64_t i = 0; i < kRows * kStride; ++i)
      a_.set(i, i % kStride < kInputs ? random.next() : BFloat16{0});
    for (int64_t n = 0; n < kColumns; ++n)
      for (int64_t i = 0; i < kInputs; ++i)
        weight_[static_cast<size_t>(n / kPanel * panel_bytes(Dtype::kBFloat16, kInputs) / 2 +
                                    (i / 2 * kPanel + n % kPanel) * 2 + i % 2)] = random.next();
  }

  const std::vector<float>& run() {
    LinearTile t{};
    t.a = a_.at();
    t.a_stride = kStride;
    t.weight = weight_.data();
    t.bias = bias_.data();
    t.inputs = kInputs;
    t.rows = kRows;
    t.columns = kColumns;
    t.out = out_.data();
    t.out_float = true;
    t.out_stride = round_up(kColumns, kPanel);
    t.scratch = scratch_.data();
    k_.linear(t);
    return out_;
  }

 private:
  static constexpr int64_t kRows = 150, kInputs = 391, kColumns = 61, kStride = 480;
  const Kernels& k_;
  Activations a_;
  std::vector<BFloat16> weight_;
  std::vector<float> bias_, out_, scratch_;
};

// One head.
std::vector<float> attention(const Kernels& k) {
  constexpr int64_t tokens = 37, d = 20, w = 24, stride = 2 * d + w;
  Activations qkv(k, tokens * stride), out(k, tokens * w);
  std::vector<float> scratch(static_cast<size_t>(k.attention_scratch(tokens, d, w)));
  Random random;
  for (int64_t i = 0; i < tokens * stride; ++i) qkv.set(i, random.next());
  AttentionRows t{};
  t.q = qkv.at();
  t.k = qkv.at(d);
  t.v = qkv.at(2 * d);
  t.stride = stride;
  t.tokens = t.last_row = tokens;
  t.key_width = d;
  t.value_width = w;
  t.scale = 1;
  t.out = out.at();
  t.out_stride = w;
  t.scratch = scratch.data();
  k.attention(t);
  return out.floats();
}

// That no number is further from what is expected than `allowed` times the largest.
bool close(const std::vector<float>& got, const std::vector<float>& expected, float allowed) {
  float largest = 0;
  for (float x : expected) largest = std::max(largest, std::fabs(x));
  for (size_t i = 0; i < got.size(); ++i)
    if (!(std::fabs(got[i] - expected[i]) <= allowed * largest)) return false;  // NaN too
  return true;
}

struct Candidate {
  explicit Candidate(const Kernels& k) : kernels(&k), layer(k) {}

  const Kernels* kernels;
  Layer layer;
  std::vector<float> first{};  // what the first run gave
  bool right = true;
  double seconds = INFINITY;  // the least of all runs

  void run() {
    kernels->begin();
    const auto start = std::chrono::steady_clock::now();
    const std::vector<float>& out = layer.run();
    const std::chrono::duration<double> time = std::chrono::steady_clock::now() - start;
    kernels->end();
    if (first.empty())  // which also wakes what was asleep: not timed
      first = out;
    else
      seconds = std::min(seconds, time.count());
    right = right && std::memcmp(first.data(), out.data(), out.size() * 4) == 0;
  }
  // The sums differ by their order alone, attention by the roundings of its weights and results.
  void compare(const Candidate& plainest) {
    right = right && close(first, plainest.first, 1e-5f);
    plainest.kernels->begin();
    const std::vector<float> expected = attention(*plainest.kernels);
    plainest.kernels->end();
    kernels->begin();
    right = right && close(attention(*kernels), expected, 2e-2f);
    kernels->end();
  }
};

std::string times(double ratio) {
  char out[32];
  std::snprintf(out, sizeof(out), "%.1fx", ratio);
  return out;
}

}  // namespace

bool compute_the_same(const Kernels& kernels, const Kernels& as) {
  Candidate plainest(as), other(kernels);
  plainest.run();
  for (int round = 0; round <= kRounds; ++round) other.run();
  other.compare(plainest);
  return other.right;
}

Choice fastest(const std::vector<const Kernels*>& candidates) {
  std::vector<Candidate> tried;
  for (const Kernels* k : candidates) tried.emplace_back(*k);
  for (int round = 0; round <= kRounds; ++round)
    for (Candidate& c : tried) c.run();
  std::string wrong;
  for (size_t i = 1; i < tried.size(); ++i) {
    tried[i].compare(tried[0]);
    if (!tried[i].right) wrong += std::string("; ") + tried[i].kernels->name + " failed its self-test";
  }
  const Candidate* best = nullptr;
  for (auto c = tried.rbegin(); c != tried.rend(); ++c)
    if (c->right && (!best || c->seconds * kClearly < best->seconds)) best = &*c;
  if (!best) best = &tried[0];  // which has no other to be compared with
  std::string why;
  for (const Candidate& c : tried)
    if (&c != best && c.right)
      why += (why.empty() ? "" : ", ") + times(c.seconds / best->seconds) + " as fast as " + c.kernels->name;
  return {best->kernels, (why.empty() ? "" : why + " in a trial") + wrong};
}

}  // namespace vtp_cpu
