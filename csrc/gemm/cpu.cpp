// A fingerprint of a weight, so that a packed copy of it is never used after the weight has changed.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__x86_64__)
#define EVERY_ISA __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define EVERY_ISA
#endif

using torch::stable::Tensor;

namespace {

constexpr int64_t kLanes = 128;         // independent sums, enough to hide a multiplication's latency
constexpr int64_t kChunk = 1 << 16;     // bytes that one thread takes at a time; fixed, so threads do not matter
constexpr uint32_t kOdd = 0x9E3779B1u;  // odd: a change of one word always changes its lane
constexpr uint64_t kMix = 0x9E3779B97F4A7C15ull;

EVERY_ISA uint64_t fingerprint(const unsigned char* bytes, int64_t count) {
  uint32_t sum[kLanes] = {};
  uint32_t word[kLanes];
  int64_t at = 0;
  for (; at + static_cast<int64_t>(sizeof(word)) <= count; at += sizeof(word)) {
    std::memcpy(word, bytes + at, sizeof(word));
    for (int64_t i = 0; i < kLanes; ++i) sum[i] = sum[i] * kOdd + word[i];
  }
  if (at < count) {
    std::memset(word, 0, sizeof(word));
    std::memcpy(word, bytes + at, count - at);
    for (int64_t i = 0; i < kLanes; ++i) sum[i] = sum[i] * kOdd + word[i];
  }
  uint64_t result = count;
  for (int64_t i = 0; i < kLanes; ++i) result = (result ^ (result >> 29)) * kMix + sum[i];
  return result;
}

}  // namespace

// weight: contiguous, of any shape and dtype. The same bytes give the same number, at any number of threads.
int64_t fingerprint_cpu(const Tensor& weight) {
  const int64_t bytes = weight.numel() * weight.element_size();
  const int64_t chunks = (bytes + kChunk - 1) / kChunk;
  std::vector<uint64_t> parts(chunks);
  const auto* data = static_cast<const unsigned char*>(weight.data_ptr());
  torch::stable::parallel_for(0, chunks, 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      parts[i] = fingerprint(data + i * kChunk, std::min(kChunk, bytes - i * kChunk));
  });
  uint64_t result = bytes;
  for (const uint64_t part : parts) result = (result ^ (result >> 29)) * kMix + part;
  return static_cast<int64_t>(result);
}

STABLE_TORCH_LIBRARY_FRAGMENT(revit_kernels, m) { m.def("fingerprint_cpu(Tensor weight) -> int"); }
STABLE_TORCH_LIBRARY_IMPL(revit_kernels, CPU, m) { m.impl("fingerprint_cpu", TORCH_BOX(&fingerprint_cpu)); }
