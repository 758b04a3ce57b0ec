// How work is shared out among threads.
#pragma once

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

// Tokens of small images that go through the blocks together: the more, the seldomer weights are read; the fewer, the
// more evenly they are shared out. Measured on 32 images of ViT-S/16: 256 is 3 % faster than 128.
constexpr int64_t kGroupRows[] = {256, 192, 128, 96};
// Of the longest share to the mean: as good as even; and beyond which all threads share each block instead.
constexpr double kImbalance = 1.015, kMostImbalance = 1.02;

// Images [first, last), and what they cost, in rows' worth of products.
struct Group {
  int64_t first, last;
  double cost;
};

// Neighbouring images together, up to `most` tokens; those that cost most first.
inline std::vector<Group> groups_of(const int32_t* boundaries, int64_t images, double cost_of_pair, int64_t most) {
  std::vector<Group> groups;
  for (int64_t i = 0; i < images;) {
    Group group{i, i, 0};
    do {
      const double length = boundaries[group.last + 1] - boundaries[group.last];
      group.cost += length + cost_of_pair * length * length;
      ++group.last;
    } while (group.last < images && boundaries[group.last + 1] - boundaries[i] <= most);
    groups.push_back(group);
    i = group.last;
  }
  std::stable_sort(groups.begin(), groups.end(), [](const Group& a, const Group& b) { return a.cost > b.cost; });
  return groups;
}

// The longest share of a thread to the mean, where each takes the next group that is left.
inline double imbalance(const std::vector<Group>& groups, int64_t threads) {
  std::vector<double> load(threads, 0.);
  double total = 0;
  for (const Group& group : groups) *std::min_element(load.begin(), load.end()) += group.cost, total += group.cost;
  return total ? *std::max_element(load.begin(), load.end()) * threads / total : 1;
}

// The groups that threads take through all blocks by themselves; none where they would wait for one another too long.
inline std::vector<Group> shares(const int32_t* boundaries, int64_t images, double cost_of_pair, int64_t threads) {
  std::vector<Group> best;
  double least = kMostImbalance;
  for (const int64_t rows : kGroupRows) {
    std::vector<Group> groups = groups_of(boundaries, images, cost_of_pair, rows);
    const double found = imbalance(groups, threads);
    if (found < least) best = std::move(groups), least = found;
    if (least <= kImbalance) break;
  }
  return best;
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
