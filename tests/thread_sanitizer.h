// Compiled ahead of every file where REVIT_SANITIZE has "thread": PyTorch's threads are OpenMP's, of whose barriers the
// sanitizer knows nothing. Here a kernel's threads are its own, REVIT_THREADS of them (4).
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <thread>
#include <vector>

namespace torch::stable {

inline uint32_t sanitized_num_threads() {
  const char* wanted = std::getenv("REVIT_THREADS");
  return wanted ? std::atoi(wanted) : 4;
}

template <class F>
void sanitized_parallel_for(int64_t begin, int64_t end, int64_t grain_size, const F& f) {
  static thread_local bool inside = false;
  const int64_t parts = std::min<int64_t>(sanitized_num_threads(), (end - begin + grain_size - 1) / grain_size);
  if (inside || parts < 2) {
    if (begin < end) f(begin, end);
    return;
  }
  const int64_t size = (end - begin + parts - 1) / parts;
  std::vector<std::thread> threads;
  for (int64_t from = begin; from < end; from += size)
    threads.emplace_back([&f, from, to = std::min(end, from + size)] { inside = true, f(from, to); });
  for (std::thread& thread : threads) thread.join();
}

}  // namespace torch::stable

#define get_num_threads sanitized_num_threads
#define parallel_for sanitized_parallel_for
