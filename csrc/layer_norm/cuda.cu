#include <algorithm>
#include <initializer_list>
#include <optional>
#include <tuple>

#include "cuda/launch.h"
#include "layer_norm/cuda_backward.h"
#include "layer_norm/cuda_forward.h"

using torch::stable::Tensor;

namespace {

int threads_for(int64_t dim) {
  STD_TORCH_CHECK(dim <= kMostThreads * kColumns, "dim must be at most ", kMostThreads * kColumns, ", got ", dim);
  return static_cast<int>((dim + 32 * kColumns - 1) / (32 * kColumns) * 32);
}

template <class T = const float>
T* pointer(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<T*>(tensor->data_ptr()) : nullptr;
}

Kind kind_of(const Tensor& tensor) {
  using torch::headeronly::ScalarType;
  const ScalarType dtype = tensor.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                  "a parameter must be float32, bfloat16 or float16");
  return dtype == ScalarType::Float ? Kind::kFloat32 : dtype == ScalarType::BFloat16 ? Kind::kBFloat16 : Kind::kFloat16;
}

Parameter<const void> parameter(const std::optional<Tensor>& tensor) {
  if (!tensor) return {};
  return {tensor->data_ptr(), kind_of(*tensor)};
}

bool whole_vectors(int64_t dim, std::initializer_list<const void*> pointers) {
  return dim % kColumns == 0 && std::all_of(pointers.begin(), pointers.end(), revit::on_vector);
}

int64_t lengths_of(const std::optional<Tensor>& weight, const std::optional<Tensor>& bias) {
  return weight ? weight->size(0) : bias ? bias->size(0) : 1;
}

// f(X{}, B{}) for the types of x and of the branch, if there is one.
template <class F>
void with_types(const Tensor& x, const std::optional<Tensor>& branch, F f) {
  revit::with_type(x.scalar_type(), [&](auto type) {
    if (!branch || branch->scalar_type() == x.scalar_type()) return f(type, type);
    revit::with_type(branch->scalar_type(), [&](auto of_branch) { f(type, of_branch); });
  });
}

// x, branch: (tokens, dim); weight, bias: (lengths, dim); row: (tokens,) int32; gamma: (dim,)
std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_cuda(const Tensor& x, const std::optional<Tensor>& weight,
                                                           const std::optional<Tensor>& bias,
                                                           const std::optional<Tensor>& row,
                                                           const std::optional<Tensor>& branch,
                                                           const std::optional<Tensor>& gamma, double eps, bool rms) {
  constexpr int64_t kManyBlocks = 2048, kMostRuns = 8;  // that many before a block gets more runs than one
  const int64_t tokens = x.size(0), dim = x.size(1);
  const int threads = threads_for(dim);
  Tensor y = torch::stable::empty_like(x);
  Tensor sum = branch ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
  Tensor mean = torch::stable::new_empty(x, {tokens}, torch::headeronly::ScalarType::Float);
  Tensor rstd = torch::stable::new_empty(x, {tokens}, torch::headeronly::ScalarType::Float);
  ForwardArguments a = {};
  a.x = x.data_ptr();
  a.branch = pointer<void>(branch);
  a.weight = parameter(weight);
  a.bias = parameter(bias);
  a.gamma = parameter(gamma);
  a.row = pointer<const int32_t>(row);
  a.y = y.data_ptr();
  a.sum = sum.data_ptr();
  a.mean = static_cast<float*>(mean.data_ptr());
  a.rstd = static_cast<float*>(rstd.data_ptr());
  a.tokens = tokens;
  a.tokens_per_block = kForwardTokens * std::clamp<int64_t>(tokens / (kForwardTokens * kManyBlocks), 1, kMostRuns);
  a.dim = static_cast<int>(dim);
  a.lengths = static_cast<int>(lengths_of(weight, bias));
  a.eps = static_cast<float>(eps);
  a.rms = rms;
  a.whole = whole_vectors(dim, {a.x, a.branch, a.weight.data, a.bias.data, a.gamma.data});
  const revit::Stream stream(x);
  with_types(x, branch, [&](auto of_x, auto of_branch) {
    const dim3 grid((tokens + a.tokens_per_block - 1) / a.tokens_per_block);
    stream.launch(forward_kernel<decltype(of_x), decltype(of_branch)>, grid, threads, BlockSum::kShared, a);
  });
  return {y, sum, mean, rstd};
}

