// The weight side of gated_linear in training: fold and unfold (see vtp_kernels/gated_linear.py).

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "kernels.h"

namespace vtp_cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Rows of a task. Sums are made by such blocks and then of them: the same for any number of threads.
constexpr int64_t kRows = 32;

void expect_matrix(const Tensor& t, const char* name, bool may_be_bfloat16, int64_t rows, int64_t columns) {
  const bool dtype =
      t.scalar_type() == ScalarType::Float || (may_be_bfloat16 && t.scalar_type() == ScalarType::BFloat16);
  STD_TORCH_CHECK(
      t.is_cpu() && dtype && t.is_contiguous() && t.dim() == 2 && t.size(0) == rows && t.size(1) == columns,
      std::string(name) + ": expected a contiguous float32" + (may_be_bfloat16 ? " or bfloat16" : "") + " [" +
          std::to_string(rows) + ", " + std::to_string(columns) + "] on the CPU");
}

void expect_gate(const Tensor& gate, int64_t columns) {
  STD_TORCH_CHECK(gate.is_cpu() && gate.scalar_type() == ScalarType::Float && gate.is_contiguous() &&
                      gate.dim() == 1 && gate.size(0) == columns,
                  "gate: expected a contiguous float32 [" + std::to_string(columns) + "] on the CPU");
}

template <class F>
void over_blocks(int64_t rows, const F& f) {
  const int64_t blocks = divide_up(rows, kRows);
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block)
      f(block, block * kRows, std::min(kRows, rows - block * kRows));
  });
}

// out = weight * gate
void cpu_fold_gate(const Tensor& weight, const Tensor& gate, Tensor out) {
  STD_TORCH_CHECK(weight.dim() == 2, "weight: expected [N, K]");
  const int64_t N = weight.size(0), K = weight.size(1);
  expect_matrix(weight, "weight", false, N, K);
  expect_gate(gate, K);
  expect_matrix(out, "out", true, N, K);
  const bool bfloat16 = out.scalar_type() == ScalarType::BFloat16;
  const float *w = weight.const_data_ptr<float>(), *g = gate.const_data_ptr<float>();
  char* to = static_cast<char*>(out.mutable_data_ptr());
  over_blocks(N, [&](int64_t, int64_t row, int64_t rows) {
    kernels(Dtype::kFloat32).fold({w + row * K, g, rows, K, to + row * K * (bfloat16 ? 2 : 4), bfloat16});
  });
}

// `sum_n product[n, k] weight[n, k]`, [K]; and out = product * gate, if there is an `out`, perhaps `product`.
Tensor cpu_unfold_gate(const Tensor& product, const Tensor& weight, const Tensor& gate,
                       std::optional<Tensor> out) {
  STD_TORCH_CHECK(weight.dim() == 2, "weight: expected [N, K]");
  const int64_t N = weight.size(0), K = weight.size(1);
  expect_matrix(product, "product", true, N, K);
  expect_matrix(weight, "weight", false, N, K);
  expect_gate(gate, K);
  if (out) expect_matrix(*out, "out", false, N, K);
  const bool bfloat16 = product.scalar_type() == ScalarType::BFloat16;
  const char* p = static_cast<const char*>(product.const_data_ptr());
  const float *w = weight.const_data_ptr<float>(), *g = gate.const_data_ptr<float>();
  float* to = out ? out->mutable_data_ptr<float>() : nullptr;
  const int64_t blocks = divide_up(N, kRows);
  std::vector<float> partial(static_cast<size_t>(blocks * K), 0.0f);
  over_blocks(N, [&](int64_t block, int64_t row, int64_t rows) {
    kernels(Dtype::kFloat32)
        .unfold({p + row * K * (bfloat16 ? 2 : 4), bfloat16, w + row * K, g, rows, K,
                 partial.data() + block * K, to ? to + row * K : nullptr});
  });
  Tensor total = torch::stable::new_empty(gate, {K});
  float* sums = total.mutable_data_ptr<float>();
  std::fill(sums, sums + K, 0.0f);
  for (int64_t block = 0; block < blocks; ++block)
    for (int64_t k = 0; k < K; ++k) sums[k] += partial[static_cast<size_t>(block * K + k)];
  return total;
}

}  // namespace
}  // namespace vtp_cpu

STABLE_TORCH_LIBRARY_FRAGMENT(vtp, m) {
  m.def("cpu_fold_gate(Tensor weight, Tensor gate, Tensor(a!) out) -> ()");
  m.def("cpu_unfold_gate(Tensor product, Tensor weight, Tensor gate, Tensor(a!)? out) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(vtp, CPU, m) {
  m.impl("cpu_fold_gate", TORCH_BOX(&vtp_cpu::cpu_fold_gate));
  m.impl("cpu_unfold_gate", TORCH_BOX(&vtp_cpu::cpu_unfold_gate));
}
