#include <algorithm>
#include <cmath>
#include <optional>
#include <string>

#include "cuda/launch.h"
#include "cuda/vectors.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

// A block is one image's, and some columns: kLanes threads side by side read 128 bytes of a row, each group of them
// every kGroups-th row.
constexpr int kLanes = 8, kGroups = 32, kThreads = kLanes * kGroups;

template <class X>
constexpr int kUnit = 16 / sizeof(X);  // columns of a thread
template <class X>
constexpr int kTile = kLanes * kUnit<X>;  // columns of a block

// x: (tokens, dim) with rows `stride` apart, grad: (images, dim). y is (images, dim) forward, dx (tokens, dim)
// backward. whole: every row of x, and of dx, can be read a vector at a time.
struct Arguments {
  const void *x, *grad;
  void* y;
  const int32_t* cu_seqlens;
  int64_t images, tokens, stride, prefix;
  int dim;
  bool first_only, average, maximum, whole;
};

// The rows of an image, and those that it pools, whatever cu_seqlens holds within the tensor.
struct Rows {
  int64_t first, begin, end, last;
};

__device__ __forceinline__ int64_t boundary(const Arguments& a, int64_t image) {
  return min(max(static_cast<int64_t>(a.cu_seqlens[image]), int64_t{0}), a.tokens);
}

__device__ __forceinline__ Rows rows_of(const Arguments& a, int64_t image) {
  Rows rows;
  rows.last = boundary(a, image + 1);
  rows.first = min(boundary(a, image), rows.last);
  rows.begin = a.first_only ? rows.first : min(rows.last, rows.first + a.prefix);
  rows.end = a.first_only ? min(rows.last, rows.first + 1) : rows.last;
  return rows;
}

__device__ __forceinline__ float larger(float v, float than) { return v > than || v != v ? v : than; }  // NaN stays

template <class X>
__global__ void __launch_bounds__(kThreads) forward_kernel(const Arguments a) {
  REVIT_DYNAMIC_SHARED(shared);  // [2, kGroups, kTile]: sums, maxima
  float* sums = reinterpret_cast<float*>(shared);
  float* maxima = sums + kGroups * kTile<X>;
  const int lane = threadIdx.x % kLanes, group = threadIdx.x / kLanes, first = blockIdx.y * kTile<X>;
  const Rows rows = rows_of(a, blockIdx.x);
  float sum[kUnit<X>] = {}, most[kUnit<X>];
  for (float& m : most) m = -INFINITY;
#pragma unroll 4
  for (int64_t row = rows.begin + group; row < rows.end; row += kGroups) {
    float x[kUnit<X>];
    const X* from = static_cast<const X*>(a.x) + row * a.stride;
    revit::widen(revit::load<kUnit<X>>(from, first + lane * kUnit<X>, a.dim, a.whole), x);
#pragma unroll
    for (int i = 0; i < kUnit<X>; ++i) sum[i] += x[i], most[i] = larger(x[i], most[i]);
  }
#pragma unroll
  for (int i = 0; i < kUnit<X>; ++i) {
    const int at = group * kTile<X> + lane * kUnit<X> + i;
    sums[at] = sum[i], maxima[at] = most[i];
  }
  __syncthreads();
  const int own = threadIdx.x;
  if (own >= kTile<X> || first + own >= a.dim) return;
  float total = 0, largest = -INFINITY;
  for (int i = 0; i < kGroups; ++i) {
    total += sums[i * kTile<X> + own];
    largest = larger(maxima[i * kTile<X> + own], largest);
  }
  const float mean = total / max(rows.end - rows.begin, int64_t{1});
  float y = a.average ? a.maximum ? 0.5f * (largest + mean) : mean : largest;
  if (rows.begin == rows.end) y = 0;
  revit::store_one(static_cast<X*>(a.y) + static_cast<int64_t>(blockIdx.x) * a.dim + first + own, y);
}

