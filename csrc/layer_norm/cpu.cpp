#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <optional>
#include <tuple>

namespace revit {
namespace {

// Data of x's dtype and of branch's is `void`; weight, bias and gamma are fp32, ones or zeros where the user gave none.
struct ForwardArguments {
  const void *x, *branch;
  const float *weight, *bias, *gamma;
  const int32_t* row;
  void *y, *sum;
  float *mean, *rstd;
  int64_t dim, lengths;
  float eps;
  bool rms, x_is_bf16, branch_is_bf16;
};

struct BackwardArguments {
  const void *dy, *dsum, *sum, *branch;
  const float *weight, *gamma;
  const int32_t* row;
  const float *mean, *rstd;
  void *dx, *dbranch;
  int64_t dim, lengths, dsum_stride;
  bool rms, x_is_bf16, branch_is_bf16;
};

// What one chunk of tokens adds to the parameters' gradients. dweight, dbias: (lengths, dim), each row valid once
// touched.
struct Partials {
  float *dweight, *dbias, *dgamma;
  bool* touched;
};

}  // namespace
}  // namespace revit

#define KERNELS "layer_norm/rows.h"
#include "cpu/checks.h"
#include "cpu/isa.h"
#include "cpu/scratch.h"

namespace revit {
namespace {

constexpr int64_t kRowsPerTask = 16;
// The chunks depend on the number of tokens alone: however many threads share them, they are added in the same order.
constexpr int64_t kRowsPerChunk = 64, kMostChunks = 256;

template <class T = const float>
T* pointer(const std::optional<Tensor>& tensor, T* otherwise = nullptr) {
  return tensor ? static_cast<T*>(tensor->data_ptr()) : otherwise;
}

bool is_bf16(const std::optional<Tensor>& tensor) { return tensor && tensor->scalar_type() == ScalarType::BFloat16; }

// x or what is added up: (tokens, dim) fp32 or bf16; branch: the same; weight, bias: (lengths, dim) fp32; row:
// (tokens,) int32; gamma: (dim,) fp32. Returns how many lengths there are.
int64_t check_arguments(const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                        const std::optional<Tensor>& row, const std::optional<Tensor>& branch,
                        const std::optional<Tensor>& gamma) {
  check_rows("x", x, {kAny, kAny});
  const int64_t tokens = x.size(0), dim = x.size(1);
  check("x", x, {tokens, dim}, x.scalar_type());
  REVIT_CHECK(dim > 0, "x must have at least one column");
  if (branch)
    check_rows("branch", *branch, {tokens, dim}), check("branch", branch, {tokens, dim}, branch->scalar_type());
  check("weight", weight, {kAny, dim}, ScalarType::Float);
  check("bias", bias, {weight ? weight->size(0) : kAny, dim}, ScalarType::Float);
  check("row", row, {tokens}, ScalarType::Int);
  check("gamma", gamma, {dim}, ScalarType::Float);
  const int64_t lengths = weight ? weight->size(0) : bias ? bias->size(0) : 1;
  REVIT_CHECK(lengths > 0, "weight and bias must have at least one row");
  return lengths;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_cpu(const Tensor& x, const std::optional<Tensor>& weight,
                                                          const std::optional<Tensor>& bias,
                                                          const std::optional<Tensor>& row,
                                                          const std::optional<Tensor>& branch,
                                                          const std::optional<Tensor>& gamma, double eps, bool rms) {
  const int64_t lengths = check_arguments(x, weight, bias, row, branch, gamma), tokens = x.size(0), dim = x.size(1);
  Tensor y = torch::stable::empty_like(x);
  Tensor sum = branch ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
  Tensor mean = torch::stable::new_empty(x, {tokens}, ScalarType::Float);
  Tensor rstd = torch::stable::new_empty(x, {tokens}, ScalarType::Float);
  Arena of_ones, of_zeros;
  const float* ones = of_ones.filled<float>(weight && gamma ? 0 : lengths * dim, 1);
  const float* zeros = of_zeros.filled<float>(bias ? 0 : lengths * dim, 0);
  const ForwardArguments arguments = {
      .x = x.data_ptr(),
      .branch = pointer<void>(branch),
      .weight = pointer(weight, ones),
      .bias = pointer(bias, zeros),
      .gamma = pointer(gamma, ones),
      .row = pointer<const int32_t>(row),
      .y = y.data_ptr(),
      .sum = sum.data_ptr(),
      .mean = static_cast<float*>(mean.data_ptr()),
      .rstd = static_cast<float*>(rstd.data_ptr()),
      .dim = dim,
      .lengths = lengths,
      .eps = static_cast<float>(eps),
      .rms = rms,
      .x_is_bf16 = is_bf16(x),
      .branch_is_bf16 = is_bf16(branch),
  };
  static const auto forward_rows = EVERY_ISA_PICK(forward_rows);
  torch::stable::parallel_for(0, tokens, kRowsPerTask, [&](int64_t begin, int64_t end) {
    static thread_local Arena line;
    forward_rows(arguments, begin, end, line.only<float>(dim));
  });
  return {y, sum, mean, rstd};
}

// dy, dsum, sum: (tokens, dim), of one dtype. Returns the gradients of x, branch, weight, bias and gamma; those of
// the parameters in fp32, and with no elements where there is no parameter.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> layer_norm_backward_cpu(
    const Tensor& dy, const std::optional<Tensor>& dsum, const Tensor& sum, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& row, const std::optional<Tensor>& branch,
    const std::optional<Tensor>& gamma, const Tensor& mean, const Tensor& rstd, bool rms) {
  const int64_t lengths = check_arguments(sum, weight, bias, row, branch, gamma);
  const int64_t tokens = sum.size(0), dim = sum.size(1);
  check("dy", dy, {tokens, dim}, sum.scalar_type());
  check("dsum", dsum, {tokens, dim}, sum.scalar_type());
  check("mean", mean, {tokens}, ScalarType::Float), check("rstd", rstd, {tokens}, ScalarType::Float);
  REVIT_CHECK(!branch || gamma, "the gradient needs the branch only where it was scaled by gamma");
  auto like = [&](const std::optional<Tensor>& parameter, std::initializer_list<int64_t> sizes) {
    return parameter ? torch::stable::new_empty(mean, sizes) : torch::stable::new_empty(mean, {0});
  };
  Tensor dx = torch::stable::empty_like(sum);
  Tensor dbranch = branch ? torch::stable::empty_like(*branch) : torch::stable::new_empty(sum, {0});
  Tensor dweight = like(weight, {lengths, dim}), dbias = like(bias, {lengths, dim}), dgamma = like(gamma, {dim});
  Arena of_ones, of_zeros, of_partial;
  const float* ones = of_ones.filled<float>(weight ? 0 : lengths * dim, 1);
  const float* zeros = of_zeros.filled<float>(dsum ? 0 : dim, 0);
  const BackwardArguments arguments = {
      .dy = dy.data_ptr(),
      .dsum = pointer<const void>(dsum, zeros),
      .sum = sum.data_ptr(),
      .branch = pointer<void>(branch),
      .weight = pointer(weight, ones),
      .gamma = pointer(gamma),
      .row = pointer<const int32_t>(row),
      .mean = static_cast<const float*>(mean.data_ptr()),
      .rstd = static_cast<const float*>(rstd.data_ptr()),
      .dx = dx.data_ptr(),
      .dbranch = dbranch.data_ptr(),
      .dim = dim,
      .lengths = lengths,
      .dsum_stride = dsum ? dim : 0,
      .rms = rms,
      .x_is_bf16 = is_bf16(sum),
      .branch_is_bf16 = is_bf16(branch),
  };
  const int64_t rows = std::max(kRowsPerChunk, (tokens + kMostChunks - 1) / kMostChunks);
  const int64_t chunks = (tokens + rows - 1) / rows, stride = (2 * lengths + 1) * dim;
  float* partial = of_partial.only<float>(chunks * stride);
  const std::unique_ptr<bool[]> touched(new bool[chunks * lengths]());
  static const auto backward_rows = EVERY_ISA_PICK(backward_rows);
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      float* own = partial + chunk * stride;
      Partials to = {own, own + lengths * dim, own + 2 * lengths * dim, touched.get() + chunk * lengths};
      std::fill_n(to.dgamma, dim, 0.f);
      backward_rows(arguments, chunk * rows, std::min(tokens, (chunk + 1) * rows), to);
    }
  });
  // One parameter row at a time: rows 0 to lengths - 1 are weight's, then bias's, then gamma.
  torch::stable::parallel_for(0, 2 * lengths + 1, 1, [&](int64_t begin, int64_t end) {
    for (int64_t slot = begin; slot < end; ++slot) {
      const bool of_gamma = slot == 2 * lengths;
      const Tensor& grad = of_gamma ? dgamma : slot < lengths ? dweight : dbias;
      if (!grad.numel()) continue;
      float* out = static_cast<float*>(grad.data_ptr()) + (of_gamma ? 0 : slot % lengths * dim);
      std::fill_n(out, dim, 0.f);
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        if (!of_gamma && !touched[chunk * lengths + slot % lengths]) continue;
        const float* in = partial + chunk * stride + slot * dim;
        for (int64_t i = 0; i < dim; ++i) out[i] += in[i];
      }
    }
  });
  return {dx, dbranch, dweight, dbias, dgamma};
}

}  // namespace
}  // namespace revit

STABLE_TORCH_LIBRARY_FRAGMENT(revit_kernels, m) {
  m.def(
      "layer_norm_cpu(Tensor x, Tensor? weight, Tensor? bias, Tensor? row, Tensor? branch, Tensor? gamma, float eps,"
      " bool rms) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "layer_norm_backward_cpu(Tensor dy, Tensor? dsum, Tensor sum, Tensor? weight, Tensor? bias, Tensor? row,"
      " Tensor? branch, Tensor? gamma, Tensor mean, Tensor rstd, bool rms) -> (Tensor, Tensor, Tensor, Tensor, "
      "Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(revit_kernels, CPU, m) {
  m.impl("layer_norm_cpu", TORCH_BOX(&revit::layer_norm_cpu));
  m.impl("layer_norm_backward_cpu", TORCH_BOX(&revit::layer_norm_backward_cpu));
}
