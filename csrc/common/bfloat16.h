// bfloat16 on the host, in bulk, for each instruction set: the loader picks the best that the machine has.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#define REVIT_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define REVIT_CLONES
#endif

namespace revit {

typedef float Vector __attribute__((vector_size(64), aligned(4), may_alias));

// To the nearest bfloat16, ties to even; NaN stays NaN.
__attribute__((always_inline)) inline uint16_t to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

REVIT_CLONES static void narrow(uint16_t* y, const float* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = to_bfloat16(x[i]);
}

REVIT_CLONES static void widen(float* y, const uint16_t* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = static_cast<uint32_t>(x[i]) << 16;
    std::memcpy(y + i, &bits, 4);
  }
}

}  // namespace revit
