// Weights packed for the matrix product.

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

#pragma GCC diagnostic ignored "-Wuninitialized"  // of g++ 12, in its own intrinsics
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#define KERNELS "gemm/rows.h"
#include "common/every_isa.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace revit_gemm {

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

}  // namespace revit_gemm

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
  const Linear to = revit_gemm::linear(static_cast<char*>(packed.data_ptr()), kind, in, out);
  std::memset(to.bias, 0, to.end - reinterpret_cast<char*>(to.bias));
  for (int64_t n = 0; n < out; ++n) {
    to.bias[n] = bias ? static_cast<const float*>(bias->data_ptr())[n] : 0;
    to.gamma[n] = gamma ? static_cast<const float*>(gamma->data_ptr())[n] : 1;
  }
  static const auto pack_weight = EVERY_ISA_PICK(pack_weight);
  const bool is_bf16 = weight.scalar_type() == ScalarType::BFloat16;
  const int64_t panels = (out + how.panel - 1) / how.panel;
  torch::stable::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
    const Span columns{begin * how.panel, std::min(end * how.panel, out)};
    pack_weight(static_cast<Kind>(kind), is_bf16, weight.data_ptr(), to, columns);
  });
  return packed;
}

STABLE_TORCH_LIBRARY_FRAGMENT(revit_kernels, m) {
  m.def("packs_cpu(int kind) -> bool");
  m.def("pack_cpu(Tensor weight, Tensor? bias, Tensor? gamma, int kind) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(revit_kernels, CPU, m) { m.impl("pack_cpu", TORCH_BOX(&pack_cpu)); }
STABLE_TORCH_LIBRARY_IMPL(revit_kernels, CompositeExplicitAutograd, m) { m.impl("packs_cpu", TORCH_BOX(&packs_cpu)); }
