// Hopper's instructions on a CPU, for kernels that use cuda/hopper.h: included by cuda_on_host.h.
//
// A copy of a box lands when its barrier is waited for, and until then its place holds NaN; with
// REVIT_CUDA_ORDER=reverse it lands at once. The sums of a product hold NaN until it is waited for, and an operand in
// shared memory that changes before is an error, as are products without a fence and a warpgroup that does not meet.
// Operands are read as their descriptors say, swizzled by address, so a wrong layout gives wrong numbers.
#pragma once

#include <array>

#define __grid_constant__

namespace cuda_on_host {

constexpr int kGroupThreads = 128;

struct TensorMap {
  const unsigned char* data;
  int64_t sizes[3], strides[3];  // of columns, heads and tokens; in bytes
  int rows, columns;
};

struct BoxCopy {
  uintptr_t to;
  TensorMap map;  // a copy: here, a kernel's parameters are gone once their thread has ended
  int column, head, token;
};

struct BarrierState {
  int expected = 0, arrived = 0, number = 0, initialiser = 0;
  long bytes = 0, phase = 0, copied = 0, waited = 0;  // copied, waited: the last phase with a copy, and that one saw
  Clocks arriving = {}, released = {};  // what those that arrive have done: in this phase as well, and up to the last
  std::vector<BoxCopy> copies;          // on their way
};

struct GroupMeeting {
  const char* what = nullptr;
  std::array<void*, kGroupThreads> operands;
  int arrived = 0;
  long generation = 0;
};

struct Pending {
  std::vector<float> sums;
  long group;
};

struct Read {  // of an operand in shared memory
  uint64_t descriptor, sum;
  int columns;
  bool transposed;
  long group;
};

struct AsyncThread {
  std::map<float*, Pending> pending;
  std::vector<Read> reads;
  long open = 0;  // the group that products now go to
  bool fenced = false, unfenced_store = false, unfenced_barrier = false;
};

struct Hopper {
  long serial = -1;
  std::map<const void*, BarrierState> barriers;
  std::vector<GroupMeeting> groups;
  std::vector<AsyncThread> threads;
};
inline Hopper hopper_state;

inline Hopper& hopper() {
  if (hopper_state.serial != block.serial) {
    hopper_state = Hopper();
    hopper_state.serial = block.serial;
    hopper_state.groups.resize(block.threads / kGroupThreads + 1);
    hopper_state.threads.resize(block.threads);
    forget_barriers();
  }
  return hopper_state;
}
inline AsyncThread& async_thread() { return hopper().threads[block.running->number]; }

// What is left undone at the end of a block.
inline std::string left_undone() {
  if (hopper_state.serial != block.serial) return "";
  for (const auto& thread : hopper_state.threads)
    if (!thread.pending.empty()) return "a thread ended with products that nobody waited for";
  for (const auto& barrier : hopper_state.barriers)
    if (barrier.second.copied > barrier.second.waited)
      return "a block ended with copies of boxes that nobody waited for";
  return "";
}
inline const bool left_undone_is_seen = (at_end = left_undone, true);
inline const bool barriers_are_seen =
    (has_barriers = [] { return hopper_state.serial == block.serial && !hopper_state.barriers.empty(); }, true);

// Meets the other 127 threads of the warpgroup; the last one to arrive does the work.
template <class Work>
void meet_group(const char* what, void* operands, Work work) {
  const Unseen unseen;
  const int number = block.running->number;
  if (number / kGroupThreads * kGroupThreads + kGroupThreads > block.threads)
    fail("a warpgroup of less than four warps");
  GroupMeeting& group = hopper().groups[number / kGroupThreads];
  ++block.progress;
  if (group.arrived && group.what != what) fail(std::string("warpgroup meets at ") + group.what + " and at " + what);
  group.what = what;
  group.operands[number % kGroupThreads] = operands;
  const long mine = group.generation;
  if (++group.arrived == kGroupThreads) {
    work(group.operands);
    group.arrived = 0;
    ++group.generation;
    return;
  }
  block.running->place = what;
  while (group.generation == mine) yield();
}

inline BarrierState& barrier_state(const void* barrier) {
  auto found = hopper().barriers.find(barrier);
  if (found == hopper().barriers.end()) fail("a barrier in shared memory that was not initialised");
  touch(barrier, 8, false, block.running->number);
  return found->second;
}

inline void complete(BarrierState& state) {
  ++block.progress;
  if (state.arrived > state.expected) fail("more arrive at a barrier than it expects");
  if (state.arrived == state.expected && state.bytes < 0) fail("more bytes come to a barrier than its phase expects");
  if (state.arrived != state.expected || state.bytes) return;
  state.arrived = 0;
  std::copy(std::begin(state.arriving), std::end(state.arriving), state.released);
  ++state.phase;
}

inline uintptr_t swizzled(uintptr_t address, int row_bytes) {
  return address ^ ((address >> 7 & static_cast<uintptr_t>(row_bytes / 16 - 1)) << 4);
}

inline bool in_shared(uintptr_t address, size_t bytes) {
  return address >= block.dynamic && address + bytes <= block.dynamic + block.dynamic_bytes;
}

inline void land(const BoxCopy& copy) {
  const TensorMap& map = copy.map;
  const int64_t first = std::max(copy.column, 0), end = std::min<int64_t>(copy.column + map.columns, map.sizes[0]);
  for (int row = 0; row < map.rows; ++row) {
    const int64_t token = copy.token + row;
    if (copy.head >= 0 && copy.head < map.sizes[1] && token >= 0 && token < map.sizes[2] && first < end)
      check_global(map.data + first * 2 + copy.head * map.strides[1] + token * map.strides[2], (end - first) * 2,
                   "a copy of a box");
    for (int column = 0; column < map.columns; ++column) {
      const int64_t at[3] = {copy.column + column, copy.head, copy.token + row};
      bool inside = true;
      int64_t offset = 0;
      for (int i = 0; i < 3; ++i) {
        inside = inside && at[i] >= 0 && at[i] < map.sizes[i];
        offset += at[i] * map.strides[i];
      }
      uint16_t value = 0;
      if (inside) std::memcpy(&value, map.data + offset, 2);
      const uintptr_t to = swizzled(copy.to + (row * map.columns + column) * 2, map.columns * 2);
      std::memcpy(reinterpret_cast<void*>(to), &value, 2);
    }
  }
}

inline void land_all(BarrierState& state) {
  if (state.copies.empty()) return;
  for (const auto& copy : state.copies) {
    land(copy);
    state.bytes -= copy.map.rows * copy.map.columns * 2;
  }
  state.copies.clear();
  complete(state);
}

// Calls visit(k, column, its address) for every number of an operand of 16 x columns.
template <class Visit>
void for_operand(uint64_t descriptor, int columns, bool transposed, Visit visit) {
  const int row_bytes = std::array<int, 4>{0, 128, 64, 32}[descriptor >> 62];
  if (!row_bytes) fail("operands without swizzle are not known here");
  const uintptr_t begin = block.dynamic;
  const uintptr_t start = begin + ((((descriptor & 0x3fff) << 4) - begin) & 0x3ffff);
  if (start >> 7 & static_cast<uintptr_t>(row_bytes / 16 - 1))
    fail("an operand that does not begin with its pattern of swizzled rows");
  const uintptr_t leading = (descriptor >> 16 & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff) << 4;
  const int wide = row_bytes / 2;
  for (int k = 0; k < 16; ++k)
    for (int n = 0; n < columns; ++n) {
      const uintptr_t linear = transposed
                                   ? start + n / wide * leading + n % wide * 2 + k / 8 * stride + k % 8 * row_bytes
                                   : start + n / 8 * stride + n % 8 * row_bytes + k * 2;
      const uintptr_t address = swizzled(linear, row_bytes);
      if (!in_shared(address, 2)) fail("a product reads outside shared memory");
      visit(k, n, reinterpret_cast<const uint16_t*>(address));
    }
}

inline uint64_t sum_of(uint64_t descriptor, int columns, bool transposed) {
  uint64_t sum = 0;
  for_operand(descriptor, columns, transposed, [&](int, int, const uint16_t* at) { sum = sum * 31 + *at; });
  return sum;
}

struct AsyncProduct {
  float* d;
  const uint32_t* a;
  uint64_t b;
  bool add;
  AsyncThread* thread;
};

}  // namespace cuda_on_host

