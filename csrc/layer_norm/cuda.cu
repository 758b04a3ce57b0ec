#include <algorithm>
#include <initializer_list>
#include <optional>
#include <tuple>

#include "cuda/launch.h"
#include "cuda/vectors.h"

using torch::stable::Tensor;

namespace {

// A block walks a range of tokens, several at a time: runs of tokens of one affine, whose loads are in flight together.
// Each thread owns kColumns columns of all of them, so that the affine, and sums over tokens, stay in its registers.
constexpr int kColumns = 8, kMostThreads = 512;
constexpr int kForwardTokens = 4;  // of a run at most
template <class X>
constexpr int kBackwardTokens = sizeof(X) == 4 ? 1 : 2;  // what the registers hold

enum class Kind : int { kFloat32, kBFloat16, kFloat16 };

// A parameter in its own dtype; `data` is null where the user gave none. It is read once for many tokens, so the
// kernels branch on its dtype instead of being compiled for each.
template <class Data>
struct Parameter {
  Data* data;
  Kind kind;
};

// Data of x's dtype and of branch's is `void`. whole: rows can be read a vector at a time.
struct ForwardArguments {
  const void *x, *branch;
  Parameter<const void> weight, bias, gamma;
  const int32_t* row;
  void *y, *sum;
  float *mean, *rstd;
  int64_t tokens, tokens_per_block;
  int dim, lengths;
  float eps;
  bool rms, whole;
};

// partial: (blocks, weight_rows + bias_rows + gamma_rows, threads * kColumns), what each block adds to the gradients of
// the parameters; touched: (blocks, lengths), whether the rows of an affine were written.
struct BackwardArguments {
  const void *dy, *dsum, *sum, *branch;
  Parameter<const void> weight, gamma;
  const float *mean, *rstd;
  const int32_t* row;
  void *dx, *dbranch;
  float* partial;
  int32_t* touched;
  int64_t tokens, tokens_per_block;
  int dim, lengths, weight_rows, bias_rows, gamma_rows;
  bool rms, whole;
};

struct ReduceArguments {
  const float* partial;
  const int32_t* touched;
  Parameter<void> dweight, dbias, dgamma;
  int64_t blocks;
  int dim, width, lengths, weight_rows, bias_rows, gamma_rows;
};

// Where a thread's columns are: kUnit neighbours, then as many a whole block further on.
template <int kUnit>
struct Columns {
  int dim;
  bool whole;

  __device__ __forceinline__ int first(int vector) const {
    return (vector * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)) * kUnit;
  }
  __device__ __forceinline__ bool inside(int i) const { return first(i / kUnit) + i % kUnit < dim; }
};

// A thread's numbers of one row, as they lie in memory.
template <class T, int kUnit>
struct Own {
  revit::Vector<T, kUnit> vectors[kColumns / kUnit];

  __device__ __forceinline__ void load(const void* base, int64_t row, const Columns<kUnit>& columns) {
    const T* from = static_cast<const T*>(base) + row * columns.dim;
#pragma unroll
    for (int v = 0; v < kColumns / kUnit; ++v)
      vectors[v] = revit::load<kUnit>(from, columns.first(v), columns.dim, columns.whole);
  }
  __device__ __forceinline__ void store(void* base, int64_t row, const Columns<kUnit>& columns) const {
    T* to = static_cast<T*>(base) + row * columns.dim;
#pragma unroll
    for (int v = 0; v < kColumns / kUnit; ++v)
      revit::store(vectors[v], to, columns.first(v), columns.dim, columns.whole);
  }
  __device__ __forceinline__ void widen(float (&y)[kColumns]) const {
#pragma unroll
    for (int v = 0; v < kColumns / kUnit; ++v) revit::widen(vectors[v], y + v * kUnit);
  }
  __device__ __forceinline__ void narrow(const float (&x)[kColumns]) {
#pragma unroll
    for (int v = 0; v < kColumns / kUnit; ++v) vectors[v] = revit::narrow<T, kUnit>(x + v * kUnit);
  }
};

template <class T, int kUnit>
__device__ __forceinline__ void load_widened(float (&y)[kColumns], const void* base, int64_t row,
                                             const Columns<kUnit>& columns) {
  Own<T, kUnit> own;
  own.load(base, row, columns);
  own.widen(y);
}

