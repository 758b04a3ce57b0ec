#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <string>
#include <type_traits>

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace revit {
namespace {

// x: (tokens, dim) with rows `stride` apart; grad: (images, dim). y is (images, dim) forward, dx (tokens, dim)
// backward.
struct PoolArguments {
  const void *x, *grad;
  void* y;
  const int32_t* cu_seqlens;
  int64_t dim, stride, prefix;
  bool first_only, average, maximum, x_is_bf16;
};

// The rows that the image pools.
inline void pooled_rows(const PoolArguments& a, int64_t image, int64_t* begin, int64_t* end) {
  *begin = a.cu_seqlens[image], *end = a.cu_seqlens[image + 1];
  if (a.first_only)
    *end = std::min(*end, *begin + 1);
  else
    *begin = std::min(*end, *begin + a.prefix);
}

}  // namespace
}  // namespace revit

#define KERNELS "pool/columns.h"
#include "cpu/checks.h"
#include "cpu/isa.h"

namespace revit {
namespace {

constexpr int64_t kColumnsPerTask = 256;

PoolArguments arguments(const Tensor& x, const std::string& kind, const Boundaries& boundaries, int64_t prefix,
                        bool include_prefix) {
  REVIT_CHECK(kind == "token" || kind == "avg" || kind == "max" || kind == "avgmax", "there is no pooling by ", kind);
  REVIT_CHECK(prefix >= 0, "prefix must be at least 0, got ", prefix);
  return {
      .x = x.data_ptr(),
      .cu_seqlens = boundaries.at,
      .dim = x.size(1),
      .stride = x.stride(0),
      .prefix = include_prefix ? 0 : std::min(prefix, boundaries.tokens),
      .first_only = kind == "token",
      .average = kind == "avg" || kind == "avgmax" || kind == "token",  // the mean of one token is that token
      .maximum = kind == "max" || kind == "avgmax",
      .x_is_bf16 = x.scalar_type() == ScalarType::BFloat16,
  };
}

// f(image, first column, last + 1) for every block of columns of every image.
template <class F>
void each_block(int64_t images, int64_t dim, F f) {
  const int64_t blocks = (dim + kColumnsPerTask - 1) / kColumnsPerTask;
  torch::stable::parallel_for(0, images * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task % blocks * kColumnsPerTask;
      f(task / blocks, first, std::min(dim, first + kColumnsPerTask));
    }
  });
}

Tensor pool_cpu(const Tensor& x, const Tensor& cu_seqlens, std::string kind, int64_t prefix, bool include_prefix) {
  check_rows("x", x, {kAny, kAny});
  const Boundaries boundaries("cu_seqlens", cu_seqlens, x.size(0));
  const int64_t images = boundaries.images;
  PoolArguments a = arguments(x, kind, boundaries, prefix, include_prefix);
  Tensor y = torch::stable::new_empty(x, {images, a.dim});
  a.y = y.data_ptr();
  static const auto pool_columns = EVERY_ISA_PICK(pool_columns);
  each_block(images, a.dim, [&](int64_t image, int64_t first, int64_t last) { pool_columns(a, image, first, last); });
  return y;
}

// grad: (images, dim); x is needed by the kinds that take a maximum. Returns (tokens, dim).
Tensor pool_backward_cpu(const Tensor& grad, const std::optional<Tensor>& x, const Tensor& cu_seqlens, int64_t tokens,
                         std::string kind, int64_t prefix, bool include_prefix) {
  const Boundaries boundaries("cu_seqlens", cu_seqlens, tokens);
  const int64_t images = boundaries.images;
  check_rows("grad", grad, {images, kAny});
  check("grad", grad, {images, kAny}, grad.scalar_type());
  if (x) check_rows("x", *x, {tokens, grad.size(1)});
  REVIT_CHECK(!x || x->scalar_type() == grad.scalar_type(), "x and grad must be of one dtype");
  PoolArguments a = arguments(x ? *x : grad, kind, boundaries, prefix, include_prefix);
  REVIT_CHECK(x || !a.maximum, "the gradient of a maximum needs x");
  Tensor dx = torch::stable::new_empty(grad, {tokens, a.dim});
  a.grad = grad.data_ptr();
  a.y = dx.data_ptr();
  const int64_t row_bytes = a.dim * (a.x_is_bf16 ? 2 : 4);
  char* bytes = static_cast<char*>(dx.data_ptr());
  // Zeros where nothing was pooled: the rows between one image's pooled rows and the next's, and the tail.
  torch::stable::parallel_for(0, images + 1, 1, [&](int64_t from, int64_t to) {
    for (int64_t image = from; image < to; ++image) {
      int64_t begin = tokens, end = 0, unused;
      if (image) pooled_rows(a, image - 1, &unused, &end);
      if (image < images) pooled_rows(a, image, &begin, &unused);
      if (begin > end) std::memset(bytes + end * row_bytes, 0, (begin - end) * row_bytes);
    }
  });
  static const auto spread_columns = EVERY_ISA_PICK(spread_columns);
  each_block(images, a.dim, [&](int64_t image, int64_t first, int64_t last) { spread_columns(a, image, first, last); });
  return dx;
}

}  // namespace
}  // namespace revit

STABLE_TORCH_LIBRARY_FRAGMENT(revit_kernels, m) {
  m.def("pool_cpu(Tensor x, Tensor cu_seqlens, str kind, int prefix, bool include_prefix) -> Tensor");
  m.def(
      "pool_backward_cpu(Tensor grad, Tensor? x, Tensor cu_seqlens, int tokens, str kind, int prefix,"
      " bool include_prefix) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(revit_kernels, CPU, m) {
  m.impl("pool_cpu", TORCH_BOX(&revit::pool_cpu));
  m.impl("pool_backward_cpu", TORCH_BOX(&revit::pool_backward_cpu));
}
