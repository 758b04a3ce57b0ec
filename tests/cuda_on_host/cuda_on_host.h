// CUDA C++ on a CPU, to prove kernels right where there is no GPU: included before a .cu file that is compiled as C++.
//
// Every thread of a block is a fiber. Blocks run one after another, and so do warps, each until it waits for the others
// of its block; with REVIT_CUDA_ORDER=reverse the last warp, and thread, goes first. Shared memory holds NaN when a
// block begins, an asynchronous copy happens only when it is waited for, and warps that meet at different places,
// threads that wait for ever, and reads that a missing barrier leaves stale show as errors or as NaN. Builds with
// checks see every access to memory as well: checks_on_host.h says what they find. Not seen: what a weaker order of
// memory than the barriers' does, a pointer that leaves a static array for its neighbour, and registers beyond launch
// bounds.
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
#include <map>
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
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
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

#define REVIT_EMULATOR __attribute__((section(".emulator")))  // beside shared memory, which is among other variables
REVIT_EMULATOR inline dim3 threadIdx, blockIdx, blockDim, gridDim;  // those of the fiber that runs
inline constexpr int warpSize = 32;

#define REVIT_UNSEEN __attribute__((no_sanitize("thread")))

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

struct Registers {  // where they are on the stack, and what a product that runs has there
  uintptr_t begin, end;
  bool sums;
  long group;
};

struct Fiber {
  ucontext_t start;
  jmp_buf here;          // where it goes on: a context would ask the kernel for the signal mask at every switch
  bool started = false;  // then it is in some block's kernel, or between two
  std::unique_ptr<char[]> stack{new char[kStack]};
  const uintptr_t bottom = reinterpret_cast<uintptr_t>(stack.get());
  dim3 index;
  int number;
  bool done;
  int unseen = 0;                        // how deep it is in what stands for the GPU, see checks_on_host.h
  const char* place = "";                // where it waits
  bool products = false;                 // some run, or may begin
  std::vector<Registers> held, written;  // of products that run; since the last wgmma.fence
  std::vector<Copy> open;                // copies of no group yet
  std::deque<std::vector<Copy>> groups;  // committed, not yet done
};

struct Block {
  std::vector<unsigned char> shared;
  uintptr_t dynamic = 0;  // where it is
  size_t dynamic_bytes = 0, most_dynamic = 0;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Meeting> warps;
  int threads = 0, living = 0, waiting = 0, line = 0;  // line: of the __syncthreads that some wait at
  long generation = 0, progress = 0, serial = 0;
  Fiber* running = nullptr;
  jmp_buf scheduler;
  const std::function<void()>* kernel = nullptr;
  std::string failure;
};
REVIT_EMULATOR inline Block block;
inline std::string (*at_end)() = nullptr;  // what is left undone at the end of a block, for hopper_on_host.h

inline void yield() {
  if (!_setjmp(block.running->here)) _longjmp(block.scheduler, 1);
}

inline void enter();

// Runs the fiber until it yields.
REVIT_UNSEEN __attribute__((noinline)) inline void resume(Fiber& fiber) {
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

}  // namespace cuda_on_host

#include "checks_on_host.h"

namespace cuda_on_host {

inline bool (*has_barriers)() = [] { return false; };  // in shared memory, for hopper_on_host.h

inline void sync_block(int line) {
  const Unseen unseen;
  const long mine = block.generation;
  ++block.progress;
  if (block.living < block.threads) fail("a thread has left before a __syncthreads of its block");
  if (block.waiting && block.line != line)
    fail("threads of a block meet at __syncthreads of lines " + std::to_string(block.line) + " and " +
         std::to_string(line));
  block.line = line;
  if (++block.waiting == block.living) {
    block.waiting = 0;
    ++block.generation;
    order_threads(0, block.threads, has_barriers());
    return;
  }
  block.running->place = "__syncthreads";
  while (block.generation == mine) yield();
}

// Meets the other lanes of the warp; the last one to arrive calls work(operands of every lane).
template <class Work>
void meet(const char* what, void* operands, unsigned mask, Work work) {
  const Unseen unseen;
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
  block.running->place = what;
  while (warp.generation == mine) yield();
}

// A fiber's whole life: the kernel of one block after the other.
REVIT_UNSEEN inline void enter() {
  for (;; yield()) {
    block.running->unseen = 0;
    (*block.kernel)();
    block.running->unseen = 1;
    block.running->done = true;
    --block.living;
    ++block.progress;
    if (block.waiting) fail("a thread has left before a __syncthreads of its block");
  }
}

// How many threads wait at each place.
inline std::string waiting_at() {
  std::map<std::string, int> places;
  for (int i = 0; i < block.threads; ++i)
    if (!block.fibers[i]->done) ++places[block.fibers[i]->place];
  std::string text;
  for (const auto& place : places)
    text += (text.empty() ? ": " : ", ") + std::to_string(place.second) + " at " + place.first;
  return text;
}

inline bool reversed() {
  const char* order = std::getenv("REVIT_CUDA_ORDER");
  return order && std::string(order) == "reverse";
}

inline void run_block(const std::function<void()>& kernel, dim3 index, int threads, size_t shared) {
  block.shared.assign(shared + 16, 0xff);  // NaN, whatever it is read as
  block.dynamic = reinterpret_cast<uintptr_t>(block.shared.data());
  block.dynamic_bytes = shared;
  block.most_dynamic = block.shared.capacity();
  block.threads = block.living = threads;
  block.waiting = 0;
  begin_block();
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
    fiber.products = false;
    fiber.held.clear();
    fiber.written.clear();
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
        block.running = nullptr;
        if (!fiber.groups.empty() && fiber.done) block.failure = "a thread ended with copies that nobody waited for";
      }
    }
  };
  const int warps = static_cast<int>(block.warps.size());
  while (block.living) {
    const long before = block.progress;
    for (int i = 0; i < warps && block.failure.empty(); ++i) run_warp(last_first ? warps - 1 - i : i);
    if (block.failure.empty() && block.progress == before)
      block.failure = "threads wait for one another for ever" + waiting_at();
    if (block.failure.empty() && !block.living && at_end) block.failure = at_end();
    if (block.failure.empty()) continue;
    for (auto& fiber : block.fibers) fiber->started = false;
    throw std::runtime_error("CUDA on the host: " + block.failure);
  }
}

}  // namespace cuda_on_host

