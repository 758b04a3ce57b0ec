// Which instruction set the kernels of this process use.
#pragma once

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace revit {

enum class Capability { kPlain, kAvx2, kAvx512, kAvx512Bf16 };

inline Capability supported() {
#if defined(__x86_64__)
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
    const char* names[] = {"plain", "avx2", "avx512", "avx512_bf16"};
    const char* wanted = std::getenv("REVIT_CPU_CAPABILITY");
    const Capability best = supported();
    if (!wanted || !*wanted) return best;
    for (int i = 0; i < 4; ++i)
      if (!std::strcmp(wanted, names[i])) return static_cast<Capability>(i) < best ? static_cast<Capability>(i) : best;
    throw std::runtime_error(std::string("REVIT_CPU_CAPABILITY must be plain, avx2, avx512 or avx512_bf16, got ") +
                             wanted);
  }();
  return chosen;
}

}  // namespace revit
