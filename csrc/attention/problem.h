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

// Angles by which pairs of channels of queries and keys are turned; no cos where none are.
struct Rotation {
  const float *cos = nullptr, *sin = nullptr;  // (positions, pairs), or (positions, heads, pairs)
  const int32_t* row = nullptr;                // (tokens,), negative for a token that stays as it is
  int64_t position = 0, head = 0;              // strides; that of heads is 0 where they share their angles
  int64_t pairs = 0;
  bool half = false;  // channel c belongs to c + pairs, not to its neighbour
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