// Writes every row of the image, and its share of the tail that belongs to none.
template <class X>
__global__ void __launch_bounds__(kThreads) backward_kernel(const Arguments a) {
  REVIT_DYNAMIC_SHARED(shared);  // [2, kGroups, kTile]: maxima, ties; [3, kTile]: largest, its share, everyone's share
  float* maxima = reinterpret_cast<float*>(shared);
  float* counts = maxima + kGroups * kTile<X>;
  float* shares = counts + kGroups * kTile<X>;
  const int lane = threadIdx.x % kLanes, group = threadIdx.x / kLanes, first = blockIdx.y * kTile<X>;
  const int column = first + lane * kUnit<X>;
  const int64_t image = blockIdx.x;
  const Rows rows = image < a.images ? rows_of(a, image) : Rows{};
  auto load = [&](int64_t row, float* x) {
    revit::widen(revit::load<kUnit<X>>(static_cast<const X*>(a.x) + row * a.stride, column, a.dim, a.whole), x);
  };
  if (a.maximum) {
    float most[kUnit<X>], ties[kUnit<X>] = {};
    for (float& m : most) m = -INFINITY;
#pragma unroll 4
    for (int64_t row = rows.begin + group; row < rows.end; row += kGroups) {
      float x[kUnit<X>];
      load(row, x);
#pragma unroll
      for (int i = 0; i < kUnit<X>; ++i) {
        const float before = most[i];
        most[i] = larger(x[i], before);
        if (x[i] == most[i]) ties[i] = most[i] == before ? ties[i] + 1 : 1;
      }
    }
#pragma unroll
    for (int i = 0; i < kUnit<X>; ++i) {
      const int at = group * kTile<X> + lane * kUnit<X> + i;
      maxima[at] = most[i], counts[at] = ties[i];
    }
    __syncthreads();
  }
  const int own = threadIdx.x;
  if (own < kTile<X>) {
    float largest = -INFINITY, ties = 0, grad = 0;
    for (int i = 0; a.maximum && i < kGroups; ++i) largest = larger(maxima[i * kTile<X> + own], largest);
    for (int i = 0; a.maximum && i < kGroups; ++i)
      if (maxima[i * kTile<X> + own] == largest) ties += counts[i * kTile<X> + own];
    if (image < a.images && first + own < a.dim)
      grad = revit::load_one(static_cast<const X*>(a.grad) + image * a.dim + first + own);
    if (a.maximum && a.average) grad *= 0.5f;
    shares[own] = largest;
    shares[kTile<X> + own] = a.maximum ? grad / max(ties, 1.f) : 0;
    shares[2 * kTile<X> + own] = a.average ? grad / max(rows.end - rows.begin, int64_t{1}) : 0;
  }
  __syncthreads();
  float largest[kUnit<X>], share[kUnit<X>], even[kUnit<X>];
#pragma unroll
  for (int i = 0; i < kUnit<X>; ++i) {
    const int at = lane * kUnit<X> + i;
    largest[i] = shares[at], share[i] = shares[kTile<X> + at], even[i] = shares[2 * kTile<X> + at];
  }
  auto store = [&](int64_t row, const float* dx) {
    revit::store(revit::narrow<X, kUnit<X>>(dx), static_cast<X*>(a.y) + row * a.dim, column, a.dim, a.whole);
  };
  // Rows before the first image are of none, and zeros too.
  for (int64_t row = (image ? rows.first : 0) + group; row < rows.last; row += kGroups) {
    float dx[kUnit<X>] = {};
    if (row >= rows.begin && row < rows.end) {
      float x[kUnit<X>] = {};
      if (a.maximum) load(row, x);
#pragma unroll
      for (int i = 0; i < kUnit<X>; ++i) dx[i] = even[i] + (a.maximum && x[i] == largest[i] ? share[i] : 0);
    }
    store(row, dx);
  }
  const int64_t tail = a.images ? boundary(a, a.images) : 0;
  for (int64_t row = tail + image * kGroups + group; row < a.tokens; row += static_cast<int64_t>(gridDim.x) * kGroups) {
    const float zeros[kUnit<X>] = {};
    store(row, zeros);
  }
}

