// What one call of a block computes: pointers into tensors, and where a weight's parts lie in its packed bytes.
#pragma once

#include <cstdint>

enum class Activation : int64_t { kGelu, kGeluTanh, kQuickGelu };
enum class Kind : int64_t { kFloat, kBfloat16, kInt8 };

constexpr int64_t kAlign = 64;
inline int64_t aligned(int64_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

// y = gamma * (x W^T + bias). The weight lies in panels of a few columns of W^T; see product.h.
struct Linear {
  char* panels;
  float *bias, *gamma;
  float* scale;   // int8: of each output's weights
  int32_t* sums;  // int8: the sum of each output's weights
  int64_t in, out;

  // out is rounded up to whole vectors, `lanes` long; the parts are as long as that. `unit`: bytes of a weight.
  Linear(char* bytes, int64_t in, int64_t out, int64_t lanes, int64_t unit) : in(in), out(out) {
    const int64_t columns = (out + lanes - 1) / lanes * lanes, part = aligned(columns * 4);
    panels = bytes;
    bias = reinterpret_cast<float*>(bytes + aligned(columns * in * unit));
    gamma = bias + part / 4, scale = gamma + part / 4;
    sums = reinterpret_cast<int32_t*>(scale + part / 4);
    end = reinterpret_cast<char*>(sums) + part;
  }
  char* end;
};

// How a kind of weights is laid out on this machine.
struct Layout {
  int64_t unit;   // bytes of a weight; 0: there are no instructions for this kind
  int64_t lanes;  // columns are rounded up to these
};

struct Norm {
  const float *weight, *bias;  // (lengths, dim)
  int64_t lengths;
  float eps;
};

// x, qkv, attended, y are of the activations' type: fp32 or bf16.
struct Problem {
  const void *x, *attended;
  void *qkv, *y;
  int64_t between_first;  // the token that qkv and attended begin with
  const int32_t* row;  // which affine each token uses; null: the first
  int64_t dim, attended_dim, hidden;
  Norm norm1, norm2;
  Linear to_qkv, proj, fc1, fc2;
  Activation activation;
  Kind kind;     // of the weights
  bool is_bf16;  // the activations
};

struct Shape {
  int64_t rows, bytes;  // how many rows a thread takes at a time, and the memory it needs for them
};
