// Attention within each image of a packed batch, forward and backward, on the CPU.
//
// An item of work is one head of one image: its keys and values are packed once and all its queries run against them,
// a few rows at a time, with the whole row of scores in cache. The arithmetic of an item depends on its image alone.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "attention/problem.h"

#define KERNELS "attention/kernels.h"
#include "cpu/checks.h"
#include "cpu/isa.h"
#include "cpu/threads.h"

namespace revit {
namespace {

template <class T>
using Kernel = void (*)(const Problem<T>&, const Piece&);

// Items of at most `rows` queries, those with the most work first.
std::vector<Piece> items_of(const Boundaries& queries, const Boundaries& keys, int64_t heads, int64_t rows) {
  std::vector<Piece> chunks;
  for (int64_t i = 0; i < queries.images; ++i) {
    const int64_t pieces = rows ? ceil_div(queries.length(i), rows) : 1;
    for (int64_t piece = 0, first = 0; piece < pieces; ++piece) {
      const int64_t count = ceil_div(queries.length(i) - first, pieces - piece);
      chunks.push_back({0, queries.at[i] + first, count, keys.at[i], keys.length(i)});
      first += count;
    }
  }
  std::stable_sort(chunks.begin(), chunks.end(),
                   [](const Piece& a, const Piece& b) { return a.queries * a.keys > b.queries * b.keys; });
  std::vector<Piece> items;
  items.reserve(chunks.size() * heads);
  for (const Piece& chunk : chunks)
    for (int64_t head = 0; head < heads; ++head) {
      items.push_back(chunk);
      items.back().head = head;
    }
  return items;
}

// Zeros in the rows [first, last) of a contiguous (tokens, width) buffer.
template <class T>
void zero_rows(T* data, int64_t width, int64_t first, int64_t last) {
  if (last > first) std::memset(static_cast<void*>(data + first * width), 0, (last - first) * width * sizeof(T));
}
template <class T>
void zero_outside(T* data, int64_t width, const Boundaries& images) {
  zero_rows(data, width, 0, images.at[0]);
  zero_rows(data, width, images.at[images.images], images.tokens);
}

template <class T>
void forward(const Tensor& q, const Tensor& k, const Tensor& v, const Boundaries& queries, const Boundaries& keys,
             float scale, const Rotation& rotation, Tensor& y, Tensor& lse) {
  Problem<T> p = problem_of<T>(q, k, v, scale, rotation);
  p.y = strided<T>(y), p.lse = static_cast<float*>(lse.data_ptr());
  zero_outside(p.y.data, p.heads * p.dim, queries);
  zero_outside(p.lse, p.heads, queries);
  const Kernel<T> kernel = EVERY_ISA_PICK(forward_item<T>);
  const std::vector<Piece> items = items_of(queries, keys, p.heads, 512);
  each_of(items.size(), [&](int64_t i) {
    const Piece& item = items[i];
    if (item.keys) return kernel(p, item);
    for (int64_t t = item.first_query; t < item.first_query + item.queries; ++t) {
      std::memset(static_cast<void*>(p.y.at(t, item.head)), 0, p.dim * sizeof(T));
      p.lse[t * p.heads + item.head] = -INFINITY;
    }
  });
}

}  // namespace

Rotation rotation_of(const std::optional<Tensor>& cos, const std::optional<Tensor>& sin,
                     const std::optional<Tensor>& row, bool half, int64_t tokens, int64_t heads, int64_t head_dim) {
  if (!cos) return {};
  const bool shared = cos->dim() != 3;
  for (const auto* table : {&cos, &sin}) {
    REVIT_CHECK(*table && row, "rotary needs cos, sin and row");
    if (shared)
      check("a table of rotary", *table, {cos->size(0), cos->size(-1)}, ScalarType::Float);
    else
      check("a table of rotary", *table, {cos->size(0), heads, cos->size(2)}, ScalarType::Float);
  }
  REVIT_CHECK(2 * cos->size(-1) <= head_dim, "rotary turns pairs of the ", head_dim, " channels of a head, got ",
              cos->size(-1), " pairs");
  check("row of rotary", row, {tokens}, ScalarType::Int);
  Rotation r;
  r.cos = static_cast<const float*>(cos->data_ptr()), r.sin = static_cast<const float*>(sin->data_ptr());
  r.row = static_cast<const int32_t*>(row->data_ptr());
  r.pairs = cos->size(-1), r.half = half, r.position = cos->stride(0), r.head = cos->dim() == 3 ? cos->stride(1) : 0;
  const int64_t positions = cos->size(0);
  for (int64_t t = 0; t < tokens; ++t)
    REVIT_CHECK(r.row[t] < positions, "row of rotary must stay within the ", positions, " positions, got ", r.row[t]);
  return r;
}

void attend_piece(bool is_bf16, const void* qkv, const Piece& piece, int64_t heads, int64_t head_dim, float scale,
                  const Rotation& rotation, void* y, float* lse) {
  if (is_bf16)
    EVERY_ISA_PICK(forward_item<Bfloat16>)(problem_of<Bfloat16>(qkv, heads, head_dim, scale, y, lse, rotation), piece);
  else
    EVERY_ISA_PICK(forward_item<float>)(problem_of<float>(qkv, heads, head_dim, scale, y, lse, rotation), piece);
}

namespace {

template <class T>
void backward(const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& lse,
              const Boundaries& queries, const Boundaries& keys, float scale, const Rotation& rotation, Tensor& dq,
              Tensor& dk, Tensor& dv) {
  Problem<T> p = problem_of<T>(q, k, v, scale, rotation);
  p.grad = strided<const T>(grad), p.lse = static_cast<float*>(lse.data_ptr());
  p.dq = strided<T>(dq), p.dk = strided<T>(dk), p.dv = strided<T>(dv);
  const int64_t width = p.heads * p.dim;
  zero_outside(p.dq.data, width, queries);
  zero_outside(p.dk.data, width, keys);
  zero_outside(p.dv.data, width, keys);
  const Kernel<T> kernel = EVERY_ISA_PICK(backward_item<T>);
  const std::vector<Piece> items = items_of(queries, keys, p.heads, 0);
  each_of(items.size(), [&](int64_t i) {
    const Piece& item = items[i];
    if (item.keys && item.queries) return kernel(p, item);
    for (int64_t t = item.first_query; t < item.first_query + item.queries; ++t)
      std::memset(static_cast<void*>(p.dq.at(t, item.head)), 0, p.dim * sizeof(T));
    for (int64_t t = item.first_key; t < item.first_key + item.keys; ++t) {
      std::memset(static_cast<void*>(p.dk.at(t, item.head)), 0, p.dim * sizeof(T));
      std::memset(static_cast<void*>(p.dv.at(t, item.head)), 0, p.dim * sizeof(T));
    }
  });
}

void check_qkv(const Tensor& q, const Tensor& k, const Tensor& v, const Boundaries& queries, const Boundaries& keys) {
  check_rows("q", q, {kAny, kAny, kAny});
  for (const Tensor* x : {&k, &v}) {
    check_rows("k and v", *x, {keys.tokens, q.size(1), q.size(2)});
    REVIT_CHECK(x->scalar_type() == q.scalar_type(), "q, k and v must be of one dtype");
  }
  REVIT_CHECK(q.size(2) > 0, "head_dim must be at least 1, got 0");
  REVIT_CHECK(queries.images == keys.images, "cu_seqlens_k must have the ", queries.images + 1,
              " boundaries of cu_seqlens, got ", keys.images + 1);
}

int64_t tokens_of(const Tensor& x) {
  check_sizes("q and k", x, {kAny, kAny, kAny});
  return x.size(0);
}

// q, out: (tokens, heads, head_dim); k, v: (key tokens, heads, head_dim); lse: (tokens, heads) fp32
std::tuple<Tensor, Tensor> attention_cpu(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens,
                                         const Tensor& cu_seqlens_k, double scale, const std::optional<Tensor>& cos,
                                         const std::optional<Tensor>& sin, const std::optional<Tensor>& row,
                                         bool half) {
  const Boundaries queries("cu_seqlens", cu_seqlens, tokens_of(q)), keys("cu_seqlens_k", cu_seqlens_k, tokens_of(k));
  check_qkv(q, k, v, queries, keys);
  REVIT_CHECK(!cos || q.size(0) == k.size(0), "rotary is for queries and keys of the same tokens");
  const Rotation rotation = rotation_of(cos, sin, row, half, q.size(0), q.size(1), q.size(2));
  Tensor y = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2)});
  Tensor lse = torch::stable::new_empty(q, {q.size(0), q.size(1)}, torch::headeronly::ScalarType::Float);
  if (q.scalar_type() == torch::headeronly::ScalarType::Float)
    forward<float>(q, k, v, queries, keys, static_cast<float>(scale), rotation, y, lse);
  else
    forward<Bfloat16>(q, k, v, queries, keys, static_cast<float>(scale), rotation, y, lse);
  return {y, lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward_cpu(const Tensor& grad, const Tensor& q, const Tensor& k,
                                                          const Tensor& v, const Tensor& lse, const Tensor& cu_seqlens,
                                                          const Tensor& cu_seqlens_k, double scale,
                                                          const std::optional<Tensor>& cos,
                                                          const std::optional<Tensor>& sin,
                                                          const std::optional<Tensor>& row, bool half) {
  const Boundaries queries("cu_seqlens", cu_seqlens, tokens_of(q)), keys("cu_seqlens_k", cu_seqlens_k, tokens_of(k));
  check_qkv(q, k, v, queries, keys);
  REVIT_CHECK(!cos || q.size(0) == k.size(0), "rotary is for queries and keys of the same tokens");
  const Rotation rotation = rotation_of(cos, sin, row, half, q.size(0), q.size(1), q.size(2));
  check_rows("grad", grad, {q.size(0), q.size(1), q.size(2)});
  REVIT_CHECK(grad.scalar_type() == q.scalar_type(), "grad must be of the dtype of q");
  check("lse", lse, {q.size(0), q.size(1)}, ScalarType::Float);
  Tensor dq = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2)});
  Tensor dk = torch::stable::new_empty(k, {k.size(0), k.size(1), k.size(2)});
  Tensor dv = torch::stable::new_empty(v, {v.size(0), v.size(1), v.size(2)});
  if (q.scalar_type() == torch::headeronly::ScalarType::Float)
    backward<float>(grad, q, k, v, lse, queries, keys, static_cast<float>(scale), rotation, dq, dk, dv);
  else
    backward<Bfloat16>(grad, q, k, v, lse, queries, keys, static_cast<float>(scale), rotation, dq, dk, dv);
  return {dq, dk, dv};
}

}  // namespace
}  // namespace revit

STABLE_TORCH_LIBRARY_FRAGMENT(revit_kernels, m) {
  m.def(
      "attention_cpu(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, Tensor cu_seqlens_k, float scale,"
      " Tensor? cos=None, Tensor? sin=None, Tensor? row=None, bool half=False) -> (Tensor, Tensor)");
  m.def(
      "attention_backward_cpu(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor lse, Tensor cu_seqlens,"
      " Tensor cu_seqlens_k, float scale, Tensor? cos=None, Tensor? sin=None, Tensor? row=None, bool half=False)"
      " -> (Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(revit_kernels, CPU, m) {
  m.impl("attention_cpu", TORCH_BOX(&revit::attention_cpu));
  m.impl("attention_backward_cpu", TORCH_BOX(&revit::attention_backward_cpu));
}
