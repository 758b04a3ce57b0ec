// Weights packed for the matrix product.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <type_traits>
#include <vector>

#include "linear/linear.h"

#define KERNELS "linear/rows.h"
#include "cpu/checks.h"
#include "cpu/isa.h"

namespace revit {

Layout layout(int64_t kind) {
  REVIT_CHECK(kind >= 0 && kind <= static_cast<int64_t>(Kind::kInt8), "there is no kind ", kind, " of weights");
  static const auto layout_of = EVERY_ISA_PICK(layout_of);
  return layout_of(static_cast<Kind>(kind));
}

Linear linear(char* packed, int64_t kind, int64_t in, int64_t out) {
  const Layout how = layout(kind);
  REVIT_CHECK(how.unit > 0, "no kernel here for weights of kind ", kind);
  REVIT_CHECK(in > 0 && in % 4 == 0 && in <= kMostWidth && out > 0 && out <= kMostWidth,
              "a weight must be (out, in), in a multiple of 4, each at most ", kMostWidth, ", got (", out, ", ", in,
              ")");
  return Linear(packed, in, out, how.lanes, how.unit);
}

Linear packed_weight(const Tensor& packed, int64_t kind, int64_t in, int64_t out) {
  const Linear weight = linear(static_cast<char*>(packed.data_ptr()), kind, in, out);
  const int64_t bytes = weight.end - static_cast<char*>(packed.data_ptr());
  REVIT_CHECK(packed.dim() == 1 && packed.scalar_type() == ScalarType::Byte && packed.is_contiguous() &&
                  packed.numel() == bytes,
              "a weight must be the ", bytes, " bytes that pack_cpu made of (", out, ", ", in, "), got ",
              packed.numel(), " numbers");
  return weight;
}

void multiply(const Linear& weight, int64_t kind, bool is_bf16, const void* x, int64_t rows, Span columns,
              const void* add, void* y, Activation activation) {
  static const auto multiply = EVERY_ISA_PICK(multiply);
  multiply(weight, static_cast<Kind>(kind), is_bf16, x, rows, columns, add, y, activation);
}

// Which kinds of weights there are kernels for here: 0 fp32, 1 bf16, 2 int8.
bool packs_cpu(int64_t kind) { return revit::layout(kind).unit > 0; }

void read_floats(const Tensor& from, float* to) {
  const int64_t count = from.numel();
  REVIT_CHECK(from.is_contiguous(), "a bias, a norm or LayerScale must be contiguous");
  if (from.scalar_type() == ScalarType::Float) {
    std::memcpy(to, from.data_ptr(), count * 4);
  } else {
    REVIT_CHECK(from.scalar_type() == ScalarType::BFloat16, "a bias, a norm or LayerScale must be fp32 or bf16");
    static const auto widen = EVERY_ISA_PICK(widen_row);
    widen(from.data_ptr(), count, to);
  }
}

void pack(const Tensor& weight, const std::optional<Tensor>& bias, const std::optional<Tensor>& gamma, int64_t kind,
          const Linear& to) {
  const Layout how = revit::layout(kind);
  const bool is_bf16 = weight.scalar_type() == ScalarType::BFloat16;
  check_type("a weight", weight);
  check("a weight", weight, {to.out, to.in}, weight.scalar_type());
  for (const auto& row : {bias, gamma})
    REVIT_CHECK(!row || row->numel() == to.out, "a bias must have ", to.out, " numbers");
  std::memset(to.bias, 0, to.end - reinterpret_cast<char*>(to.bias));
  std::fill_n(to.gamma, to.out, 1.f);
  if (bias) read_floats(*bias, to.bias);
  if (gamma) read_floats(*gamma, to.gamma);
  static const auto pack_weight = EVERY_ISA_PICK(pack_weight);
  const int64_t panels = (to.out + how.panel - 1) / how.panel;
  torch::stable::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
    const Span columns{begin * how.panel, std::min(end * how.panel, to.out)};
    pack_weight(static_cast<Kind>(kind), is_bf16, weight.data_ptr(), to, columns);
  });
}