// dy, dsum, sum: (tokens, dim), of one dtype. Returns the gradients of x, branch, weight, bias and gamma, each in the
// dtype of what it is of, and with no elements where there is no such tensor.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> layer_norm_backward_cuda(
    const Tensor& dy, const std::optional<Tensor>& dsum, const Tensor& sum, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& row, const std::optional<Tensor>& branch,
    const std::optional<Tensor>& gamma, const Tensor& mean, const Tensor& rstd, bool rms) {
  // Shapes alone decide which block adds what, and so the sums to the last bit, on whatever GPU.
  constexpr int64_t kFewestTokens = 16, kManyThreads = 1 << 16;
  const int64_t tokens = sum.size(0), dim = sum.size(1), lengths = lengths_of(weight, bias);
  const int threads = threads_for(dim);
  STD_TORCH_CHECK(!branch || gamma, "the gradient needs the branch only where it was scaled by gamma");
  auto like = [&](const std::optional<Tensor>& parameter, std::initializer_list<int64_t> sizes) {
    return parameter ? torch::stable::new_empty(*parameter, sizes) : torch::stable::new_empty(mean, {0});
  };
  auto gradient = [](const Tensor& tensor) { return Parameter<void>{tensor.data_ptr(), kind_of(tensor)}; };
  Tensor dx = torch::stable::empty_like(sum);
  Tensor dbranch = branch ? torch::stable::empty_like(*branch) : torch::stable::new_empty(sum, {0});
  Tensor dweight = like(weight, {lengths, dim}), dbias = like(bias, {lengths, dim}), dgamma = like(gamma, {dim});
  BackwardArguments a = {};
  a.tokens = tokens;
  a.tokens_per_block = std::max(kFewestTokens, (tokens * threads + kManyThreads - 1) / kManyThreads);
  a.weight_rows = static_cast<int>(weight ? lengths : 0);
  a.bias_rows = static_cast<int>(bias ? lengths : 0);
  a.gamma_rows = gamma ? 1 : 0;
  const int64_t blocks = (tokens + a.tokens_per_block - 1) / a.tokens_per_block;
  const int64_t rows = a.weight_rows + a.bias_rows + a.gamma_rows;
  Tensor partial = torch::stable::new_empty(mean, {blocks, rows, threads * kColumns});
  Tensor touched = torch::stable::new_empty(mean, {blocks, lengths}, torch::headeronly::ScalarType::Int);
  a.dy = dy.data_ptr();
  a.dsum = pointer<void>(dsum);
  a.sum = sum.data_ptr();
  a.branch = pointer<void>(branch);
  a.weight = parameter(weight);
  a.gamma = parameter(gamma);
  a.mean = static_cast<const float*>(mean.data_ptr());
  a.rstd = static_cast<const float*>(rstd.data_ptr());
  a.row = pointer<const int32_t>(row);
  a.dx = dx.data_ptr();
  a.dbranch = dbranch.data_ptr();
  a.partial = static_cast<float*>(partial.data_ptr());
  a.touched = static_cast<int32_t*>(touched.data_ptr());
  a.dim = static_cast<int>(dim);
  a.lengths = static_cast<int>(lengths);
  a.rms = rms;
  a.whole = whole_vectors(dim, {a.dy, a.dsum, a.sum, a.branch, a.weight.data, a.gamma.data});
  const revit::Stream stream(sum);
  with_types(sum, branch, [&](auto of_x, auto of_branch) {
    stream.launch(backward_kernel<decltype(of_x), decltype(of_branch)>, dim3(blocks), threads, BlockSum::kShared, a);
  });
  ReduceArguments r = {};
  r.partial = a.partial;
  r.touched = a.touched;
  r.dweight = gradient(dweight);
  r.dbias = gradient(dbias);
  r.dgamma = gradient(dgamma);
  r.blocks = blocks;
  r.dim = a.dim;
  r.width = threads * kColumns;
  r.lengths = a.lengths;
  r.weight_rows = a.weight_rows;
  r.bias_rows = a.bias_rows;
  r.gamma_rows = a.gamma_rows;
  const dim3 grid(rows, (dim + kReduceColumns - 1) / kReduceColumns);
  const int reducers = kReduceColumns * kReduceGroups;
  stream.launch(reduce_kernel, grid, reducers, reducers * sizeof(float), r);
  return {dx, dbranch, dweight, dbias, dgamma};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(revit_kernels, m) {
  m.def(
      "layer_norm_cuda(Tensor x, Tensor? weight, Tensor? bias, Tensor? row, Tensor? branch, Tensor? gamma, float eps,"
      " bool rms) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "layer_norm_backward_cuda(Tensor dy, Tensor? dsum, Tensor sum, Tensor? weight, Tensor? bias, Tensor? row,"
      " Tensor? branch, Tensor? gamma, Tensor mean, Tensor rstd, bool rms) -> (Tensor, Tensor, Tensor, Tensor, "
      "Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(revit_kernels, REVIT_CUDA_KEY, m) {
  m.impl("layer_norm_cuda", TORCH_BOX(&layer_norm_cuda));
  m.impl("layer_norm_backward_cuda", TORCH_BOX(&layer_norm_backward_cuda));
}
