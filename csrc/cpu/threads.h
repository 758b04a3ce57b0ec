// How threads share work.
#pragma once

#include <torch/csrc/stable/ops.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>
#include <utility>
#include <vector>

namespace revit {

// f(i) for i in [0, count), each thread taking the next that is left.
template <class F>
void each_of(int64_t count, F f) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(count, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) f(i);
  });
}

// Work that all threads share, in phases of some units each. A phase begins when all before it is done; a thread
// that is late only leaves more units to the others. However many threads come, one alone included, all gets done.
class Phases {
 public:
  // run(unit): any thread may call it, for units [0, units)
  void add(int64_t units, std::function<void(int64_t, char*)> run) {
    if (units) phases_.push_back({end_, std::move(run)}), end_ += units;
  }

  // memory: the calling thread's own
  void work(char* memory) {
    size_t phase = 0;
    for (int64_t ticket; (ticket = next_.fetch_add(1, std::memory_order_relaxed)) < end_;) {
      while (phase + 1 < phases_.size() && ticket >= phases_[phase + 1].begin) ++phase;
      for (int64_t spins = 0; done_.load(std::memory_order_acquire) < phases_[phase].begin;)
        if (++spins > kSpins)
          std::this_thread::yield();
        else
          relax();
      const Done done{done_};
      phases_[phase].run(ticket - phases_[phase].begin, memory);
    }
  }

 private:
  struct Done {  // even of a unit that throws, or others would wait for it
    std::atomic<int64_t>& units;
    ~Done() { units.fetch_add(1, std::memory_order_release); }
  };
  static constexpr int64_t kSpins = 4000;  // some 50 us: longer than a phase of few tokens takes
  static void relax() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  struct Phase {
    int64_t begin;
    std::function<void(int64_t, char*)> run;
  };
  std::vector<Phase> phases_;
  int64_t end_ = 0;
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<int64_t> done_{0};
};

}  // namespace revit
