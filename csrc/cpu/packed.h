// A weight packed for the matrix product, and where its parts lie in its bytes.
#pragma once

#include <algorithm>
#include <cstdint>

namespace revit {

enum class Kind : int64_t { kFloat, kBfloat16, kInt8 };
enum class Activation : int64_t { kGelu, kGeluTanh, kQuickGelu, kNone, kSilu };

struct Span {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
  // The i-th of n parts, as even as can be.
  Span part(int64_t i, int64_t n) const { return {begin + size() * i / n, begin + size() * (i + 1) / n}; }
};

constexpr int64_t kAlign = 64;
inline int64_t aligned(int64_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

// y = gamma * (x W^T + bias). The weight lies in panels of a few columns of W^T; see matmul.h.
struct Linear {
  char* panels = nullptr;
  float *bias = nullptr, *gamma = nullptr;
  float* scale = nullptr;   // int8: of each output's weights
  int32_t* sums = nullptr;  // int8: the sum of each output's weights
  int64_t in = 0, out = 0, unit = 0;
  char* end = nullptr;

  Linear() = default;
  // out is rounded up to whole vectors, `lanes` long; the parts are as long as that. `unit`: bytes of a weight.
  Linear(char* bytes, int64_t in, int64_t out, int64_t lanes, int64_t unit) : in(in), out(out), unit(unit) {
    const int64_t columns = (out + lanes - 1) / lanes * lanes, part = aligned(columns * 4);
    panels = bytes;
    bias = reinterpret_cast<float*>(bytes + aligned(columns * in * unit));
    gamma = bias + part / 4, scale = gamma + part / 4;
    sums = reinterpret_cast<int32_t*>(scale + part / 4);
    end = reinterpret_cast<char*>(sums) + part;
  }
};

// How a kind of weights is laid out on this machine.
struct Layout {
  int64_t unit;   // bytes of a weight; 0: there are no instructions for this kind
  int64_t lanes;  // columns are rounded up to these
  int64_t panel;  // columns that are read together
};

}  // namespace revit
