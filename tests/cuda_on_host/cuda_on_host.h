// CUDA C++ on a CPU, to prove kernels right where there is no GPU: included before a .cu file that is compiled as C++.
//
// Every thread of a block is a fiber. Blocks run one after another, and so do warps, each until it waits for the others
// of its block; with REVIT_CUDA_ORDER=reverse the last warp, and thread, goes first. Shared memory holds NaN when a
// block begins, an asynchronous copy happens only when it is waited for, and warps that meet at different places,
// threads that wait for ever, and reads that a missing barrier leaves stale show as errors or as NaN. Not seen: data
// races that neither order of the threads brings out, memory ordering, and accesses out of bounds in global memory.
#pragma once

#define REVIT_CUDA_ON_HOST 1
#define REVIT_CUDA_KEY CPU

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __shared__ static  // of a block, and blocks run one after another
#define REVIT_DYNAMIC_SHARED(name) unsigned char* name = cuda_on_host::block.shared.data()

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

inline dim3 threadIdx, blockIdx, blockDim, gridDim;  // those of the fiber that runs
inline constexpr int warpSize = 32;

namespace cuda_on_host {

constexpr int kLanes = 32, kStack = 128 * 1024;

// Threads that meet: the last to arrive does the work of all, then all go on.
struct Meeting {
  const char* what = nullptr;
  void* operands[kLanes] = {};
  int arrived = 0;
  long generation = 0;
};

struct Copy {
  void* to;
  const void* from;
  bool there;
};

struct Fiber {
  ucontext_t start;
  jmp_buf here;          // where it goes on: a context would ask the kernel for the signal mask at every switch
  bool started = false;  // then it is in some block's kernel, or between two
  std::unique_ptr<char[]> stack{new char[kStack]};
  dim3 index;
  int number;
  bool done;
  std::vector<Copy> open;                // copies of no group yet
  std::deque<std::vector<Copy>> groups;  // committed, not yet done
};

struct Block {
  std::vector<unsigned char> shared;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Meeting> warps;
  int threads = 0, living = 0, waiting = 0;
  long generation = 0, progress = 0, serial = 0;
  Fiber* running = nullptr;
  jmp_buf scheduler;
  const std::function<void()>* kernel = nullptr;
  std::string failure;
};
inline Block block;
inline std::string (*at_end)() = nullptr;  // what is left undone at the end of a block, for hopper_on_host.h

inline void yield() {
  if (!_setjmp(block.running->here)) _longjmp(block.scheduler, 1);
}

inline void enter();

// Runs the fiber until it yields.
__attribute__((noinline)) inline void resume(Fiber& fiber) {
  block.running = &fiber;
  threadIdx = fiber.index;
  if (_setjmp(block.scheduler)) return;
  if (fiber.started) _longjmp(fiber.here, 1);
  fiber.started = true;
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack.get();
  fiber.start.uc_stack.ss_size = kStack;
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, enter, 0);
  setcontext(&fiber.start);
}

inline void fail(const std::string& why) {
  if (block.failure.empty()) block.failure = why;
  for (;;) yield();  // this fiber ends here; the scheduler sees the failure
}

inline void sync_block() {
  const long mine = block.generation;
  ++block.progress;
  if (++block.waiting == block.living) {
    block.waiting = 0;
    ++block.generation;
    return;
  }
  while (block.generation == mine) yield();
}

// Meets the other lanes of the warp; the last one to arrive calls work(operands of every lane).
template <class Work>
void meet(const char* what, void* operands, unsigned mask, Work work) {
  if (mask != 0xffffffffu) fail("a warp's mask that does not name all its lanes is not known here");
  const int number = block.running->number, lane = number % kLanes;
  Meeting& warp = block.warps[number / kLanes];
  ++block.progress;
  if (warp.arrived && warp.what != what) fail(std::string("lanes of a warp meet at ") + warp.what + " and at " + what);
  warp.what = what;
  warp.operands[lane] = operands;
  const long mine = warp.generation;
  if (++warp.arrived == kLanes) {
    work(warp.operands);
    warp.arrived = 0;
    ++warp.generation;
    return;
  }
  while (warp.generation == mine) yield();
}

// A fiber's whole life: the kernel of one block after the other.
inline void enter() {
  for (;; yield()) {
    (*block.kernel)();
    block.running->done = true;
    --block.living;
    ++block.progress;
    if (block.living && block.waiting == block.living) {  // those that wait for a thread that has left
      block.waiting = 0;
      ++block.generation;
    }
  }
}

inline bool reversed() {
  const char* order = std::getenv("REVIT_CUDA_ORDER");
  return order && std::string(order) == "reverse";
}

