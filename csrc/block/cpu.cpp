// A whole pre-norm block of packed tokens on the CPU, at inference: norm, queries, keys and values; attention; then
// output projection, norm and MLP, with both residual adds. Tokens go through in blocks of rows that stay in a core's
// cache, against weights packed beforehand. A row's arithmetic does not depend on the rows beside it.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <new>
#include <optional>
#include <type_traits>

#include "attention/attention.h"
#include "block/problem.h"

#pragma GCC diagnostic ignored "-Wuninitialized"  // of g++ 12, in its own intrinsics
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#define KERNELS "block/rows.h"
#include "common/every_isa.h"
#include "common/scratch.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

bool is_bf16(const Tensor& x) { return x.scalar_type() == ScalarType::BFloat16; }

Layout layout(int64_t kind) {
  static const auto layout_of = EVERY_ISA_PICK(layout_of);
  return layout_of(static_cast<Kind>(kind));
}

Linear linear(const Tensor& packed, int64_t kind, int64_t in, int64_t out) {
  const Layout how = layout(kind);
  const Linear weight(static_cast<char*>(packed.data_ptr()), in, out, how.lanes, how.unit);
  STD_TORCH_CHECK(weight.end - weight.panels == packed.numel(), "a packed weight must have ",
                  weight.end - weight.panels, " bytes for ", in, " inputs and ", out, " outputs, got ",
                  packed.numel());
  return weight;
}

// Memory that a thread keeps from call to call.
class Arena {
 public:
  char* reserve(int64_t bytes) {
    if (bytes > size_) {
      size_ = 0;
      memory_.reset();
      memory_ = make_scratch((bytes + 3) / 4);
      size_ = bytes;
    }
    return reinterpret_cast<char*>(memory_.get());
  }

 private:
  Scratch memory_;
  int64_t size_ = 0;
};

// f(first, count, arena) on blocks of rows of [begin, end), each thread taking the next one that is left.
template <class F>
void share_rows(int64_t begin, int64_t end, const Shape& shape, F f) {
  const int64_t rows = end - begin, most = torch::stable::get_num_threads();
  if (rows <= 0) return;
  int64_t blocks = (rows + shape.rows - 1) / shape.rows;
  if (blocks < 8 * most) blocks = (blocks + most - 1) / most * most;  // few: as many for each thread
  blocks = std::min(blocks, rows);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, std::min(most, blocks), 1, [&](int64_t, int64_t) {
    static thread_local Arena arena;
    char* memory = arena.reserve(shape.bytes);
    for (int64_t b; (b = next.fetch_add(1, std::memory_order_relaxed)) < blocks;) {
      const int64_t first = begin + rows * b / blocks, last = begin + rows * (b + 1) / blocks;
      f(first, last - first, memory);
    }
  });
}

void zero_rows(Tensor& x, int64_t first, int64_t last) {
  const int64_t row = x.size(1) * x.element_size();
  if (last > first) std::memset(static_cast<char*>(x.data_ptr()) + first * row, 0, (last - first) * row);
}

}  // namespace

// Which kinds of weights there are kernels for here: 0 fp32, 1 bf16, 2 int8.
bool block_takes_cpu(int64_t kind) { return layout(kind).unit > 0; }

// weight: (out, in) fp32 or bf16; bias, gamma: (out,) fp32. Returns bytes, for this process alone to read.
Tensor block_pack_cpu(const Tensor& weight, const std::optional<Tensor>& bias, const std::optional<Tensor>& gamma,
                      int64_t kind) {
  const int64_t out = weight.size(0), in = weight.size(1);
  const Layout how = layout(kind);
  STD_TORCH_CHECK(how.unit > 0, "no kernel here for weights of kind ", kind);
  const Linear sizes(nullptr, in, out, how.lanes, how.unit);
  Tensor packed = torch::stable::new_empty(weight, {sizes.end - static_cast<char*>(nullptr)}, ScalarType::Byte);
  std::memset(packed.data_ptr(), 0, packed.numel());
  const Linear to = linear(packed, kind, in, out);
  for (int64_t n = 0; n < out; ++n) {
    to.bias[n] = bias ? static_cast<const float*>(bias->data_ptr())[n] : 0;
    to.gamma[n] = gamma ? static_cast<const float*>(gamma->data_ptr())[n] : 1;
  }
  static const auto pack_weight = EVERY_ISA_PICK(pack_weight);
  pack_weight(static_cast<Kind>(kind), is_bf16(weight), weight.data_ptr(), to);
  return packed;
}

