// What one call computes.
#pragma once

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
struct Problem {
  Strided<const T> q, k, v, grad;
  Strided<T> y, dq, dk, dv;
  float* lse;  // (tokens, heads)
  int64_t heads, dim;
  float scale;
  Rotation rotation;
};

using Item = Piece;

constexpr float kLog2E = 1.44269504088896341f;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace
}  // namespace revit
