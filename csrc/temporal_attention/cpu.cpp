// Attention across the frames of clips, forward and backward, on the CPU.
//
// An item of work is as many sequences (a head of a position of a clip) as a vector has lanes. A sequence's arithmetic
// does not depend on those beside it.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <type_traits>
#include <vector>

#include "attention/problem.h"
#include "temporal_attention/temporal_attention.h"

namespace revit {
namespace {

// Some sequences of a clip: a lane for each head of each position, numbered head by head.
struct Item {
  Clip clip;
  int64_t begin, count;  // lanes
};

}  // namespace
}  // namespace revit

#define KERNELS "temporal_attention/kernels.h"
#include "cpu/checks.h"
#include "cpu/isa.h"
#include "cpu/threads.h"

namespace revit {
namespace {

template <class F>
void each_item(const Clip& clip, int64_t heads, F f) {
  const int64_t width = EVERY_ISA_PICK(lanes)();
  for (int64_t lane = 0, end = clip.positions * heads; lane < end; lane += width)
    f(Item{clip, lane, std::min(width, end - lane)});
}

// The clips' rows, each checked against the rows there are.
struct Clips {
  std::vector<Clip> all;
  std::vector<std::pair<int64_t, int64_t>> unused;  // rows [first, last) that take no part

  Clips(const Tensor& cu_seqlens, const Tensor& frames, int64_t tokens, int64_t prefix) {
    const Boundaries boundaries("cu_seqlens", cu_seqlens, tokens);
    const int64_t clips = boundaries.images;
    check("frames", frames, {clips}, ScalarType::Int);
    REVIT_CHECK(prefix >= 0, "prefix must be at least 0, got ", prefix);
    const auto* at = boundaries.at;
    const auto* counts = static_cast<const int32_t*>(frames.data_ptr());
    int64_t end = 0;  // of the rows that are taken care of
    for (int64_t i = 0; i < clips; ++i) {
      const int64_t count = counts[i], stride = count > 0 ? (at[i + 1] - at[i]) / count : 0;
      if (stride <= prefix) continue;
      all.push_back({at[i] + prefix, stride - prefix, stride, count});
      for (int64_t f = 0; f < count; ++f) {
        const int64_t patches = at[i] + f * stride + prefix;
        if (patches > end) unused.push_back({end, patches});
        end = patches + stride - prefix;
      }
    }
    if (tokens > end) unused.push_back({end, tokens});
  }

  // A few lanes of each clip, those with the most work first.
  std::vector<Item> items(int64_t heads) const {
    std::vector<Clip> longest = all;
    std::stable_sort(longest.begin(), longest.end(), [](const Clip& a, const Clip& b) { return a.frames > b.frames; });
    std::vector<Item> items;
    for (const Clip& clip : longest) each_item(clip, heads, [&](const Item& item) { items.push_back(item); });
    return items;
  }