// x: (tokens, dim) fp32 or bf16; row: (tokens,) int32; weights and biases of the norms: (lengths, dim) fp32;
// to_qkv, proj, fc1, fc2: of block_pack_cpu. Returns (tokens, dim).
Tensor block_cpu(const Tensor& x, const Tensor& cu_seqlens, const std::optional<Tensor>& row,
                 const Tensor& norm1_weight, const Tensor& norm1_bias, double eps1, const Tensor& norm2_weight,
                 const Tensor& norm2_bias, double eps2, const Tensor& to_qkv, const Tensor& proj, const Tensor& fc1,
                 const Tensor& fc2, int64_t heads, int64_t head_dim, int64_t hidden, double scale, int64_t activation,
                 int64_t kind) {
  const int64_t tokens = x.size(0), dim = x.size(1), width = heads * head_dim, images = cu_seqlens.size(0) - 1;
  const auto* boundaries = static_cast<const int32_t*>(cu_seqlens.data_ptr());
  const int64_t begin = boundaries[0], end = boundaries[images];
  STD_TORCH_CHECK(0 <= begin && begin <= end && end <= tokens, "cu_seqlens must stay within the ", tokens,
                  " tokens, got ", begin, " to ", end);
  Tensor y = torch::stable::new_empty(x, {tokens, dim});
  // Between the halves; the same memory for every block of a model.
  static thread_local Arena between;
  const int64_t number = x.element_size();
  char* qkv = between.reserve(aligned(tokens * 3 * width * number) + aligned(tokens * width * number) +
                              aligned(tokens * heads * 4));
  char* attended = qkv + aligned(tokens * 3 * width * number);
  auto* lse = reinterpret_cast<float*>(attended + aligned(tokens * width * number));
  auto floats = [](const Tensor& t) { return static_cast<const float*>(t.data_ptr()); };
  const Problem problem = {
      .x = x.data_ptr(),
      .attended = attended,
      .qkv = qkv,
      .y = y.data_ptr(),
      .row = row ? static_cast<const int32_t*>(row->data_ptr()) : nullptr,
      .dim = dim,
      .attended_dim = width,
      .hidden = hidden,
      .norm1 = {floats(norm1_weight), floats(norm1_bias), norm1_weight.size(0), static_cast<float>(eps1)},
      .norm2 = {floats(norm2_weight), floats(norm2_bias), norm2_weight.size(0), static_cast<float>(eps2)},
      .to_qkv = linear(to_qkv, kind, dim, 3 * width),
      .proj = linear(proj, kind, width, dim),
      .fc1 = linear(fc1, kind, dim, hidden),
      .fc2 = linear(fc2, kind, hidden, dim),
      .activation = static_cast<Activation>(activation),
      .kind = static_cast<Kind>(kind),
      .is_bf16 = is_bf16(x),
  };
  static const auto shape_of = EVERY_ISA_PICK(shape_of);
  static const auto first_half = EVERY_ISA_PICK(first_half), second_half = EVERY_ISA_PICK(second_half);
  const Shape shape = shape_of(problem);
  share_rows(begin, end, shape,
             [&](int64_t first, int64_t count, char* memory) { first_half(problem, first, count, memory); });
  revit_attention::attend(problem.is_bf16, problem.qkv, boundaries, images, tokens, heads, head_dim,
                          static_cast<float>(scale), attended, lse);
  share_rows(begin, end, shape,
             [&](int64_t first, int64_t count, char* memory) { second_half(problem, first, count, memory); });
  zero_rows(y, 0, begin);
  zero_rows(y, end, tokens);
  return y;
}

STABLE_TORCH_LIBRARY_FRAGMENT(revit_kernels, m) {
  m.def("block_takes_cpu(int kind) -> bool");
  m.def("block_pack_cpu(Tensor weight, Tensor? bias, Tensor? gamma, int kind) -> Tensor");
  m.def(
      "block_cpu(Tensor x, Tensor cu_seqlens, Tensor? row, Tensor norm1_weight, Tensor norm1_bias, float eps1,"
      " Tensor norm2_weight, Tensor norm2_bias, float eps2, Tensor to_qkv, Tensor proj, Tensor fc1, Tensor fc2,"
      " int heads, int head_dim, int hidden, float scale, int activation, int kind) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(revit_kernels, CPU, m) {
  m.impl("block_pack_cpu", TORCH_BOX(&block_pack_cpu));
  m.impl("block_cpu", TORCH_BOX(&block_cpu));
}
STABLE_TORCH_LIBRARY_IMPL(revit_kernels, CompositeExplicitAutograd, m) {
  m.impl("block_takes_cpu", TORCH_BOX(&block_takes_cpu));
}