namespace revit {

using TensorMap = cuda_on_host::TensorMap;
using Barrier = uint64_t;

template <class Kernel>
bool on_hopper(Kernel) {
  return cuda_on_host::is_hopper();
}

inline std::string refused;  // why the last map was

// As cuTensorMapEncodeTiled, for a box of 16-bit numbers whose swizzle follows from its columns.
inline bool encode(TensorMap& map, const void* data, int tokens, int heads, int dim, int64_t token_stride,
                   int64_t head_stride, int rows, int columns) {
  const int swizzle = columns == 64 ? 128 : columns == 32 ? 64 : 32;
  refused = reinterpret_cast<uintptr_t>(data) % 16                   ? "an address off 16 bytes"
            : token_stride % 8 || head_stride % 8                    ? "a stride off 16 bytes"
            : token_stride >> 39 || head_stride >> 39                ? "a stride of 2^40 bytes or more"
            : tokens < 1 || heads < 1 || dim < 1                     ? "a tensor of no elements"
            : rows < 1 || columns < 1 || rows > 256 || columns > 256 ? "a box of more than 256 rows or columns, or none"
            : columns % 8                                            ? "rows of a box off 16 bytes"
            : columns * 2 > swizzle                                  ? "rows of a box longer than their swizzle"
                                                                     : "";
  if (!refused.empty()) return false;
  map = {static_cast<const unsigned char*>(data),
         {dim, heads, tokens},
         {2, head_stride * 2, token_stride * 2},
         rows,
         columns};
  return true;
}

inline void init_barrier(Barrier* barrier, int arrivals) {
  using namespace cuda_on_host;
  const Unseen unseen;
  const int thread = block.running->number, number = static_cast<int>(hopper().barriers.size());
  if (number >= kMostBarriers) fail("more barriers in shared memory than are known here");
  touch(barrier, 8, true, thread);
  BarrierState& state = hopper().barriers[barrier] = BarrierState();
  state.expected = arrivals;
  state.number = number;
  state.initialiser = thread;
  async_thread().unfenced_barrier = true;
}

inline void arrive(Barrier* barrier) {
  const cuda_on_host::Unseen unseen;
  auto& state = cuda_on_host::barrier_state(barrier);
  cuda_on_host::release(state.arriving);
  ++state.arrived;
  cuda_on_host::complete(state);
}

inline void arrive_expecting(Barrier* barrier, int bytes) {
  const cuda_on_host::Unseen unseen;
  cuda_on_host::barrier_state(barrier).bytes += bytes;
  arrive(barrier);
}

inline void wait(Barrier* barrier, int parity) {
  const cuda_on_host::Unseen unseen;
  for (;; cuda_on_host::yield()) {
    auto& state = cuda_on_host::barrier_state(barrier);
    cuda_on_host::block.running->place = "a barrier in shared memory";
    cuda_on_host::land_all(state);
    if ((state.phase & 1) == parity) continue;
    cuda_on_host::acquire(state.released, state.number, state.phase);
    state.waited = state.phase;
    break;
  }
  ++cuda_on_host::block.progress;
}

inline void copy_box(SharedAddress to, const TensorMap* map, int column, int head, int token, Barrier* barrier) {
  using namespace cuda_on_host;
  const Unseen unseen;
  const int bytes = map->rows * map->columns * 2;
  if (to % 128) fail("a box goes to an address off 128 bytes");
  if (to % (map->columns * 16)) fail("a box goes to an address off its pattern of swizzled rows");
  if (!in_shared(to, bytes)) fail("a box goes outside shared memory");
  auto& state = barrier_state(barrier);
  if (hopper().threads[state.initialiser].unfenced_barrier) fail("a copy to a barrier that was not fenced as it began");
  touch(to, bytes, true, block.running->number, kAsync);
  give_to(kMostThreads + state.number, to, bytes, state.phase);
  std::memset(reinterpret_cast<void*>(to), 0xff, bytes);
  state.copies.push_back({to, *map, column, head, token});
  state.copied = state.phase + 1;
  if (reversed()) land_all(state);
  ++block.progress;
}

inline void prefetch_map(const TensorMap*) {}
inline void fence_async() {
  const cuda_on_host::Unseen unseen;
  cuda_on_host::async_thread().unfenced_store = cuda_on_host::async_thread().unfenced_barrier = false;
  cuda_on_host::fence_proxy();
}
inline void store_zeros(SharedAddress to) {
  const cuda_on_host::Unseen unseen;
  if (to % 16) cuda_on_host::fail("zeros go to an address off 16 bytes");
  if (!cuda_on_host::in_shared(to, 16)) cuda_on_host::fail("zeros go outside shared memory");
  const unsigned char zeros[16] = {};
  const bool alike = std::memcmp(reinterpret_cast<void*>(to), zeros, 16) == 0;
  cuda_on_host::touch_alike(to, 16, alike, cuda_on_host::block.running->number);
  std::memset(reinterpret_cast<void*>(to), 0, 16);
  cuda_on_host::async_thread().unfenced_store = true;
}
template <int kRegisters>
void shrink_registers() {
  cuda_on_host::meet_group("setmaxnreg", nullptr, [](auto&) {});
}
template <int kRegisters>
void grow_registers() {
  cuda_on_host::meet_group("setmaxnreg", nullptr, [](auto&) {});
}
inline void sync_warpgroup(int) {
  using namespace cuda_on_host;
  const int first = block.running->number / kGroupThreads * kGroupThreads;
  meet_group("bar.sync", nullptr, [=](auto&) { order_threads(first, kGroupThreads, has_barriers()); });
}

inline void fence_products() {
  const cuda_on_host::Unseen unseen;
  cuda_on_host::async_thread().fenced = cuda_on_host::block.running->products = true;
  cuda_on_host::block.running->written.clear();
}
inline void commit_products() {
  const cuda_on_host::Unseen unseen;
  ++cuda_on_host::async_thread().open;
}

template <int kPending>
void wait_for_products() {
  const cuda_on_host::Unseen unseen;
  auto& thread = cuda_on_host::async_thread();
  const long done = thread.open - kPending;  // groups before this one
  for (auto at = thread.pending.begin(); at != thread.pending.end();) {
    if (at->second.group >= done) {
      ++at;
      continue;
    }
    std::copy(at->second.sums.begin(), at->second.sums.end(), at->first);
    at = thread.pending.erase(at);
  }
  for (auto at = thread.reads.begin(); at != thread.reads.end();) {
    if (at->group >= done) {
      ++at;
      continue;
    }
    if (cuda_on_host::sum_of(at->descriptor, at->columns, at->transposed) != at->sum)
      cuda_on_host::fail("an operand of a product changes before it is waited for");
    at = thread.reads.erase(at);
  }
  thread.fenced = false;
  auto& held = cuda_on_host::block.running->held;
  held.erase(std::remove_if(held.begin(), held.end(), [=](const auto& each) { return each.group < done; }), held.end());
  cuda_on_host::block.running->products = !held.empty();
}

// The fragments of wgmma.m64nNk16 as the PTX manual gives them.
template <bool kTransposed, int kTiles, class Kind>
void multiply_async(float (&d)[kTiles][4], const uint32_t (&a)[4], uint64_t b, bool add, Kind kind) {
  using namespace cuda_on_host;
  const Unseen unseen;
  AsyncThread& mine = async_thread();
  if (!mine.fenced) fail("a product without wgmma.fence since the last wait");
  const auto sums_at = reinterpret_cast<uintptr_t>(d), left_at = reinterpret_cast<uintptr_t>(a);
  for (const Registers& used : {Registers{sums_at, sums_at + sizeof d, true, mine.open},
                                Registers{left_at, left_at + sizeof a, false, mine.open}}) {
    for (const Registers& written : block.running->written)
      if (written.begin < used.end && used.begin < written.end)
        fail("registers of a product are written between wgmma.fence and the product");
    block.running->held.push_back(used);
  }
  AsyncProduct own = {&d[0][0], a, b, add, &mine};
  meet_group(kTransposed ? "wgmma transposed" : "wgmma", &own, [=](auto& all) {
    constexpr int kColumns = kTiles * 8;
    static float left[64][16], right[16][kColumns];
    const bool first_add = static_cast<AsyncProduct*>(all[0])->add;
    for (int i = 0; i < kGroupThreads; ++i) {
      const AsyncProduct& from = *static_cast<AsyncProduct*>(all[i]);
      if (from.b != b || from.add != first_add) fail("threads of a warpgroup have different descriptors");
      if (from.thread->unfenced_store) fail("a product after a store to shared memory without fence.proxy.async");
      const int row = i / 32 * 16 + i % 32 / 4, pair = i % 4 * 2;
      for (int j = 0; j < 4; ++j) {
        const float2 two = unpack(from.a[j], kind);
        left[row + j % 2 * 8][pair + j / 2 * 8] = two.x;
        left[row + j % 2 * 8][pair + j / 2 * 8 + 1] = two.y;
      }
    }
    const int group = block.running->number / kGroupThreads * kGroupThreads;
    for_operand(b, kColumns, kTransposed, [&](int k, int column, const uint16_t* at) {
      right[k][column] = to_float(*at, kind);
      for (int warp = 0; warp < 4 && reinterpret_cast<uintptr_t>(at) % 16 == 0; ++warp)
        touch(at, 16, false, group + warp * kLanes, kAsync);
    });
    for (int i = 0; i < kGroupThreads; ++i) {
      const AsyncProduct& to = *static_cast<AsyncProduct*>(all[i]);
      auto found = to.thread->pending.find(to.d);
      std::vector<float> sums(kTiles * 4, 0.0f);
      if (to.add && found != to.thread->pending.end())
        sums = found->second.sums;
      else if (to.add)
        sums.assign(to.d, to.d + kTiles * 4);
      for (int j = 0; j < kTiles * 4; ++j) {
        const int row = i / 32 * 16 + i % 32 / 4 + j % 4 / 2 * 8, column = j / 4 * 8 + i % 4 * 2 + j % 2;
        float sum = 0;
        for (int k = 0; k < 16; ++k) sum += left[row][k] * right[k][column];
        sums[j] += sum;
      }
      std::fill(to.d, to.d + kTiles * 4, std::nanf(""));
      to.thread->pending[to.d] = {std::move(sums), to.thread->open};
    }
    AsyncThread& first = *static_cast<AsyncProduct*>(all[0])->thread;
    first.reads.push_back({b, sum_of(b, kColumns, kTransposed), kColumns, kTransposed, first.open});
  });
}

}  // namespace revit
