// What Hopper (sm_90a) adds: copies of boxes by the tensor memory accelerator, barriers in shared memory that count
// bytes, and products of 64 rows that four warps start together and wait for later.
#pragma once

#include <cstdint>

#include "cuda/ptx.h"
#include "cuda/tensor_map.h"

// Whether this pass of the compiler can have the instructions: they are Hopper's alone, no newer GPU has them.
#if defined(REVIT_CUDA_ON_HOST) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define REVIT_HOPPER_CODE 1
#endif

namespace revit {

// How rows of 32, 64 or 128 bytes lie in shared memory: 16-byte pieces of a row change places, so that one piece of
// each of eight rows is in all banks. The numbers are those of the operand's descriptor.
template <int kBytes>
constexpr uint64_t kSwizzle = kBytes == 128 ? 1 : kBytes == 64 ? 2 : 3;

// An operand in shared memory, in rows of kBytes: rows beyond eight follow at once, columns beyond kBytes after `next`.
template <int kBytes>
__device__ inline uint64_t operand(SharedAddress start, int next) {
  constexpr uint64_t kEight = kBytes * 8 / 16;
  const uint32_t low = (static_cast<uint32_t>(start) & 0x3ffff) >> 4 | static_cast<uint32_t>(next / 16) << 16;
  return (kSwizzle<kBytes> << 62 | kEight << 32) | low;
}

#ifndef REVIT_CUDA_ON_HOST

using Barrier = uint64_t;  // in shared memory

__device__ __forceinline__ void init_barrier(Barrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrives, and makes the phase wait for so many bytes of copies as well.
__device__ __forceinline__ void arrive_expecting(Barrier* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

// Until the phase of this parity is complete; the one before the first counts as complete.
__device__ __forceinline__ void wait(Barrier* barrier, int parity) {
  uint32_t done;
  do {
    asm volatile(
        "{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  } while (!done);
}

// Orders what this thread wrote to shared memory before what the copies and the products do there later.
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void prefetch_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Starts copying a box of (columns, heads, tokens) from these coordinates on; zeros where it leaves the tensor.
__device__ __forceinline__ void copy_box(SharedAddress to, const TensorMap* map, int column, int head, int token,
                                         Barrier* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];"
      ::"r"(to), "l"(map), "r"(column), "r"(head), "r"(token), "r"(shared_address(barrier))
      : "memory");
}

__device__ __forceinline__ void store_zeros(SharedAddress to) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(to), "r"(0) : "memory");
}

// A warpgroup hands registers back, or waits for more: so many for each thread from here on, a multiple of 8.
template <int kRegisters>
__device__ __forceinline__ void shrink_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void grow_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// The four warps of a warpgroup, one of the first four, wait for one another. Constants, so that the compiler sees
// which of the block's 16 barriers are in use.
__device__ __forceinline__ void sync_warpgroup(int warpgroup) {
  if (warpgroup == 0)
    asm volatile("bar.sync 1, 128;" ::: "memory");
  else if (warpgroup == 1)
    asm volatile("bar.sync 2, 128;" ::: "memory");
  else if (warpgroup == 2)
    asm volatile("bar.sync 3, 128;" ::: "memory");
  else
    asm volatile("bar.sync 4, 128;" ::: "memory");
}

// Before products that read registers written since the last.
__device__ __forceinline__ void fence_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until all groups of products but the last kPending are done: before that, their sums are not to be touched.
template <int kPending>
__device__ __forceinline__ void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// d (64 x TILES * 8, fp32, 16 rows to a warp) += a (64 x 16, in registers) b (16 x TILES * 8, an operand in shared
// memory: for kTransposed its rows are those of b, else its columns). Without `add`, d is overwritten. ADD and REST
// name what comes behind the sums, in the assembler's count.
#define REVIT_SUMS(t) "+f"(d[t][0]), "+f"(d[t][1]), "+f"(d[t][2]), "+f"(d[t][3])
#define REVIT_SUMS2 REVIT_SUMS(0), REVIT_SUMS(1)
#define REVIT_SUMS4 REVIT_SUMS2, REVIT_SUMS(2), REVIT_SUMS(3)
#define REVIT_SUMS6 REVIT_SUMS4, REVIT_SUMS(4), REVIT_SUMS(5)
#define REVIT_SUMS8 REVIT_SUMS6, REVIT_SUMS(6), REVIT_SUMS(7)
#define REVIT_SUMS12 REVIT_SUMS8, REVIT_SUMS(8), REVIT_SUMS(9), REVIT_SUMS(10), REVIT_SUMS(11)
#define REVIT_SUMS16 REVIT_SUMS12, REVIT_SUMS(12), REVIT_SUMS(13), REVIT_SUMS(14), REVIT_SUMS(15)
#define REVIT_NAMES2 "%0, %1, %2, %3, %4, %5, %6, %7"
#define REVIT_NAMES4 REVIT_NAMES2 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define REVIT_NAMES6 REVIT_NAMES4 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define REVIT_NAMES8 REVIT_NAMES6 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define REVIT_NAMES12 REVIT_NAMES8 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define REVIT_NAMES16 REVIT_NAMES12 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

#define REVIT_MULTIPLY_OF(TILES, COLUMNS, ADD, REST, TYPE, KIND)                                                  \
  template <bool kTransposed>                                                                                     \
  __device__ __forceinline__ void multiply_async(float(&d)[TILES][4], const uint32_t(&a)[4], uint64_t b, bool add, \
                                                 KIND) {                                                          \
    asm volatile("{.reg .pred p; setp.ne.b32 p, " ADD ", 0; wgmma.mma_async.sync.aligned.m64n" COLUMNS            \
                 "k16.f32." TYPE "." TYPE " {" REVIT_NAMES##TILES "}, " REST ";}"                                 \
                 : REVIT_SUMS##TILES                                                                              \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)),                \
                   "n"(kTransposed ? 1 : 0));                                                                     \
  }
#define REVIT_MULTIPLY(TILES, COLUMNS, ADD, REST)                             \
  REVIT_MULTIPLY_OF(TILES, COLUMNS, ADD, REST, "bf16", bfloat16)              \
  REVIT_MULTIPLY_OF(TILES, COLUMNS, ADD, REST, "f16", float16)

REVIT_MULTIPLY(2, "16", "%13", "{%8, %9, %10, %11}, %12, p, 1, 1, %14")
REVIT_MULTIPLY(4, "32", "%21", "{%16, %17, %18, %19}, %20, p, 1, 1, %22")
REVIT_MULTIPLY(6, "48", "%29", "{%24, %25, %26, %27}, %28, p, 1, 1, %30")
REVIT_MULTIPLY(8, "64", "%37", "{%32, %33, %34, %35}, %36, p, 1, 1, %38")
REVIT_MULTIPLY(16, "128", "%69", "{%64, %65, %66, %67}, %68, p, 1, 1, %70")

#undef REVIT_MULTIPLY
#undef REVIT_MULTIPLY_OF

#endif

}  // namespace revit
