// Neighbouring numbers of a dtype in global memory, which are fp32 in registers, for CUDA.
#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

#include "cuda/ptx.h"

namespace revit {

// kCount numbers as they lie in memory.
template <class T, int kCount>
struct Vector {
  static constexpr int kWords = kCount * sizeof(T) / 4;
  static_assert(kWords == 2 || kWords % 4 == 0, "loaded 8 or 16 bytes at a time");
  uint32_t words[kWords];
};

// The numbers of a row of `dim` from `column` on, zeros past its end. `whole`: the row begins on a 16-byte boundary and
// its end splits no vector.
template <int kCount, class T>
__device__ __forceinline__ Vector<T, kCount> load(const T* row, int column, int dim, bool whole) {
  Vector<T, kCount> y = {};
  if (whole) {
    if (column >= dim) return y;
    if constexpr (y.kWords == 2) {
      const uint2 words = *reinterpret_cast<const uint2*>(row + column);
      y.words[0] = words.x, y.words[1] = words.y;
    } else {
#pragma unroll
      for (int i = 0; i < y.kWords; i += 4) {
        const uint4 words = reinterpret_cast<const uint4*>(row + column)[i / 4];
        y.words[i] = words.x, y.words[i + 1] = words.y, y.words[i + 2] = words.z, y.words[i + 3] = words.w;
      }
    }
    return y;
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (column + i >= dim) continue;
    if constexpr (sizeof(T) == 4)
      y.words[i] = reinterpret_cast<const uint32_t*>(row)[column + i];
    else
      y.words[i / 2] |= static_cast<uint32_t>(reinterpret_cast<const uint16_t*>(row)[column + i]) << 16 * (i % 2);
  }
  return y;
}

template <class T, int kCount>
__device__ __forceinline__ void store(const Vector<T, kCount>& x, T* row, int column, int dim, bool whole) {
  if (whole) {
    if (column >= dim) return;
    if constexpr (x.kWords == 2) {
      *reinterpret_cast<uint2*>(row + column) = make_uint2(x.words[0], x.words[1]);
    } else {
#pragma unroll
      for (int i = 0; i < x.kWords; i += 4)
        reinterpret_cast<uint4*>(row + column)[i / 4] =
            make_uint4(x.words[i], x.words[i + 1], x.words[i + 2], x.words[i + 3]);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (column + i >= dim) continue;
    if constexpr (sizeof(T) == 4)
      reinterpret_cast<uint32_t*>(row)[column + i] = x.words[i];
    else
      reinterpret_cast<uint16_t*>(row)[column + i] = static_cast<uint16_t>(x.words[i / 2] >> 16 * (i % 2));
  }
}

// To and from fp32, rounded to nearest.
template <class T, int kCount>
__device__ __forceinline__ void widen(const Vector<T, kCount>& x, float* y) {
#pragma unroll
  for (int i = 0; i < x.kWords; ++i)
    if constexpr (sizeof(T) == 4) {
      y[i] = __uint_as_float(x.words[i]);
    } else {
      const float2 pair = unpack(x.words[i], T{});
      y[2 * i] = pair.x, y[2 * i + 1] = pair.y;
    }
}

template <class T, int kCount>
__device__ __forceinline__ Vector<T, kCount> narrow(const float* x) {
  Vector<T, kCount> y;
#pragma unroll
  for (int i = 0; i < y.kWords; ++i)
    if constexpr (sizeof(T) == 4)
      y.words[i] = __float_as_uint(x[i]);
    else
      y.words[i] = pack(x[2 * i], x[2 * i + 1], T{});
  return y;
}

// One number alone.
template <class T>
__device__ __forceinline__ float load_one(const T* x) {
  if constexpr (sizeof(T) == 4)
    return *x;
  else
    return unpack(reinterpret_cast<const uint16_t*>(x)[0], T{}).x;
}

template <class T>
__device__ __forceinline__ void store_one(T* y, float x) {
  if constexpr (sizeof(T) == 4)
    *y = x;
  else
    reinterpret_cast<uint16_t*>(y)[0] = static_cast<uint16_t>(pack(x, 0, T{}));
}

// Whether `load` may be `whole` at this address.
inline bool on_vector(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

// f(T{}), T the C++ type of the dtype.
template <class F>
void with_type(torch::headeronly::ScalarType dtype, F f) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                  "no CUDA kernel for this dtype");
  if (dtype == ScalarType::Float) f(float{});
  if (dtype == ScalarType::BFloat16) f(bfloat16{});
  if (dtype == ScalarType::Half) f(float16{});
}

}  // namespace revit
