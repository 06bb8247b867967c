// The engine as PyTorch operators, on the stable ABI: one binary for torch 2.10 and later.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "engine.h"

namespace vtp_cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Workspaces of finished calls wait here for the next one; several calls at once take one each.
class WorkspacePool {
 public:
  std::unique_ptr<Workspace> take() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (idle_.empty()) return std::make_unique<Workspace>();
    std::unique_ptr<Workspace> out = std::move(idle_.back());
    idle_.pop_back();
    return out;
  }
  void give_back(std::unique_ptr<Workspace> workspace) {
    const std::lock_guard<std::mutex> lock(mutex_);
    idle_.push_back(std::move(workspace));
  }

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<Workspace>> idle_;
};

WorkspacePool& pool() {
  static WorkspacePool* pool = new WorkspacePool;  // never destroyed: threads may outlive static objects
  return *pool;
}

void in_parallel(int64_t threads, void (*body)(void*), void* context) {
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) { body(context); });
}

std::string shape_of(const Tensor& t) {
  std::string out = "[";
  for (int64_t i = 0; i < t.dim(); ++i) out += (i ? ", " : "") + std::to_string(t.size(i));
  return out + "]";
}

void expect(bool good, const std::string& message) { STD_TORCH_CHECK(good, message); }

void expect_memory(const Tensor& t, const char* name, ScalarType dtype, const char* dtype_name) {
  expect(t.is_cpu(), std::string(name) + ": not on the CPU");
  expect(
      t.scalar_type() == dtype && t.dim() == 1 && t.is_contiguous(),
      std::string(name) + ": got shape " + shape_of(t) + ", expected a contiguous vector of " + dtype_name);
}

void expect_input(const Tensor& t, const char* name, int64_t rank) {
  expect(t.is_cpu(), std::string(name) + ": not on the CPU");
  expect(t.scalar_type() == ScalarType::Float || t.scalar_type() == ScalarType::BFloat16,
         std::string(name) + ": expected float32 or bfloat16");
  expect(t.dim() == rank, std::string(name) + ": got shape " + shape_of(t) + ", expected " +
                              std::to_string(rank) + " dimensions");
}

// That there are tables [T, N, d] for all heads that have one, and none where no head has.
void expect_rotary(const std::optional<Tensor>& rotary, const Model& m, int64_t tokens) {
  const std::string wanted = m.tables == 0 ? "none: the layout has no head with a rotary embedding"
                                           : "contiguous float32 [T, " + std::to_string(tokens) + ", " +
                                                 std::to_string(m.head_dim) + "] with T at least " +
                                                 std::to_string(m.tables);
  if (!rotary) {
    expect(m.tables == 0, "rotary: got none, expected " + wanted);
    return;
  }
  expect(m.tables > 0, "rotary: got shape " + shape_of(*rotary) + ", expected " + wanted);
  expect(rotary->is_cpu(), "rotary: not on the CPU");
  expect(rotary->scalar_type() == ScalarType::Float && rotary->is_contiguous(),
         "rotary: got another dtype or memory format, expected " + wanted);
  expect(rotary->dim() == 3 && rotary->size(0) >= m.tables && rotary->size(1) == tokens &&
             rotary->size(2) == m.head_dim,
         "rotary: got shape " + shape_of(*rotary) + ", expected " + wanted);
}

// Reads the model, calls `check` on it, which gives the shape of the result, and runs it.
template <class Check>
Tensor run_model(const Tensor& input, const Tensor& weights, const Tensor& layout,
                 const std::optional<Tensor>& rotary, const Check& check) {
  expect_memory(weights, "weights", ScalarType::Byte, "uint8");
  expect_memory(layout, "layout", ScalarType::Long, "int64");
  std::unique_ptr<Workspace> workspace = pool().take();
  workspace->model.read(layout.const_data_ptr<int64_t>(), layout.size(0),
                        static_cast<const char*>(weights.const_data_ptr()), weights.size(0));
  const std::vector<int64_t> shape = check(workspace->model);
  const Tensor in = torch::stable::contiguous(input);
  Tensor out = torch::stable::new_empty(in, shape);
  const bool bfloat16 = in.scalar_type() == ScalarType::BFloat16;
  const Call call{in.const_data_ptr(),
                  bfloat16,
                  in.size(0),
                  workspace->model.from_images ? 0 : in.size(1),
                  out.mutable_data_ptr(),
                  bfloat16,
                  rotary ? rotary->const_data_ptr<float>() : nullptr};
  if (out.numel() > 0) run(*workspace, call, torch::stable::get_num_threads(), in_parallel);
  pool().give_back(std::move(workspace));
  return out;
}

