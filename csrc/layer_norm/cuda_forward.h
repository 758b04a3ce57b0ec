// The kernel of the forward pass.
#pragma once

#include "layer_norm/cuda_rows.h"

namespace {

constexpr int kForwardTokens = 4;  // of a run at most

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

}  // namespace
