// The kernels of the backward pass: tokens, then the sums of parameters.
#pragma once

#include "layer_norm/cuda_rows.h"

namespace {

template <class X>
constexpr int kBackwardTokens = sizeof(X) == 4 ? 1 : 2;  // of a run: what the registers hold

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

}  // namespace