Tensor cpu_vit(const Tensor& images, const Tensor& weights, const Tensor& layout, int64_t outputs) {
  expect_input(images, "images", 4);
  return run_model(images, weights, layout, std::nullopt, [&](const Model& m) {
    expect(m.from_images && m.to_logits, "layout: it is not that of a whole model");
    expect(images.size(1) == m.channels && images.size(2) == m.height && images.size(3) == m.width,
           "images: got shape " + shape_of(images) + ", expected [B, " + std::to_string(m.channels) + ", " +
               std::to_string(m.height) + ", " + std::to_string(m.width) + "]");
    expect(outputs == m.head.outputs,
           "outputs: got " + std::to_string(outputs) + ", expected " + std::to_string(m.head.outputs));
    return std::vector<int64_t>{images.size(0), outputs};
  });
}

// rotary: [T, N, d] in float32, for each table and token the cosines of d / 2 angles, then their sines; which
// head is rotated by which table is in the layout.
Tensor cpu_blocks(const Tensor& tokens, const Tensor& weights, const Tensor& layout,
                  const std::optional<Tensor>& rotary) {
  expect_input(tokens, "tokens", 3);
  return run_model(tokens, weights, layout, rotary, [&](const Model& m) {
    expect(!m.from_images && !m.to_logits, "layout: it is not that of blocks alone");
    expect(tokens.size(2) == m.embed_dim, "tokens: got shape " + shape_of(tokens) + ", expected [B, N, " +
                                              std::to_string(m.embed_dim) + "]");
    expect_rotary(rotary, m, tokens.size(1));
    return std::vector<int64_t>{tokens.size(0), tokens.size(1), tokens.size(2)};
  });
}

Dtype dtype_of(bool bfloat16) { return bfloat16 ? Dtype::kBFloat16 : Dtype::kFloat32; }

// x W^T + bias alone, by the tiles that a model runs, so that they can be measured beside other libraries. x
// is [M, K] in the type of activations, K a multiple of their `input_step`; the result is [M, outputs rounded up to
// panels] in float32, where columns behind `outputs` are undefined.
Tensor cpu_linear(const Tensor& x, const Tensor& weights, const Tensor& bias, int64_t outputs,
                  bool bfloat16) {
  expect_input(x, "x", 2);
  expect_memory(weights, "weights", ScalarType::Byte, "uint8");
  expect_memory(bias, "bias", ScalarType::Float, "float32");
  const Dtype dtype = dtype_of(bfloat16);
  const Kernels& k = kernels(dtype);
  const int64_t M = x.size(0), K = x.size(1);
  expect((x.scalar_type() == ScalarType::BFloat16) == (k.activation_bytes == 2) && x.is_contiguous(),
         std::string("x: expected contiguous ") + (k.activation_bytes == 2 ? "bfloat16" : "float32"));
  expect(outputs > 0 && outputs < (1 << 24) && K > 0 && K < (1 << 24) &&
             K % k.input_step == 0 &&
             weights.size(0) == divide_up(outputs, kPanel) * panel_bytes(dtype, K) &&
             bias.size(0) == round_up(outputs, kPanel),
         "weights, bias: not those of " + std::to_string(K) + " inputs and " + std::to_string(outputs) +
             " outputs");
  const Linear layer{K, outputs, weights.const_data_ptr(), bias.const_data_ptr<float>()};
  Tensor out = torch::stable::empty({M, round_up(outputs, kPanel)}, ScalarType::Float);
  std::unique_ptr<Workspace> workspace = pool().take();
  run_linear(*workspace, dtype, layer, x.const_data_ptr(), M, out.mutable_data_ptr<float>(),
             torch::stable::get_num_threads(), in_parallel);
  pool().give_back(std::move(workspace));
  return out;
}

// The instruction set in use for weights in bfloat16, one of the names that VTP_CPU_ISA takes.
std::string cpu_isa() { return kernels(Dtype::kBFloat16).name; }

// The instruction set for weights of a dtype, and why it was taken, if there was a choice.
std::string cpu_choice(bool bfloat16) {
  const std::string why = kernels_reason(dtype_of(bfloat16));
  return kernels(dtype_of(bfloat16)).name + (why.empty() ? "" : ": " + why);
}

}  // namespace
}  // namespace vtp_cpu

STABLE_TORCH_LIBRARY_FRAGMENT(vtp, m) {
  m.def("cpu_vit(Tensor images, Tensor weights, Tensor layout, int outputs) -> Tensor");
  m.def("cpu_blocks(Tensor tokens, Tensor weights, Tensor layout, Tensor? rotary=None) -> Tensor");
  m.def("cpu_linear(Tensor x, Tensor weights, Tensor bias, int outputs, bool bfloat16) -> Tensor");
  m.def("cpu_isa() -> str");
  m.def("cpu_choice(bool bfloat16) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(vtp, CPU, m) {
  m.impl("cpu_vit", TORCH_BOX(&vtp_cpu::cpu_vit));
  m.impl("cpu_blocks", TORCH_BOX(&vtp_cpu::cpu_blocks));
  m.impl("cpu_linear", TORCH_BOX(&vtp_cpu::cpu_linear));
}

STABLE_TORCH_LIBRARY_IMPL(vtp, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&vtp_cpu::cpu_isa));
  m.impl("cpu_choice", TORCH_BOX(&vtp_cpu::cpu_choice));
}
