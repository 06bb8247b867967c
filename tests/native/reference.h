// The mathematics of the kernels in double precision, one loop each, and what tests of them share.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "kernels.h"

namespace test {

using vtp_cpu::Dtype;
using vtp_cpu::Kernels;
using vtp_cpu::kPanel;
using vtp_cpu::Nonlinearity;
using vtp_cpu::round_up;

// The largest relative error of one rounding.
constexpr double kFloatEps = 1.0 / (1 << 24), kBFloat16Eps = 1.0 / (1 << 8);

// ------------------------------------------------------------------------------------------------- failures

inline int& failures() {
  static int count = 0;
  return count;
}

inline void expect(bool good, const std::string& what) {
  if (good || ++failures() > 20) return;  // of thousands of wrong numbers the first few say it all
  std::printf("FAILED: %s\n", what.c_str());
}

// That |got - expected| <= allowed, and that NaN is where it belongs.
inline void expect_close(double got, double expected, double allowed, const std::string& where) {
  const bool good = std::isnan(expected) ? std::isnan(got) : std::fabs(got - expected) <= allowed;
  if (!good)
    expect(false, where + ": got " + std::to_string(got) + ", expected " + std::to_string(expected) +
                      ", error " + std::to_string(std::fabs(got - expected) / allowed) +
                      " times what is allowed");
}

// --------------------------------------------------------------------------------------------------- numbers

inline uint16_t to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline float from_bfloat16(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}
// The nearest number that the dtype has.
inline float rounded(Dtype dtype, double x) {
  const float single = static_cast<float>(x);
  return dtype == Dtype::kFloat32 ? single : from_bfloat16(to_bfloat16(single));
}

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  double normal() { return distribution_(engine_); }
  int64_t below(int64_t n) { return static_cast<int64_t>(engine_() % static_cast<uint64_t>(n)); }
  // `count` numbers that `dtype` has, of the given scale.
  std::vector<double> numbers(int64_t count, Dtype dtype, double scale = 1.0) {
    std::vector<double> out(static_cast<size_t>(count));
    for (double& x : out) x = rounded(dtype, normal() * scale);
    return out;
  }

 private:
  std::mt19937_64 engine_;
  std::normal_distribution<double> distribution_;
};

// Memory of exactly so many numbers, float32 or bfloat16, each of them NaN at first.
class Numbers {
 public:
  Numbers(int64_t count, int64_t bytes)
      : bytes_(bytes), memory_(static_cast<size_t>(count * bytes), '\xff') {}
  void* data(int64_t i = 0) { return memory_.data() + i * bytes_; }
  float* floats(int64_t i = 0) { return reinterpret_cast<float*>(memory_.data()) + i; }
  void set(int64_t i, double x) {
    const float single = static_cast<float>(x);
    const uint16_t half = to_bfloat16(single);
    std::memcpy(data(i), bytes_ == 4 ? static_cast<const void*>(&single) : &half,
                static_cast<size_t>(bytes_));
  }
  double get(int64_t i) const {
    const char* from = memory_.data() + i * bytes_;
    float single;
    uint16_t half;
    std::memcpy(bytes_ == 4 ? static_cast<void*>(&single) : &half, from, static_cast<size_t>(bytes_));
    return bytes_ == 4 ? single : from_bfloat16(half);
  }
  bool is_untouched(int64_t i) const {
    for (int64_t byte = i * bytes_; byte < (i + 1) * bytes_; ++byte)
      if (memory_[static_cast<size_t>(byte)] != '\xff') return false;
    return true;
  }
  int64_t bytes() const { return bytes_; }
  int64_t size() const { return static_cast<int64_t>(memory_.size()) / bytes_; }
  const std::vector<char>& memory() const { return memory_; }

 private:
  int64_t bytes_;
  std::vector<char> memory_;
};

// ------------------------------------------------------------------------------------------------- functions

inline double gelu(double x) { return 0.5 * x * std::erfc(-x * std::sqrt(0.5)); }

inline double silu(double x) { return x / (1 + std::exp(-x)); }

// Pairs (x[i], x[i + width / 2]) turned by the angles of `table`: cosines [width / 2], then sines. In place.
template <class Table>
inline void rotate(double* x, const Table& table, int64_t width) {
  for (int64_t i = 0; i < width / 2; ++i) {
    const double a = x[i], b = x[i + width / 2], c = table[i], s = table[i + width / 2];
    x[i] = a * c - b * s;
    x[i + width / 2] = b * c + a * s;
  }
}

// (x - mean) / sqrt(var + eps), in place.
inline void normalize(double* x, int64_t width, double eps) {
  double mean = 0, variance = 0;
  for (int64_t j = 0; j < width; ++j) mean += x[j] / static_cast<double>(width);
  for (int64_t j = 0; j < width; ++j) variance += (x[j] - mean) * (x[j] - mean) / static_cast<double>(width);
  for (int64_t j = 0; j < width; ++j) x[j] = (x[j] - mean) / std::sqrt(variance + eps);
}

// One query's weights of all keys: softmax(scale q k^T), q [d], k [tokens][stride].
inline std::vector<double> softmax_weights(const double* q, const double* k, int64_t stride, int64_t tokens,
                                           int64_t d, double scale) {
  std::vector<double> out(static_cast<size_t>(tokens), 0.0);
  double top = -INFINITY, sum = 0;
  for (int64_t t = 0; t < tokens; ++t) {
    double& score = out[static_cast<size_t>(t)];
    for (int64_t j = 0; j < d; ++j) score += scale * q[j] * k[t * stride + j];
    top = std::fmax(top, score);
  }
  for (double& x : out) sum += x = std::exp(x - top);
  for (double& x : out) x /= sum;
  return out;
}

// A weight [outputs][inputs] in panels; see kernels.h.
inline std::vector<char> panels_of(const std::vector<double>& weight, int64_t inputs, int64_t outputs,
                                   Dtype dtype) {
  const int64_t step = dtype == Dtype::kFloat32 ? 1 : 2, bytes = vtp_cpu::panel_bytes(dtype, inputs);
  std::vector<char> out(static_cast<size_t>(vtp_cpu::divide_up(outputs, kPanel) * bytes), 0);
  for (int64_t n = 0; n < outputs; ++n)
    for (int64_t k = 0; k < inputs; ++k) {
      char* to =
          out.data() + n / kPanel * bytes + ((k / step * kPanel + n % kPanel) * step + k % step) * (4 / step);
      const float x = static_cast<float>(weight[static_cast<size_t>(n * inputs + k)]);
      const uint16_t half = to_bfloat16(x);
      std::memcpy(to, step == 1 ? static_cast<const void*>(&x) : &half, static_cast<size_t>(4 / step));
    }
  return out;
}

}  // namespace test