inline void __syncthreads(int line = __builtin_LINE()) { cuda_on_host::sync_block(line); }
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  using namespace cuda_on_host;
  const int first = block.running->number / kLanes * kLanes;
  meet("__syncwarp", nullptr, mask, [=](void**) { order_threads(first, kLanes, has_barriers()); });
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
  const cuda_on_host::Unseen unseen;
  __syncthreads();
  any = 0;
  __syncthreads();
  any |= predicate != 0;
  __syncthreads();
  return any;
}

template <class T>
T atomicAdd(T* address, T value) {
  const cuda_on_host::Unseen unseen;
  cuda_on_host::check_global(address, sizeof(T), "an atomic sum");
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
  const cuda_on_host::Unseen unseen;
  if (row % 16) cuda_on_host::fail("ldmatrix from an address off 16 bytes");
  cuda_on_host::touch(row, 16, false, cuda_on_host::block.running->number, cuda_on_host::kMatrix);
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
  const cuda_on_host::Unseen unseen;
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
  const cuda_on_host::Unseen unseen;
  const uintptr_t addresses = shared | (there ? reinterpret_cast<uintptr_t>(global) : 0);
  if (addresses % 16) cuda_on_host::fail("cp.async from or to an address off 16 bytes");
  const int thread = cuda_on_host::block.running->number;
  if (there) cuda_on_host::touch(global, 16, false, thread);
  cuda_on_host::touch(shared, 16, true, thread);
  cuda_on_host::give_to(cuda_on_host::kOnTheWay, shared, 16);
  cuda_on_host::block.running->open.push_back({reinterpret_cast<void*>(shared), global, there});
}
inline void commit_copies() {
  const cuda_on_host::Unseen unseen;
  auto& fiber = *cuda_on_host::block.running;
  fiber.groups.push_back(std::move(fiber.open));
  fiber.open.clear();
}
template <int kPending>
void wait_for_copies() {
  const cuda_on_host::Unseen unseen;
  const int thread = cuda_on_host::block.running->number;
  auto& groups = cuda_on_host::block.running->groups;
  for (; static_cast<int>(groups.size()) > kPending; groups.pop_front())
    for (const auto& copy : groups.front()) {
      copy.there ? std::memcpy(copy.to, copy.from, 16) : std::memset(copy.to, 0, 16);
      cuda_on_host::give_to(thread, reinterpret_cast<uintptr_t>(copy.to), 16);
    }
}

}  // namespace revit

namespace cuda_on_host {

// The GPU that this stands for: a Hopper where REVIT_CUDA_ON_HOST_HOPPER is set, else an sm_80. A block may have as
// much memory as those have, or as many KiB as REVIT_CUDA_ON_HOST_SHARED says: 99 on sm_86, sm_89 and sm_120.
inline bool is_hopper() { return std::getenv("REVIT_CUDA_ON_HOST_HOPPER") != nullptr; }
inline size_t most_shared() {
  const char* wanted = std::getenv("REVIT_CUDA_ON_HOST_SHARED");
  return (wanted ? std::atoi(wanted) : is_hopper() ? 227 : 163) * size_t{1024};
}

inline std::map<const void*, size_t> allowed;  // dynamic shared memory, by kernel

inline void allow_shared(const void* kernel, size_t bytes) {  // cudaFuncSetAttribute
  if (bytes > most_shared()) throw std::runtime_error("CUDA on the host: more shared memory than a block may have");
  allowed[kernel] = bytes;
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared, Arguments... arguments) {
  const auto found = allowed.find(reinterpret_cast<const void*>(kernel));
  if (shared > (found == allowed.end() ? 48 * 1024 : found->second))
    throw std::runtime_error("CUDA on the host: more dynamic shared memory than the kernel was allowed");
  if (threads > kMostThreads) throw std::runtime_error("CUDA on the host: more than 1024 threads in a block");
  if (grid.y > 65535 || grid.z > 65535) throw std::runtime_error("CUDA on the host: a grid too large in y or z");
  blockDim = dim3(threads);
  gridDim = grid;
  begin_launch();
  const std::function<void()> run = [&] { kernel(static_cast<Parameters>(arguments)...); };
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) run_block(run, dim3(x, y, z), threads, shared);
}

}  // namespace cuda_on_host

namespace revit {

class Stream {
 public:
  template <class Tensor>
  explicit Stream(const Tensor&) {}
  template <class... Parameters, class... Arguments>
  void launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared, Arguments... arguments) const {
    if (shared > 48 * 1024) cuda_on_host::allow_shared(reinterpret_cast<const void*>(kernel), shared);
    cuda_on_host::launch(kernel, grid, threads, shared, arguments...);
  }
};

inline int multiprocessors() { return 3; }

}  // namespace revit

#include "hopper_on_host.h"
