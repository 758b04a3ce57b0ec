// What one call computes, and the scratch memory of a thread.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

namespace revit_attention {

struct bf16 {
  uint16_t bits;
};

// (tokens, heads, head_dim), the last dimension contiguous
template <class T>
struct Strided {
  T* data;
  int64_t token, head;  // strides, in elements
  T* at(int64_t t, int64_t h) const { return data + t * token + h * head; }
};

template <class T>
struct Problem {
  Strided<const T> q, k, v, grad;
  Strided<T> y, dq, dk, dv;
  float* lse;  // (tokens, heads)
  int64_t heads, dim;
  float scale;
};

// One head of some query rows of one image, with all keys of that image.
struct Item {
  int64_t head, first_query, queries, first_key, keys;
};

// Memory that a thread keeps from call to call, handed out in pieces that start on cache lines.
class Scratch {
 public:
  ~Scratch() { std::free(data_); }
  void reserve(int64_t bytes) {
    used_ = 0;
    if (bytes <= size_) return;
    std::free(data_);
    size_ = (bytes + 4095) / 4096 * 4096;
    data_ = static_cast<char*>(std::aligned_alloc(4096, size_));
    if (!data_) size_ = 0, throw std::bad_alloc();
  }
  template <class T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(data_ + used_);
    used_ += bytes<T>(count);
    return piece;
  }
  template <class T>
  static int64_t bytes(int64_t count) {
    return (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
  }

 private:
  char* data_ = nullptr;
  int64_t size_ = 0, used_ = 0;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace revit_attention