Arguments arguments(const std::optional<Tensor>& x, const Tensor& like, const std::string& kind,
                    const Tensor& cu_seqlens, int64_t tokens, int64_t prefix, bool include_prefix) {
  const int64_t dim = like.size(1), unit = like.scalar_type() == ScalarType::Float ? 4 : 8;
  const int64_t stride = x ? x->stride(0) : dim;
  STD_TORCH_CHECK(dim < 1 << 20, "dim must be below 2^20, got ", dim);
  Arguments a = {};
  a.x = x ? x->data_ptr() : nullptr;
  a.cu_seqlens = static_cast<const int32_t*>(cu_seqlens.data_ptr());
  a.images = cu_seqlens.size(0) - 1;
  a.tokens = tokens;
  a.stride = stride;
  a.prefix = include_prefix ? 0 : std::min(prefix, tokens);  // a larger one would overflow beside a row
  a.dim = static_cast<int>(dim);
  a.first_only = kind == "token";
  a.average = kind != "max";  // the mean of one token is that token
  a.maximum = kind == "max" || kind == "avgmax";
  a.whole = dim % unit == 0 && stride % unit == 0 && revit::on_vector(a.x);
  return a;
}

// x: (tokens, dim), rows may lie apart; cu_seqlens: (images + 1,) int32. Returns (images, dim).
Tensor pool_cuda(const Tensor& x, const Tensor& cu_seqlens, std::string kind, int64_t prefix, bool include_prefix) {
  Arguments a = arguments(x, x, kind, cu_seqlens, x.size(0), prefix, include_prefix);
  Tensor y = torch::stable::new_empty(x, {a.images, x.size(1)});
  a.y = y.data_ptr();
  if (!a.images) return y;
  const revit::Stream stream(x);
  revit::with_type(x.scalar_type(), [&](auto type) {
    using X = decltype(type);
    const dim3 grid(a.images, (a.dim + kTile<X> - 1) / kTile<X>);
    stream.launch(forward_kernel<X>, grid, kThreads, 2 * kGroups * kTile<X> * sizeof(float), a);
  });
  return y;
}

// grad: (images, dim); x is needed by the kinds that take a maximum. Returns (tokens, dim).
Tensor pool_backward_cuda(const Tensor& grad, const std::optional<Tensor>& x, const Tensor& cu_seqlens, int64_t tokens,
                          std::string kind, int64_t prefix, bool include_prefix) {
  Arguments a = arguments(x, grad, kind, cu_seqlens, tokens, prefix, include_prefix);
  STD_TORCH_CHECK(x || !a.maximum, "the gradient of a maximum needs x");
  Tensor dx = torch::stable::new_empty(grad, {tokens, grad.size(1)});
  a.grad = grad.data_ptr();
  a.y = dx.data_ptr();
  const revit::Stream stream(grad);
  revit::with_type(grad.scalar_type(), [&](auto type) {
    using X = decltype(type);
    const dim3 grid(std::max<int64_t>(a.images, 1), (a.dim + kTile<X> - 1) / kTile<X>);
    stream.launch(backward_kernel<X>, grid, kThreads, (2 * kGroups + 3) * kTile<X> * sizeof(float), a);
  });
  return dx;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(revit_kernels, m) {
  m.def("pool_cuda(Tensor x, Tensor cu_seqlens, str kind, int prefix, bool include_prefix) -> Tensor");
  m.def(
      "pool_backward_cuda(Tensor grad, Tensor? x, Tensor cu_seqlens, int tokens, str kind, int prefix,"
      " bool include_prefix) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(revit_kernels, REVIT_CUDA_KEY, m) {
  m.impl("pool_cuda", TORCH_BOX(&pool_cuda));
  m.impl("pool_backward_cuda", TORCH_BOX(&pool_backward_cuda));
}
