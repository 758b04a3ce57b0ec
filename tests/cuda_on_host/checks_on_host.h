// What a GPU would punish in the memory that a kernel uses, for builds with -fsanitize=thread: the compiler then calls
// __tsan_read4 and the like for every access, and here is what they do. Without that flag none of this does anything.
//
// Found: shared memory that is read before it is written, or while a copy to it is on its way; two threads at one
// address, one of which writes, with no barrier between; two blocks that do so in global memory; accesses past the end
// of dynamic shared memory and, where the address sanitizer is preloaded, of tensors; the registers of a product that
// runs. Orders are __syncthreads, __syncwarp, bar.sync and mbarrier: shuffles, votes and products order nothing.
// With -fsanitize=alignment,bounds also vectors off their boundary and indices outside of an array.
#pragma once

#include <unordered_map>

extern "C" {
extern char __bss_start[] __attribute__((visibility("hidden"))), _end[] __attribute__((visibility("hidden")));
__attribute__((weak)) void* __asan_region_is_poisoned(void*, size_t);
}

namespace cuda_on_host {

#ifdef __SANITIZE_THREAD__
constexpr bool kChecked = true;
#else
constexpr bool kChecked = false;
#endif

constexpr int kMostThreads = 1024, kMostBarriers = 64;
// Who wrote, where it was not one thread: from kMostThreads on copies of boxes, by barrier; then copies that nobody has
// waited for, and threads that write what is there already, which are not in one another's way.
constexpr int kOnTheWay = kMostThreads + kMostBarriers, kAlike = kOnTheWay + 1;

struct Access {
  uint32_t epoch = 0, clock = 0;
  int thread = 0;
};
struct Cell {  // two bytes: the last write, and the last reads since of two threads
  Access write, reads[2];
};
constexpr uintptr_t kPageBytes = 4096;
struct Page {
  Cell cells[kPageBytes / 2];
};

using Clocks = uint32_t[kChecked ? kOnTheWay : 1];

// Which accesses are before which: of those since the last __syncthreads, what a thread has seen of the others.
struct Order {
  uint32_t epoch = 1, launch = 1, block = 1;  // epochs: of now, and the first of this launch and of this block
  Clocks clock = {}, fenced = {};             // of each thread; it grows where others may come to see what was done
  std::unique_ptr<Clocks[]> seen{new Clocks[kChecked ? kMostThreads : 1]()};  // of others, what is below this
  std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
  struct {
    uintptr_t number;
    Page* page;
  } recent[16] = {};
};
inline Order order;

// While one lives, its thread runs what stands for the GPU and not the kernel.
struct Unseen {
  REVIT_UNSEEN Unseen() { ++block.running->unseen; }
  REVIT_UNSEEN ~Unseen() { --block.running->unseen; }
};

inline void begin_launch() {
  order.launch = ++order.epoch;
  if (order.pages.size() < 2000) return;
  order.pages.clear();
  for (auto& recent : order.recent) recent = {};
}
inline void begin_block() { order.block = ++order.epoch; }

REVIT_UNSEEN inline void raise(Clocks& to, const Clocks& by) {
  for (int i = 0; kChecked && i < kOnTheWay; ++i) to[i] = to[i] < by[i] ? by[i] : to[i];
}

// A barrier of these threads.
REVIT_UNSEEN inline void order_threads(int first, int count, bool barriers) {
  if (!kChecked) return;
  if (count == block.threads) ++order.epoch;
  if (count == block.threads && !barriers) return;
  Clocks all = {};
  if (barriers)
    for (int i = first; i < first + count; ++i) raise(all, order.seen[i]);
  for (int i = first; i < first + count; ++i) all[i] = ++order.clock[i];
  for (int i = first; i < first + count; ++i) {
    if (barriers)
      raise(order.seen[i], all);
    else
      for (int j = first; j < first + count; ++j) order.seen[i][j] = all[j];
  }
}

REVIT_UNSEEN inline bool in_dynamic(uintptr_t address) { return address - block.dynamic < block.most_dynamic; }
REVIT_UNSEEN inline bool is_shared(uintptr_t address) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(__bss_start);
  return in_dynamic(address) || address - begin < reinterpret_cast<uintptr_t>(_end) - begin;
}