// The thread's numbers of a row of a parameter, `otherwise` where the user gave none.
template <int kUnit>
__device__ __forceinline__ void load_parameter(float (&y)[kColumns], const Parameter<const void>& parameter,
                                               int64_t row, float otherwise, const Columns<kUnit>& columns) {
#pragma unroll
  for (float& v : y) v = otherwise;
  if (!parameter.data) return;
  if (parameter.kind == Kind::kFloat32)
    load_widened<float>(y, parameter.data, row, columns);
  else if (parameter.kind == Kind::kBFloat16)
    load_widened<revit::bfloat16>(y, parameter.data, row, columns);
  else
    load_widened<revit::float16>(y, parameter.data, row, columns);
}

template <class T, int kUnit>
__device__ __forceinline__ void store_rounded(const float (&x)[kColumns], void* base, int64_t row,
                                              const Columns<kUnit>& columns) {
  Own<T, kUnit> own;
  own.narrow(x);
  own.store(base, row, columns);
}

// How many tokens from `token` on, at most kTokens, are on the affine of the first, and that affine: -1 for no image.
template <int kTokens>
__device__ __forceinline__ int run_of(const int32_t* row, int lengths, int64_t token, int64_t end, int* affine) {
  int tokens = 0;
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    if (token + t >= end) continue;
    const int own = row ? max(min(row[token + t], lengths - 1), -1) : 0;
    if (t == 0) *affine = own;
    if (tokens == t && own == *affine) ++tokens;
  }
  return tokens;
}

// Sums over the threads of a block, in an order that only their number decides.
class BlockSum {
 public:
  static constexpr int kWarps = kMostThreads / 32, kMostNumbers = 4;
  static constexpr int kShared = 2 * kWarps * kMostNumbers * sizeof(float);

  __device__ explicit BlockSum(unsigned char* shared) : shared_(reinterpret_cast<float*>(shared)) {}

  template <int kCount>
  __device__ __forceinline__ void operator()(float (&v)[kCount]) {
    static_assert(kCount <= kMostNumbers, "");
#pragma unroll
    for (int step = 16; step; step /= 2)
#pragma unroll
      for (float& each : v) each += __shfl_xor_sync(0xffffffffu, each, step);
    const int warps = blockDim.x / 32;
    if (warps == 1) return;
    float* shared = shared_ + turn_ * kWarps * kMostNumbers;
    turn_ ^= 1;  // while some still read the last sums
    if (threadIdx.x % 32 == 0)
#pragma unroll
      for (int i = 0; i < kCount; ++i) shared[threadIdx.x / 32 * kCount + i] = v[i];
    __syncthreads();
#pragma unroll
    for (float& each : v) each = 0;
    for (int warp = 0; warp < warps; ++warp)
#pragma unroll
      for (int i = 0; i < kCount; ++i) v[i] += shared[warp * kCount + i];
  }

 private:
  float* shared_;
  int turn_ = 0;
};

template <class X, class B>
__global__ void __launch_bounds__(kMostThreads) forward_kernel(const ForwardArguments a) {
  constexpr int kTokens = kForwardTokens, kUnit = 16 / sizeof(X);
  REVIT_DYNAMIC_SHARED(shared);
  BlockSum block_sum(shared);
  const Columns<kUnit> columns = {a.dim, a.whole};
  const int64_t begin = blockIdx.x * a.tokens_per_block, end = min(begin + a.tokens_per_block, a.tokens);
  float weight[kColumns], bias[kColumns];
  int current = -1, affine = -1;  // of weight and bias
  for (int64_t token = begin, run; token < end; token += run) {
    run = run_of<kTokens>(a.row, a.lengths, token, end, &affine);
    if (affine < 0) {
      const float zeros[kColumns] = {};
      for (int t = 0; t < run; ++t) {
        store_rounded<X>(zeros, a.y, token + t, columns);
        if (a.branch) store_rounded<X>(zeros, a.sum, token + t, columns);
        if (threadIdx.x == 0) a.mean[token + t] = a.rstd[token + t] = 0;
      }
      continue;
    }
    Own<X, kUnit> x[kTokens];
    Own<B, kUnit> branch[kTokens];
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      x[t] = {}, branch[t] = {};
      if (t >= run) continue;
      x[t].load(a.x, token + t, columns);
      if (a.branch) branch[t].load(a.branch, token + t, columns);
    }
    if (affine != current) {
      load_parameter(weight, a.weight, affine, 1, columns);
      load_parameter(bias, a.bias, affine, 0, columns);
      current = affine;
    }
    float sum[kTokens][kColumns];
    if (a.branch) {
      float gamma[kColumns];
      load_parameter(gamma, a.gamma, 0, 1, columns);
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        float added[kColumns];
        x[t].widen(sum[t]);
        branch[t].widen(added);
#pragma unroll
        for (int i = 0; i < kColumns; ++i) sum[t][i] += gamma[i] * added[i];
        x[t].narrow(sum[t]);
        if (t < run) x[t].store(a.sum, token + t, columns);
      }
    }
    float mean[kTokens] = {}, rstd[kTokens] = {};
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      x[t].widen(sum[t]);
#pragma unroll
      for (float v : sum[t]) mean[t] += v;
    }
    if (a.rms) {
#pragma unroll
      for (float& m : mean) m = 0;
    } else {
      block_sum(mean);
#pragma unroll
      for (float& m : mean) m /= a.dim;
    }
