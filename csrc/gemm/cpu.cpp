// Weights packed for the matrix product; and a fingerprint of a weight, so that a packed copy of it is never used after
// the weight has changed.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <type_traits>
#include <vector>

#include "gemm/gemm.h"

#define KERNELS "gemm/rows.h"
#include "cpu/isa.h"

#if defined(__x86_64__)
#define EVERY_ISA __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define EVERY_ISA
#endif

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace revit {
namespace {

constexpr int64_t kSums = 128;          // independent sums, enough to hide a multiplication's latency
constexpr int64_t kChunk = 1 << 16;     // bytes that one thread takes at a time; fixed, so threads do not matter
constexpr uint32_t kOdd = 0x9E3779B1u;  // odd: a change of one word always changes its lane
constexpr uint64_t kMix = 0x9E3779B97F4A7C15ull;

EVERY_ISA uint64_t fingerprint(const unsigned char* bytes, int64_t count) {
  uint32_t sum[kSums] = {};
  uint32_t word[kSums];
  int64_t at = 0;
  for (; at + static_cast<int64_t>(sizeof(word)) <= count; at += sizeof(word)) {
    std::memcpy(word, bytes + at, sizeof(word));
    for (int64_t i = 0; i < kSums; ++i) sum[i] = sum[i] * kOdd + word[i];
  }
  if (at < count) {
    std::memset(word, 0, sizeof(word));
    std::memcpy(word, bytes + at, count - at);
    for (int64_t i = 0; i < kSums; ++i) sum[i] = sum[i] * kOdd + word[i];
  }
  uint64_t result = count;
  for (int64_t i = 0; i < kSums; ++i) result = (result ^ (result >> 29)) * kMix + sum[i];
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

Layout layout(int64_t kind) {
  static const auto layout_of = EVERY_ISA_PICK(layout_of);
  return layout_of(static_cast<Kind>(kind));
}

Linear linear(char* packed, int64_t kind, int64_t in, int64_t out) {
  const Layout how = layout(kind);
  return Linear(packed, in, out, how.lanes, how.unit);
}

void multiply(const Linear& weight, int64_t kind, bool is_bf16, const void* x, int64_t rows, Span columns,
              const void* add, void* y) {
  static const auto multiply = EVERY_ISA_PICK(multiply);
  multiply(weight, static_cast<Kind>(kind), is_bf16, x, rows, columns, add, y);
}

// Which kinds of weights there are kernels for here: 0 fp32, 1 bf16, 2 int8.
bool packs_cpu(int64_t kind) { return revit_gemm::layout(kind).unit > 0; }

// weight: (out, in) fp32 or bf16; bias, gamma: (out,) fp32. Returns bytes, for this process alone to read.
Tensor pack_cpu(const Tensor& weight, const std::optional<Tensor>& bias, const std::optional<Tensor>& gamma,
                int64_t kind) {
  const int64_t out = weight.size(0), in = weight.size(1);
  const Layout how = revit_gemm::layout(kind);
  STD_TORCH_CHECK(how.unit > 0, "no kernel here for weights of kind ", kind);
  const Linear sizes(nullptr, in, out, how.lanes, how.unit);
  Tensor packed = torch::stable::new_empty(weight, {sizes.end - static_cast<char*>(nullptr)}, ScalarType::Byte);
  std::memset(packed.data_ptr(), 0, packed.numel());
  const Linear to = revit_gemm::linear(static_cast<char*>(packed.data_ptr()), kind, in, out);
  for (int64_t n = 0; n < out; ++n) {
    to.bias[n] = bias ? static_cast<const float*>(bias->data_ptr())[n] : 0;
    to.gamma[n] = gamma ? static_cast<const float*>(gamma->data_ptr())[n] : 1;
  }
  static const auto pack_weight = EVERY_ISA_PICK(pack_weight);
  pack_weight(static_cast<Kind>(kind), weight.scalar_type() == ScalarType::BFloat16, weight.data_ptr(), to);
  return packed;
}

}  // namespace revit

STABLE_TORCH_LIBRARY_FRAGMENT(revit_kernels, m) {
  m.def("fingerprint_cpu(Tensor weight) -> int");
  m.def("packs_cpu(int kind) -> bool");
  m.def("pack_cpu(Tensor weight, Tensor? bias, Tensor? gamma, int kind) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(revit_kernels, CPU, m) {
  m.impl("fingerprint_cpu", TORCH_BOX(&revit::fingerprint_cpu));
  m.impl("pack_cpu", TORCH_BOX(&revit::pack_cpu));
}
STABLE_TORCH_LIBRARY_IMPL(revit_kernels, CompositeExplicitAutograd, m) {
  m.impl("packs_cpu", TORCH_BOX(&revit::packs_cpu));
}