REVIT_UNSEEN inline Cell& cell_at(uintptr_t address) {
  const uintptr_t number = address / kPageBytes;
  auto& recent = order.recent[number % 16];
  if (recent.number != number) {
    auto& page = order.pages[number];
    if (!page) page.reset(new Page());
    recent = {number, page.get()};
  }
  return recent.page->cells[address % kPageBytes / 2];
}

REVIT_UNSEEN inline bool is_ordered(const Access& before, int thread, bool shared) {
  if (before.epoch < order.launch) return true;
  if (before.epoch < order.block) return shared;  // what was another block's is free
  if (before.thread >= kOnTheWay) return before.thread == kAlike;
  if (before.thread < kMostThreads && (before.thread == thread || before.epoch != order.epoch)) return true;
  return order.seen[thread][before.thread] > before.clock;
}

inline void clash(const Access& before, int thread, bool writes, bool shared) {
  if (before.thread >= kMostThreads)
    fail(std::string("shared memory is ") + (writes ? "written" : "read") + " before a copy to it was waited for");
  if (before.epoch < order.block) fail("two blocks use one address in global memory, and one of them writes");
  fail("threads " + std::to_string(before.thread) + " and " + std::to_string(thread) + " use one address in " +
       (shared ? "shared" : "global") + " memory, one of them writes, and no barrier is between");
}

inline void check_global(const void* address, size_t bytes, const char* what) {
  if (kChecked && bytes && __asan_region_is_poisoned && __asan_region_is_poisoned(const_cast<void*>(address), bytes))
    fail(std::string(what) + " outside of every tensor");
}

enum Proxy { kGeneric, kMatrix, kAsync };  // ldmatrix may read what was never written, wgmma and TMA need a fence

REVIT_UNSEEN inline void touch(uintptr_t address, size_t bytes, bool writes, int thread, Proxy proxy = kGeneric) {
  if (!kChecked || !bytes) return;
  const bool shared = is_shared(address);
  if (in_dynamic(address) && address + bytes > block.dynamic + block.dynamic_bytes)
    fail(std::string(writes ? "a write" : "a read") + " outside of the dynamic shared memory of the launch");
  if (!shared) check_global(reinterpret_cast<void*>(address), bytes, writes ? "a write" : "a read");
  const Access now = {order.epoch, thread < kMostThreads ? order.clock[thread] : 0, thread};
  for (uintptr_t at = address & ~uintptr_t{1}; at < address + bytes; at += 2) {
    Cell& cell = cell_at(at);
    const Access& write = cell.write;
    if (!is_ordered(write, thread, shared)) clash(write, thread, writes, shared);
    if (proxy == kAsync && write.epoch >= order.block && write.thread < kMostThreads &&
        order.fenced[write.thread] <= write.clock)
      fail("shared memory that was written without fence.proxy.async goes to a copy or a product");
    if (writes) {
      for (Access& read : cell.reads) {
        if (!is_ordered(read, thread, shared)) clash(read, thread, writes, shared);
        read = {};
      }
      cell.write = now;
    } else {
      if (shared && proxy != kMatrix && write.epoch < order.block)
        fail("shared memory is read that nobody has written");
      cell.reads[is_ordered(cell.reads[0], thread, shared) ? 0 : 1] = now;
    }
  }
}
inline void touch(const void* address, size_t bytes, bool writes, int thread, Proxy proxy = kGeneric) {
  touch(reinterpret_cast<uintptr_t>(address), bytes, writes, thread, proxy);
}

// Copies bring what is there from now on: for kOnTheWay nobody has waited for them, a barrier's have a phase.
REVIT_UNSEEN inline void give_to(int writer, uintptr_t address, size_t bytes, long phase = 0) {
  if (!kChecked) return;
  const uint32_t clock = writer < kMostThreads ? order.clock[writer] : static_cast<uint32_t>(phase);
  for (uintptr_t at = address; at < address + bytes; at += 2) cell_at(at).write = {order.epoch, clock, writer};
}

// As touch, for a write of what is there already where it is `alike`: no thread can tell, in whatever order.
REVIT_UNSEEN inline void touch_alike(uintptr_t address, size_t bytes, bool alike, int thread) {
  for (uintptr_t at = address; kChecked && at < address + bytes; at += 2) {
    Access& write = cell_at(at).write;
    const bool ordered = is_ordered(write, thread, true);
    if (!alike || (!ordered && write.thread >= kMostThreads))
      touch(at, 2, true, thread);
    else if (!ordered)
      write.thread = kAlike;
  }
}