inline void run_block(const std::function<void()>& kernel, dim3 index, int threads, size_t shared) {
  block.shared.assign(shared + 16, 0xff);  // NaN, whatever it is read as
  block.threads = block.living = threads;
  block.waiting = 0;
  block.kernel = &kernel;
  block.failure.clear();
  ++block.serial;
  block.warps.assign((threads + kLanes - 1) / kLanes, Meeting());
  while (static_cast<int>(block.fibers.size()) < threads) block.fibers.emplace_back(new Fiber);
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = *block.fibers[i];
    fiber.index = dim3(i, 0, 0);
    fiber.number = i;
    fiber.done = false;
    fiber.open.clear();
    fiber.groups.clear();
  }
  blockIdx = index;
  const bool last_first = reversed();
  auto run_warp = [&](int warp) {  // as far as it comes without the others
    const int first = warp * kLanes, lanes = std::min(kLanes, threads - first);
    for (long seen = -1; seen != block.progress;) {
      seen = block.progress;
      for (int i = 0; i < lanes && block.failure.empty(); ++i) {
        Fiber& fiber = *block.fibers[first + (last_first ? lanes - 1 - i : i)];
        if (fiber.done) continue;
        resume(fiber);
        if (!fiber.groups.empty() && fiber.done) block.failure = "a thread ended with copies that nobody waited for";
      }
    }
  };
  const int warps = static_cast<int>(block.warps.size());
  while (block.living) {
    const long before = block.progress;
    for (int i = 0; i < warps && block.failure.empty(); ++i) run_warp(last_first ? warps - 1 - i : i);
    if (block.failure.empty() && block.progress == before) block.failure = "threads wait for one another for ever";
    if (block.failure.empty() && !block.living && at_end) block.failure = at_end();
    if (block.failure.empty()) continue;
    for (auto& fiber : block.fibers) fiber->started = false;
    throw std::runtime_error("CUDA on the host: " + block.failure);
  }
}

}  // namespace cuda_on_host

inline void __syncthreads() { cuda_on_host::sync_block(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  cuda_on_host::meet("__syncwarp", nullptr, mask, [](void**) {});
}

namespace cuda_on_host {

template <class T>
T shuffle(const char* what, unsigned mask, T value, int source) {
  struct Operands {
    T value, result;
    int source;
  } own = {value, value, source};
  meet(what, &own, mask, [](void** all) {
    for (int lane = 0; lane < kLanes; ++lane) {
      Operands& to = *static_cast<Operands*>(all[lane]);
      if (to.source >= 0 && to.source < kLanes) to.result = static_cast<Operands*>(all[to.source])->value;
    }
  });
  return own.result;
}

inline int lane() { return block.running->number % kLanes; }

}  // namespace cuda_on_host

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int = 32) {
  return cuda_on_host::shuffle("__shfl_xor_sync", mask, value, cuda_on_host::lane() ^ bits);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int = 32) {
  return cuda_on_host::shuffle("__shfl_sync", mask, value, source % 32);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int = 32) {
  return cuda_on_host::shuffle("__shfl_down_sync", mask, value, cuda_on_host::lane() + static_cast<int>(by));
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int = 32) {
  return cuda_on_host::shuffle("__shfl_up_sync", mask, value, cuda_on_host::lane() - static_cast<int>(by));
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  struct Operands {
    int predicate;
    unsigned votes;
  } own = {predicate, 0};
  cuda_on_host::meet("__ballot_sync", &own, mask, [](void** all) {
    unsigned votes = 0;
    for (int i = 0; i < 32; ++i) votes |= (static_cast<Operands*>(all[i])->predicate ? 1u : 0u) << i;
    for (int i = 0; i < 32; ++i) static_cast<Operands*>(all[i])->votes = votes;
  });
  return own.votes;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == 0xffffffffu; }
inline int __syncthreads_or(int predicate) {
  static int any;  // every thread writes before the second barrier, and reads after it
  __syncthreads();
  any = 0;
  __syncthreads();
  any |= predicate != 0;
  __syncthreads();
  return any;
}

template <class T>
T atomicAdd(T* address, T value) {
  const T before = *address;
  *address = before + value;
  return before;
}
template <class T>
T __ldg(const T* address) {
  return *address;
}
inline void __threadfence() {}
inline float __uint_as_float(uint32_t bits) {
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}
inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
using std::max;
using std::min;

#include "cuda/ptx.h"

namespace revit {

using SharedAddress = uintptr_t;
inline SharedAddress shared_address(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); }

inline float exp2_approximate(float x) { return std::exp2(x); }

