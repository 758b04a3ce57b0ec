// What one call computes.
#pragma once

#include <cstdint>

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
};

// The sequences of a clip: for each position from the prefix on, a row in each frame, `stride` rows apart.
struct Clip {
  int64_t first, positions, stride, frames;
};

// Some of them: a lane for each head of each position, numbered head by head.
struct Item {
  Clip clip;
  int64_t begin, count;  // lanes
};

constexpr float kLog2E = 1.44269504088896341f;

}  // namespace
}  // namespace revit
