// What one call computes.
#pragma once

#include <cstdint>

#include "cpu/scratch.h"
#include "temporal_attention/temporal_attention.h"

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

// Some sequences of a clip: a lane for each head of each position, numbered head by head.
struct Item {
  Clip clip;
  int64_t begin, count;  // lanes
};

constexpr float kLog2E = 1.44269504088896341f;

}  // namespace
}  // namespace revit