inline float to_float(uint16_t bits, bfloat16) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }
inline float to_float(uint16_t bits, float16) {
  _Float16 half;
  std::memcpy(&half, &bits, 2);
  return static_cast<float>(half);
}
inline uint16_t to_bits(float x, bfloat16) {
  const uint32_t bits = __float_as_uint(x);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline uint16_t to_bits(float x, float16) {
  const _Float16 half = static_cast<_Float16>(x);
  uint16_t bits;
  std::memcpy(&bits, &half, 2);
  return bits;
}

template <class Kind>
uint32_t pack(float low, float high, Kind kind) {
  return to_bits(low, kind) | static_cast<uint32_t>(to_bits(high, kind)) << 16;
}
template <class Kind>
float2 unpack(uint32_t pair, Kind kind) {
  return {to_float(static_cast<uint16_t>(pair), kind), to_float(static_cast<uint16_t>(pair >> 16), kind)};
}

namespace on_host {

struct Matrices {
  uint32_t* y;
  const uint16_t* row;
};

inline void load(const char* what, uint32_t (&y)[4], SharedAddress row, bool transposed) {
  if (row % 16) cuda_on_host::fail("ldmatrix from an address off 16 bytes");
  Matrices own = {y, reinterpret_cast<const uint16_t*>(row)};
  cuda_on_host::meet(what, &own, 0xffffffffu, [=](void** all) {
    for (int lane = 0; lane < 32; ++lane)
      for (int matrix = 0; matrix < 4; ++matrix) {
        uint16_t pair[2];
        for (int half = 0; half < 2; ++half) {
          const int i = transposed ? lane % 4 * 2 + half : lane / 4, j = transposed ? lane / 4 : lane % 4 * 2 + half;
          pair[half] = static_cast<Matrices*>(all[8 * matrix + i])->row[j];
        }
        static_cast<Matrices*>(all[lane])->y[matrix] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
      }
  });
}

struct Product {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};

}  // namespace on_host

inline void load_matrices(uint32_t (&y)[4], SharedAddress row) { on_host::load("ldmatrix", y, row, false); }
inline void load_transposed(uint32_t (&y)[4], SharedAddress row) { on_host::load("ldmatrix.trans", y, row, true); }

// The fragments of mma.m16n8k16 as the PTX manual gives them.
template <class Kind>
void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Kind kind) {
  on_host::Product own = {d, a, {b0, b1}};
  cuda_on_host::meet("mma", &own, 0xffffffffu, [=](void** all) {
    float left[16][16], right[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const on_host::Product& from = *static_cast<on_host::Product*>(all[lane]);
      const int group = lane / 4, pair = lane % 4 * 2;
      for (int i = 0; i < 4; ++i) {
        const float2 two = unpack(from.a[i], kind);
        left[group + i % 2 * 8][pair + i / 2 * 8] = two.x;
        left[group + i % 2 * 8][pair + i / 2 * 8 + 1] = two.y;
      }
      for (int i = 0; i < 2; ++i) {
        const float2 two = unpack(from.b[i], kind);
        right[pair + i * 8][group] = two.x;
        right[pair + i * 8 + 1][group] = two.y;
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      float* to = static_cast<on_host::Product*>(all[lane])->d;
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        float sum = 0;
        for (int k = 0; k < 16; ++k) sum += left[row][k] * right[k][column];
        to[i] += sum;
      }
    }
  });
}

inline void copy_async(SharedAddress shared, const void* global, bool there) {
  const uintptr_t addresses = shared | (there ? reinterpret_cast<uintptr_t>(global) : 0);
  if (addresses % 16) cuda_on_host::fail("cp.async from or to an address off 16 bytes");
  cuda_on_host::block.running->open.push_back({reinterpret_cast<void*>(shared), global, there});
}
inline void commit_copies() {
  auto& fiber = *cuda_on_host::block.running;
  fiber.groups.push_back(std::move(fiber.open));
  fiber.open.clear();
}
template <int kPending>
void wait_for_copies() {
  auto& groups = cuda_on_host::block.running->groups;
  for (; static_cast<int>(groups.size()) > kPending; groups.pop_front())
    for (const auto& copy : groups.front())
      copy.there ? std::memcpy(copy.to, copy.from, 16) : std::memset(copy.to, 0, 16);
}

class Stream {
 public:
  template <class Tensor>
  explicit Stream(const Tensor&) {}
  template <class... Parameters, class... Arguments>
  void launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared, Arguments... arguments) const {
    if (threads > 1024 || shared > 227 * 1024) throw std::runtime_error("CUDA on the host: no such launch on a GPU");
    if (grid.y > 65535 || grid.z > 65535) throw std::runtime_error("CUDA on the host: a grid too large in y or z");
    blockDim = dim3(threads);
    gridDim = grid;
    const std::function<void()> run = [&] { kernel(static_cast<Parameters>(arguments)...); };
    for (unsigned z = 0; z < grid.z; ++z)
      for (unsigned y = 0; y < grid.y; ++y)
        for (unsigned x = 0; x < grid.x; ++x) cuda_on_host::run_block(run, dim3(x, y, z), threads, shared);
  }
};

inline int multiprocessors() { return 3; }

}  // namespace revit

#include "hopper_on_host.h"