// Returns bytes, for this process alone to read.
Tensor pack_cpu(const Tensor& weight, const std::optional<Tensor>& bias, const std::optional<Tensor>& gamma,
                int64_t kind) {
  check_sizes("a weight", weight, {kAny, kAny});
  const int64_t out = weight.size(0), in = weight.size(1);
  const char* none = nullptr;
  Tensor packed =
      torch::stable::new_empty(weight, {revit::linear(nullptr, kind, in, out).end - none}, ScalarType::Byte);
  pack(weight, bias, gamma, kind, revit::linear(static_cast<char*>(packed.data_ptr()), kind, in, out));
  return packed;
}

// activation(x W^T + bias). x: (rows, in) fp32 or bf16; packed: the weight (out, in) and the bias, by pack_cpu of the
// dtype of x. A row's bits depend neither on the rows beside it nor on the number of threads.
Tensor linear_cpu(const Tensor& x, const Tensor& packed, int64_t out, int64_t activation) {
  constexpr int64_t kMostRows = 128, kFewRows = 24;  // that a thread multiplies at a time
  check_rows("x", x, {kAny, kAny});
  check("x", x, {kAny, kAny}, x.scalar_type());
  REVIT_CHECK(activation >= 0 && activation <= static_cast<int64_t>(Activation::kSilu), "there is no activation ",
              activation);
  const bool is_bf16 = x.scalar_type() == ScalarType::BFloat16;
  const int64_t kind = is_bf16 ? 1 : 0, rows = x.size(0), in = x.size(1), number = is_bf16 ? 2 : 4;
  const Layout how = revit::layout(kind);
  const Linear weight = packed_weight(packed, kind, in, out);
  Tensor y = torch::stable::new_empty(x, {rows, out});
  const auto* from = static_cast<const char*>(x.data_ptr());
  auto* to = static_cast<char*>(y.data_ptr());
  static const auto widen = EVERY_ISA_PICK(widen_row);
  auto part = [&](Span own, Span columns) {
    const char* left = from + own.begin * in * number;
    static thread_local std::vector<float> wide;  // for a CPU without products of bf16
    if (is_bf16 && how.unit == 4) {
      wide.resize(own.size() * in);
      for (int64_t r = 0; r < own.size(); ++r) widen(left + r * in * 2, in, wide.data() + r * in);
      left = reinterpret_cast<const char*>(wide.data());
    }
    revit::multiply(weight, kind, is_bf16, left, own.size(), columns, nullptr, to + own.begin * out * number,
                    static_cast<Activation>(activation));
  };
  const int64_t threads = torch::stable::get_num_threads(), panels = (out + how.panel - 1) / how.panel;
  if (rows < threads * kFewRows) {
    const int64_t parts = std::min(panels, 2 * threads);
    torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const Span own = Span{0, panels}.part(i, parts);
        part({0, rows}, {own.begin * how.panel, std::min(own.end * how.panel, out)});
      }
    });
  } else {
    const int64_t parts = std::max(threads, (rows + kMostRows - 1) / kMostRows);
    torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) part(Span{0, rows}.part(i, parts), {0, out});
    });
  }
  return y;
}

}  // namespace revit

STABLE_TORCH_LIBRARY_FRAGMENT(revit_kernels, m) {
  m.def("linear_cpu(Tensor x, Tensor packed, int out, int activation) -> Tensor");
  m.def("packs_cpu(int kind) -> bool");
  m.def("pack_cpu(Tensor weight, Tensor? bias, Tensor? gamma, int kind) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(revit_kernels, CPU, m) {
  m.impl("pack_cpu", TORCH_BOX(&revit::pack_cpu));
  m.impl("linear_cpu", TORCH_BOX(&revit::linear_cpu));
}
STABLE_TORCH_LIBRARY_IMPL(revit_kernels, CompositeExplicitAutograd, m) {
  m.impl("packs_cpu", TORCH_BOX(&revit::packs_cpu));
}
