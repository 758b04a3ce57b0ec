// Compiles the header named by the macro KERNELS once for each instruction set, in a namespace of its own.
// EVERY_ISA_PICK(function) is the best of them that this machine runs.

#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/capability.h"

struct Bfloat16 {
  uint16_t bits;
};

namespace {

#if defined(__x86_64__)

#pragma GCC push_options
#pragma GCC target("avx512bf16,avx512vnni,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
namespace avx512bf16 {
#define LANES 16
#define BFLOAT16_INSTRUCTIONS  // GCC defines no __AVX512BF16__ behind a pragma
#include "common/lanes.h"
#include KERNELS
#undef BFLOAT16_INSTRUCTIONS
#undef LANES
}  // namespace avx512bf16
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
namespace avx512 {
#define LANES 16
#include "common/lanes.h"
#include KERNELS
#undef LANES
}  // namespace avx512
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
#define LANES 8
#include "common/lanes.h"
#include KERNELS
#undef LANES
}  // namespace avx2
#pragma GCC pop_options

#endif

namespace plain {
#define LANES 4
#include "common/lanes.h"
#include KERNELS
#undef LANES
}  // namespace plain

#if defined(__x86_64__)

template <class F>
F pick(F bf16, F avx512, F avx2, F plain) {
  switch (revit::capability()) {
    case revit::Capability::kAvx512Bf16:
      return bf16;
    case revit::Capability::kAvx512:
      return avx512;
    case revit::Capability::kAvx2:
      return avx2;
    default:
      return plain;
  }
}

#define EVERY_ISA_PICK(function) pick(&avx512bf16::function, &avx512::function, &avx2::function, &plain::function)

#else

#define EVERY_ISA_PICK(function) &plain::function

#endif

}  // namespace
