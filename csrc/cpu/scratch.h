// Working memory: the one way to have some.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace revit {

// Memory handed out in pieces that start on cache lines, so that no vector crosses one. It grows to what was asked for
// most: one that is static thread_local is a thread's own from call to call.
class Arena {
 public:
  Arena() = default;
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  ~Arena() { std::free(data_); }
  // Room for so many bytes; what it held before is lost.
  void reserve(int64_t bytes) {
    used_ = 0;
    if (bytes <= size_) return;
    std::free(data_);
    size_ = (bytes + 4095) / 4096 * 4096;
    data_ = static_cast<char*>(std::aligned_alloc(4096, size_));
    if (!data_) size_ = 0, throw std::bad_alloc();
  }
  // The next piece of what was reserved, not initialised.
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

  // The whole of it, for `count` numbers.
  template <class T>
  T* only(int64_t count) {
    reserve(bytes<T>(count));
    return take<T>(count);
  }
  template <class T>
  T* filled(int64_t count, T value) {
    return std::fill_n(only<T>(count), count, value) - count;
  }

 private:
  char* data_ = nullptr;
  int64_t size_ = 0, used_ = 0;
};

}  // namespace revit
