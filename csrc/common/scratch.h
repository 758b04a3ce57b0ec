// Working memory in which no vector crosses a cache line.

#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

using Scratch = std::unique_ptr<float[], Free>;

// Room for `size` numbers, not initialised.
inline Scratch make_scratch(int64_t size) {
  const size_t bytes = (size * sizeof(float) + 63) / 64 * 64;
  void* memory = std::aligned_alloc(64, bytes ? bytes : 64);
  if (!memory) throw std::bad_alloc();
  return Scratch(static_cast<float*>(memory));
}

inline Scratch make_scratch(int64_t size, float value) {
  Scratch scratch = make_scratch(size);
  for (int64_t i = 0; i < size; ++i) scratch[i] = value;
  return scratch;
}
