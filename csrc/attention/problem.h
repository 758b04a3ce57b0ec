// What one call computes: of attention, or of attention across frames.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <cstring>

#include "attention/attention.h"
#include "cpu/scratch.h"

namespace revit {
namespace {

// (tokens, heads, head_dim), the last dimension contiguous
template <class T>
struct Strided {
  T* data;
  int64_t token, head;  // strides, in elements
  T* at(int64_t t, int64_t h) const { return data + t * token + h * head; }
};

template <class T>
Strided<T> strided(const torch::stable::Tensor& x) {
  return {static_cast<T*>(x.data_ptr()), x.stride(0), x.stride(1)};
}

template <class T>
struct Problem {
  Strided<const T> q, k, v, grad;
  Strided<T> y, dq, dk, dv;
  float* lse;  // (tokens, heads)
  int64_t heads, dim;
  float scale;
  Rotation rotation;
};

template <class T>
Problem<T> problem_of(const torch::stable::Tensor& q, const torch::stable::Tensor& k, const torch::stable::Tensor& v,
                      double scale, const Rotation& rotation = {}) {
  Problem<T> p{};
  p.q = strided<const T>(q), p.k = strided<const T>(k), p.v = strided<const T>(v);
  p.heads = q.size(1), p.dim = q.size(2), p.scale = static_cast<float>(scale), p.rotation = rotation;
  return p;
}

// qkv: (tokens, 3, heads, head_dim); y: (tokens, heads, head_dim)
template <class T>
Problem<T> problem_of(const void* qkv, int64_t heads, int64_t dim, float scale, void* y, float* lse,
                      const Rotation& rotation = {}) {
  const int64_t width = heads * dim;
  const T* q = static_cast<const T*>(qkv);
  Problem<T> p{};
  p.q = {q, 3 * width, dim}, p.k = {q + width, 3 * width, dim}, p.v = {q + 2 * width, 3 * width, dim};
  p.y = {static_cast<T*>(y), width, dim};
  p.lse = lse, p.heads = heads, p.dim = dim, p.scale = scale, p.rotation = rotation;
  return p;
}

constexpr float kLog2E = 1.44269504088896341f;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace
}  // namespace revit