#pragma unroll
    for (int t = 0; t < kTokens; ++t)
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        sum[t][i] = columns.inside(i) ? sum[t][i] - mean[t] : 0;
        rstd[t] += sum[t][i] * sum[t][i];
      }
    block_sum(rstd);
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      rstd[t] = 1 / sqrtf(rstd[t] / a.dim + a.eps);
      if (t >= run) continue;
#pragma unroll
      for (int i = 0; i < kColumns; ++i) sum[t][i] = sum[t][i] * rstd[t] * weight[i] + bias[i];
      store_rounded<X>(sum[t], a.y, token + t, columns);
      if (threadIdx.x == 0) a.mean[token + t] = mean[t], a.rstd[token + t] = rstd[t];
    }
  }
}

template <class X, class B>
__global__ void __launch_bounds__(kMostThreads) backward_kernel(const BackwardArguments a) {
  constexpr int kTokens = kBackwardTokens<X>, kUnit = 16 / sizeof(X);
  REVIT_DYNAMIC_SHARED(shared);
  BlockSum block_sum(shared);
  const Columns<kUnit> columns = {a.dim, a.whole};
  const int64_t begin = blockIdx.x * a.tokens_per_block, end = min(begin + a.tokens_per_block, a.tokens);
  const int width = blockDim.x * kColumns;
  int32_t* touched = a.touched + static_cast<int64_t>(blockIdx.x) * a.lengths;
  float* partial = a.partial + static_cast<int64_t>(blockIdx.x) * (a.weight_rows + a.bias_rows + a.gamma_rows) * width;
  for (int i = threadIdx.x; i < a.lengths; i += blockDim.x) touched[i] = 0;
  __syncthreads();

  float dweight[kColumns] = {}, dbias[kColumns] = {}, dgamma[kColumns] = {};
  float weight[kColumns], gamma[kColumns];
  int current = -1, affine = -1;  // of weight, and of the sums in dweight and dbias
  load_parameter(gamma, a.gamma, 0, 1, columns);
  // A block's partial sums are padded: every column has a place, and no other thread reads or writes it.
  auto add_to = [&](int row, float (&v)[kColumns], bool seen) {
    const Columns<kUnit> padded = {width, true};
    if (seen) {
      float before[kColumns];
      load_widened<float>(before, partial, row, padded);
#pragma unroll
      for (int i = 0; i < kColumns; ++i) v[i] += before[i];
    }
    store_rounded<float>(v, partial, row, padded);
#pragma unroll
    for (float& each : v) each = 0;
  };
  auto flush = [&] {
    if (current < 0) return;
    const bool seen = touched[current];
    if (a.weight_rows) add_to(current, dweight, seen);
    if (a.bias_rows) add_to(a.weight_rows + current, dbias, seen);
    __syncthreads();  // all have seen it before it changes; the next to read it waits in a flush between
    if (threadIdx.x == 0) touched[current] = 1;
  };
  for (int64_t token = begin, run; token < end; token += run) {
    run = run_of<kTokens>(a.row, a.lengths, token, end, &affine);
    if (affine < 0) {
      const float zeros[kColumns] = {};
      for (int t = 0; t < run; ++t) {
        store_rounded<X>(zeros, a.dx, token + t, columns);
        if (a.branch) store_rounded<B>(zeros, a.dbranch, token + t, columns);
      }
      continue;
    }
    Own<X, kUnit> dy[kTokens], sum[kTokens], dsum[kTokens];
    Own<B, kUnit> branch[kTokens];
    float mean[kTokens] = {}, rstd[kTokens] = {};
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      dy[t] = {}, sum[t] = {}, dsum[t] = {}, branch[t] = {};
      if (t >= run) continue;
      dy[t].load(a.dy, token + t, columns);
      sum[t].load(a.sum, token + t, columns);
      if (a.dsum) dsum[t].load(a.dsum, token + t, columns);
      if (a.branch) branch[t].load(a.branch, token + t, columns);
      mean[t] = a.mean[token + t], rstd[t] = a.rstd[token + t];
    }
    if (affine != current) {
      flush();
      load_parameter(weight, a.weight, affine, 1, columns);
      current = affine;
    }
    // Of each token: how far its scaled gradient goes along ones, and along the normalised token.
    float along[2 * kTokens] = {};
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      float grad[kColumns], normed[kColumns];
      dy[t].widen(grad);
      sum[t].widen(normed);
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        normed[i] = (normed[i] - mean[t]) * rstd[t];
        dweight[i] += grad[i] * normed[i];
        dbias[i] += grad[i];
        along[2 * t] += grad[i] * weight[i];
        along[2 * t + 1] += grad[i] * weight[i] * normed[i];
      }
    }
    block_sum(along);
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      if (t >= run) continue;
      const float along_ones = a.rms ? 0 : along[2 * t] / a.dim, along_normed = along[2 * t + 1] / a.dim;
      float grad[kColumns], normed[kColumns], ds[kColumns];
      dy[t].widen(grad);
      sum[t].widen(normed);
      dsum[t].widen(ds);
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        normed[i] = (normed[i] - mean[t]) * rstd[t];
        ds[i] += (grad[i] * weight[i] - along_ones - normed[i] * along_normed) * rstd[t];
      }
      store_rounded<X>(ds, a.dx, token + t, columns);
      if (!a.branch) continue;
      float scaled[kColumns];
      branch[t].widen(scaled);
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        dgamma[i] += ds[i] * scaled[i];
        scaled[i] = ds[i] * gamma[i];
      }
      store_rounded<B>(scaled, a.dbranch, token + t, columns);
    }
  }
  flush();
  if (a.gamma_rows) add_to(a.weight_rows + a.bias_rows, dgamma, false);
}