// The thread leaves what it has seen and done to those who take it from there.
inline void release(Clocks& to) {
  if (!kChecked) return;
  const int thread = block.running->number;
  raise(to, order.seen[thread]);
  to[thread] = ++order.clock[thread];
}
inline void acquire(const Clocks& from, int barrier, long phase) {
  if (!kChecked) return;
  Clocks& mine = order.seen[block.running->number];
  raise(mine, from);
  mine[kMostThreads + barrier] = static_cast<uint32_t>(phase);
}
inline void forget_barriers() {
  if (!kChecked) return;
  for (int i = 0; i < block.threads; ++i) std::fill(order.seen[i] + kMostThreads, order.seen[i] + kOnTheWay, 0u);
}
inline void fence_proxy() {
  if (!kChecked) return;
  const int thread = block.running->number;
  order.fenced[thread] = ++order.clock[thread];
}

REVIT_UNSEEN inline void seen(void* pointer, size_t bytes, bool writes) {
  Fiber* const fiber = block.running;
  if (!fiber || fiber->unseen) return;
  ++fiber->unseen;
  const uintptr_t at = reinterpret_cast<uintptr_t>(pointer);
  if (at - fiber->bottom >= kStack) {
    touch(at, bytes, writes, fiber->number);
  } else if (fiber->products) {
    for (const Registers& held : fiber->held)
      if (at < held.end && held.begin < at + bytes && (writes || held.sums))
        fail("registers of a product are used before it was waited for");
    if (writes) fiber->written.push_back({at, at + bytes, false, 0});
  }
  --fiber->unseen;
}

}  // namespace cuda_on_host

#ifdef __SANITIZE_THREAD__

#define REVIT_HOOK extern "C" __attribute__((no_sanitize("thread"), visibility("hidden"), used)) inline
#define REVIT_SEEN(bytes)                                                                          \
  REVIT_HOOK void __tsan_read##bytes(void* at) { cuda_on_host::seen(at, bytes, false); }           \
  REVIT_HOOK void __tsan_write##bytes(void* at) { cuda_on_host::seen(at, bytes, true); }           \
  REVIT_HOOK void __tsan_unaligned_read##bytes(void* at) { cuda_on_host::seen(at, bytes, false); } \
  REVIT_HOOK void __tsan_unaligned_write##bytes(void* at) { cuda_on_host::seen(at, bytes, true); }
REVIT_SEEN(1)
REVIT_SEEN(2)
REVIT_SEEN(4)
REVIT_SEEN(8)
REVIT_SEEN(16)
REVIT_HOOK void __tsan_read_range(void* at, size_t bytes) { cuda_on_host::seen(at, bytes, false); }
REVIT_HOOK void __tsan_write_range(void* at, size_t bytes) { cuda_on_host::seen(at, bytes, true); }
REVIT_HOOK void __tsan_init() {}
REVIT_HOOK void __tsan_vptr_update(void**, void*) {}
// Of the host's code: counters of references, and statics made once.
REVIT_HOOK char __tsan_atomic8_load(const volatile char* at, int) { return *at; }
REVIT_HOOK int __tsan_atomic32_fetch_add(volatile int* at, int by, int) { return __sync_fetch_and_add(at, by); }

struct RevitPlace {  // in the source: how the undefined behaviour sanitizer begins to describe what it found
  const char* file;
  uint32_t line, column;
};
inline std::string revit_place(const void* of) {
  const RevitPlace& place = *static_cast<const RevitPlace*>(of);
  return std::string(place.file).substr(std::string(place.file).rfind('/') + 1) + ":" + std::to_string(place.line);
}
REVIT_HOOK void __ubsan_handle_type_mismatch_v1(void* of, uintptr_t) {
  cuda_on_host::fail("an address off the boundary of what is read or written there, " + revit_place(of));
}
REVIT_HOOK void __ubsan_handle_out_of_bounds(void* of, uintptr_t index) {
  cuda_on_host::fail("index " + std::to_string(static_cast<int>(index)) + " outside of an array, " + revit_place(of));
}

#endif
