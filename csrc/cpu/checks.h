// What kernels ask of their arguments before they read any: who calls an op directly is told, too.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>

namespace revit {

// Python makes a ValueError of it.
template <class... Parts>
[[noreturn]] __attribute__((noinline)) void refuse(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

#define REVIT_CHECK(condition, ...) \
  if (__builtin_expect(!(condition), 0)) ::revit::refuse(__VA_ARGS__)

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kAny = -1;               // size of an axis that is not asked about
constexpr int64_t kMostCells = INT32_MAX;  // of an axis, and of the grids of a menu: what placements can name

inline const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Byte:
      return "uint8";
    default:
      return "another dtype";
  }
}
inline bool is_number(ScalarType type) { return type == ScalarType::Float || type == ScalarType::BFloat16; }

inline void check_type(const char* name, const Tensor& x) {
  REVIT_CHECK(is_number(x.scalar_type()), name, " must be of float32 or bfloat16");
}

// All but the strides.
inline void check_sizes(const char* name, const Tensor& x, std::initializer_list<int64_t> sizes) {
  bool fits = x.dim() == static_cast<int64_t>(sizes.size());
  int64_t axis = 0;
  for (const int64_t size : sizes) fits = fits && (size == kAny || x.size(axis) == size), ++axis;
  if (__builtin_expect(fits, 1)) return;
  std::ostringstream text;
  text << name << " must be (";
  for (const int64_t size : sizes) size == kAny ? text << "any, " : text << size << ", ";
  text << "), got (";
  for (int64_t i = 0; i < x.dim(); ++i) text << x.size(i) << ", ";
  text << ")";
  throw std::invalid_argument(text.str());
}

// A contiguous tensor of these sizes and this type.
inline void check(const char* name, const Tensor& x, std::initializer_list<int64_t> sizes, ScalarType type) {
  check_sizes(name, x, sizes);
  REVIT_CHECK(x.scalar_type() == type, name, " must be of ", name_of(type), ", got ", name_of(x.scalar_type()));
  REVIT_CHECK(x.is_contiguous(), name, " must be contiguous");
}
inline void check(const char* name, const std::optional<Tensor>& x, std::initializer_list<int64_t> sizes,
                  ScalarType type) {
  if (x) check(name, *x, sizes, type);
}

// (..., columns) of fp32 or bf16, whose last axis lies side by side.
inline void check_rows(const char* name, const Tensor& x, std::initializer_list<int64_t> sizes) {
  check_sizes(name, x, sizes);
  check_type(name, x);
  REVIT_CHECK(x.size(-1) < 2 || x.stride(-1) == 1, "the last axis of ", name, " must be contiguous");
}

// Where each image's tokens begin and end, each within the tokens there are.
struct Boundaries {
  const int32_t* at;
  int64_t images, tokens;

  Boundaries(const char* name, const Tensor& cu_seqlens, int64_t tokens) : tokens(tokens) {
    check(name, cu_seqlens, {kAny}, ScalarType::Int);
    images = cu_seqlens.size(0) - 1;
    REVIT_CHECK(images >= 0, name, " must have images + 1 entries, got 0");
    at = static_cast<const int32_t*>(cu_seqlens.data_ptr());
    for (int64_t i = 0, last = 0; i <= images; last = at[i++])
      REVIT_CHECK(at[i] >= last && at[i] <= tokens, name, " must not decrease and must stay within the ", tokens,
                  " tokens, got ", at[i], " after ", last);
  }
  int64_t length(int64_t image) const { return static_cast<int64_t>(at[image + 1]) - at[image]; }
};

}  // namespace revit