constexpr int kReduceColumns = 32, kReduceGroups = 8;

// A row of the parameters' gradients, and some columns: the blocks' partial sums in turn, every kReduceGroups-th by one
// group of threads.
__global__ void __launch_bounds__(kReduceColumns* kReduceGroups) reduce_kernel(const ReduceArguments a) {
  REVIT_DYNAMIC_SHARED(shared);  // [kReduceGroups, kReduceColumns]
  float* sums = reinterpret_cast<float*>(shared);
  const int row = blockIdx.x, affine_rows = a.weight_rows + a.bias_rows, group = threadIdx.x / kReduceColumns;
  const int column = blockIdx.y * kReduceColumns + threadIdx.x % kReduceColumns;
  float sum = 0;
#pragma unroll 4
  for (int64_t block = group; block < a.blocks; block += kReduceGroups)
    if (column < a.dim && (row >= affine_rows || a.touched[block * a.lengths + row % a.lengths]))
      sum += a.partial[(block * (affine_rows + a.gamma_rows) + row) * a.width + column];
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (group || column >= a.dim) return;
  for (int i = 1; i < kReduceGroups; ++i) sum += sums[i * kReduceColumns + threadIdx.x];
  // Member by member: a reference to one of three would put all of them into local memory.
  void* data = row < a.weight_rows ? a.dweight.data : row < affine_rows ? a.dbias.data : a.dgamma.data;
  const Kind kind = row < a.weight_rows ? a.dweight.kind : row < affine_rows ? a.dbias.kind : a.dgamma.kind;
  const int first = row < a.weight_rows ? 0 : row < affine_rows ? a.weight_rows : affine_rows;
  const int64_t at = static_cast<int64_t>(row - first) * a.dim + column;
  if (kind == Kind::kFloat32)
    revit::store_one(static_cast<float*>(data) + at, sum);
  else if (kind == Kind::kBFloat16)
    revit::store_one(static_cast<revit::bfloat16*>(data) + at, sum);
  else
    revit::store_one(static_cast<revit::float16*>(data) + at, sum);
}

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

bool whole_vectors(int64_t dim, std::initializer_list<const void*> addresses) {
  return dim % kColumns == 0 && std::all_of(addresses.begin(), addresses.end(), revit::on_vector);
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
