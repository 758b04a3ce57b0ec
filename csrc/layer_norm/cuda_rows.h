// Rows of tokens and of parameters as the threads of a block own them, and sums over the block.
#pragma once

#include "cuda/vectors.h"

namespace {

// A block walks a range of tokens, several at a time: runs of tokens of one affine, whose loads are in flight together.
// Each thread owns kColumns columns of all of them, so that the affine, and sums over tokens, stay in its registers.
constexpr int kColumns = 8, kMostThreads = 512;

enum class Kind : int { kFloat32, kBFloat16, kFloat16 };

// A parameter in its own dtype; `data` is null where the user gave none. It is read once for many tokens, so the
// kernels branch on its dtype instead of being compiled for each.
template <class Data>
struct Parameter {
  Data* data;
  Kind kind;
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

}  // namespace