  // Zeros in the rows of a contiguous tensor that take no part.
  void clear(Tensor& x) const {
    const int64_t row = x.numel() / std::max<int64_t>(x.size(0), 1) * x.element_size();
    for (const auto& [first, last] : unused)
      std::memset(static_cast<char*>(x.data_ptr()) + first * row, 0, (last - first) * row);
  }
};

template <class T>
using Kernel = void (*)(const Problem<T>&, const Item&);

template <class T>
void run(Kernel<T> kernel, const Problem<T>& p, const std::vector<Item>& items) {
  constexpr int64_t kAtOnce = 4;  // items that share cache lines
  const int64_t count = static_cast<int64_t>(items.size());
  each_of((count + kAtOnce - 1) / kAtOnce, [&](int64_t task) {
    for (int64_t i = task * kAtOnce; i < std::min(count, (task + 1) * kAtOnce); ++i) kernel(p, items[i]);
  });
}

template <class T>
void forward(const Tensor& q, const Tensor& k, const Tensor& v, const Clips& clips, double scale, Tensor& y,
             Tensor& lse) {
  Problem<T> p = problem_of<T>(q, k, v, scale);
  p.y = strided<T>(y), p.lse = static_cast<float*>(lse.data_ptr());
  run<T>(EVERY_ISA_PICK(forward_item<T>), p, clips.items(p.heads));
}

template <class T>
void attend(const void* qkv, const Clip& clip, int64_t heads, int64_t head_dim, float scale, void* y, float* lse) {
  const Problem<T> p = problem_of<T>(qkv, heads, head_dim, scale, y, lse);
  const Kernel<T> kernel = EVERY_ISA_PICK(forward_item<T>);
  each_item(clip, heads, [&](const Item& item) { kernel(p, item); });
}

template <class T>
void backward(const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v, const Clips& clips, double scale,
              Tensor& dq, Tensor& dk, Tensor& dv) {
  Problem<T> p = problem_of<T>(q, k, v, scale);
  p.grad = strided<const T>(grad);
  p.dq = strided<T>(dq), p.dk = strided<T>(dk), p.dv = strided<T>(dv);
  run<T>(EVERY_ISA_PICK(backward_item<T>), p, clips.items(p.heads));
}

int64_t check_qkv(const Tensor& q, const Tensor& k, const Tensor& v) {
  check_rows("q", q, {kAny, kAny, kAny});
  REVIT_CHECK(q.size(2) > 0, "head_dim must be at least 1, got 0");
  for (const Tensor* x : {&k, &v}) {
    check_rows("k and v", *x, {q.size(0), q.size(1), q.size(2)});
    REVIT_CHECK(x->scalar_type() == q.scalar_type(), "q, k and v must be of one dtype");
  }
  return q.size(0);
}

// q, k, v: (tokens, heads, head_dim). Returns y like q, contiguous, and the log of each row's sum, (tokens, heads)
// fp32.
std::tuple<Tensor, Tensor> temporal_attention_cpu(const Tensor& q, const Tensor& k, const Tensor& v,
                                                  const Tensor& cu_seqlens, const Tensor& frames, int64_t prefix,
                                                  double scale) {
  const Clips clips(cu_seqlens, frames, check_qkv(q, k, v), prefix);
  Tensor y = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2)});
  Tensor lse = torch::stable::new_empty(q, {q.size(0), q.size(1)}, ScalarType::Float);
  clips.clear(y), clips.clear(lse);
  q.scalar_type() == ScalarType::Float ? forward<float>(q, k, v, clips, scale, y, lse)
                                       : forward<Bfloat16>(q, k, v, clips, scale, y, lse);
  return {y, lse};
}

std::tuple<Tensor, Tensor, Tensor> temporal_attention_backward_cpu(const Tensor& grad, const Tensor& q, const Tensor& k,
                                                                   const Tensor& v, const Tensor& cu_seqlens,
                                                                   const Tensor& frames, int64_t prefix, double scale) {
  const Clips clips(cu_seqlens, frames, check_qkv(q, k, v), prefix);
  check_rows("grad", grad, {q.size(0), q.size(1), q.size(2)});
  REVIT_CHECK(grad.scalar_type() == q.scalar_type(), "grad must be of the dtype of q");
  auto like = [&] { return torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2)}); };
  Tensor dq = like(), dk = like(), dv = like();
  for (Tensor* x : {&dq, &dk, &dv}) clips.clear(*x);
  q.scalar_type() == ScalarType::Float ? backward<float>(grad, q, k, v, clips, scale, dq, dk, dv)
                                       : backward<Bfloat16>(grad, q, k, v, clips, scale, dq, dk, dv);
  return {dq, dk, dv};
}

}  // namespace

void attend_frames(bool is_bf16, const void* qkv, const Clip& clip, int64_t heads, int64_t head_dim, float scale,
                   void* y, float* lse) {
  is_bf16 ? attend<Bfloat16>(qkv, clip, heads, head_dim, scale, y, lse)
          : attend<float>(qkv, clip, heads, head_dim, scale, y, lse);
}

}  // namespace revit

STABLE_TORCH_LIBRARY_FRAGMENT(revit_kernels, m) {
  m.def(
      "temporal_attention_cpu(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, Tensor frames, int prefix, float scale)"
      " -> (Tensor, Tensor)");
  m.def(
      "temporal_attention_backward_cpu(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, Tensor frames,"
      " int prefix, float scale) -> (Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(revit_kernels, CPU, m) {
  m.impl("temporal_attention_cpu", TORCH_BOX(&revit::temporal_attention_cpu));
  m.impl("temporal_attention_backward_cpu", TORCH_BOX(&revit::temporal_attention_backward_cpu));
}
