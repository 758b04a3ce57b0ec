// Which instruction set the kernels of this process use, and the kernels compiled for each: the header that the macro
// KERNELS names is included once for each set, in a namespace of its own. EVERY_ISA_PICK(function) is the one to call.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#define REVIT_X86 1
#pragma GCC diagnostic ignored "-Wuninitialized"  // of g++ 12, in its own intrinsics
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#else
#define REVIT_X86 0
#endif

#define INLINE __attribute__((always_inline)) inline
#define INLINE_LAMBDA __attribute__((always_inline))

namespace revit {

enum class Capability { kPlain, kAvx2, kAvx512, kAvx512Bf16 };
constexpr const char* kCapabilities[] = {"plain", "avx2", "avx512", "avx512_bf16"};

inline Capability supported() {
#if REVIT_X86
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Capability::kPlain;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
    return Capability::kAvx2;
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni") ? Capability::kAvx512Bf16
                                                                                      : Capability::kAvx512;
#else
  return Capability::kPlain;
#endif
}

// The best that the machine has, or the lesser one that REVIT_CPU_CAPABILITY names; read once per process.
inline Capability capability() {
  static const Capability chosen = [] {
    const char* wanted = std::getenv("REVIT_CPU_CAPABILITY");
    const Capability best = supported();
    if (!wanted || !*wanted) return best;
    for (int i = 0; i < 4; ++i)
      if (!std::strcmp(wanted, kCapabilities[i])) return std::min(static_cast<Capability>(i), best);
    throw std::runtime_error(std::string("REVIT_CPU_CAPABILITY must be plain, avx2, avx512 or avx512_bf16, got ") +
                             wanted);
  }();
  return chosen;
}

struct Bfloat16 {
  uint16_t bits;
};

}  // namespace revit

#ifdef KERNELS

namespace revit {
namespace {

#if REVIT_X86

#pragma GCC push_options
#pragma GCC target("avx512bf16,avx512vnni,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
namespace avx512bf16 {
#define LANES 16
#define BFLOAT16_INSTRUCTIONS  // GCC defines no __AVX512BF16__ behind a pragma
#include "cpu/simd.h"
#include KERNELS
#undef BFLOAT16_INSTRUCTIONS
#undef LANES
}  // namespace avx512bf16
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
namespace avx512 {
#define LANES 16
#include "cpu/simd.h"
#include KERNELS
#undef LANES
}  // namespace avx512
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
#define LANES 8
#include "cpu/simd.h"
#include KERNELS
#undef LANES
}  // namespace avx2
#pragma GCC pop_options

#endif

namespace plain {
#define LANES 4
#include "cpu/simd.h"
#include KERNELS
#undef LANES
}  // namespace plain

#if REVIT_X86

template <class F>
F pick(F bf16, F avx512, F avx2, F plain) {
  switch (capability()) {
    case Capability::kAvx512Bf16:
      return bf16;
    case Capability::kAvx512:
      return avx512;
    case Capability::kAvx2:
      return avx2;
    default:
      return plain;
  }
}

#define EVERY_ISA_PICK(...)                                                                                    \
  ::revit::pick(&::revit::avx512bf16::__VA_ARGS__, &::revit::avx512::__VA_ARGS__, &::revit::avx2::__VA_ARGS__, \
                &::revit::plain::__VA_ARGS__)

#else

#define EVERY_ISA_PICK(...) (::revit::capability(), &::revit::plain::__VA_ARGS__)

#endif

}  // namespace
}  // namespace revit

#endif
