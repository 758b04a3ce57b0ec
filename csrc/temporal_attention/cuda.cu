#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <tuple>

#include "cuda/launch.h"
#include "cuda/segments.h"
#include "cuda/vectors.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

// A sequence, of one head at one position of a clip, is that of kLanes neighbouring lanes, with kUnit columns each. Its
// few rows are read again and again, from cache. The blocks of a clip, one for kRows of its rows, share its sequences.
constexpr int kUnit = 8, kThreads = 128, kRows = 64;
constexpr float kLog2E = 1.44269504088896341f;

// (tokens, heads, head_dim), the last dimension contiguous
struct Strided {
  void* data;
  int64_t token, head;  // strides, in elements
};

struct Arguments {
  Strided q, k, v, grad, out;
  Strided y, dq, dk, dv;
  float* lse;  // (tokens, heads)
  const int *cu_seqlens, *frames;
  int clips, tokens, heads, dim, prefix;
  float scale;
  bool whole;  // every row can be read a vector at a time
};

// What a block does: its clip, the sequences that are its share, and the rows in which it writes zeros.
struct Share {
  int first, stride, frames, positions;
  int begin, end;
  int zero_begin, zero_end;  // rows, of which those that take no part are zeroed
  __device__ bool takes_part(int row) const {
    const int at = row - first;
    return positions > 0 && at < stride * frames && at % stride >= stride - positions;
  }
};

__device__ __forceinline__ Share share_of(const Arguments& a) {
  const int block = blockIdx.x, tiles = revit::most_tiles(a.clips, a.tokens, kRows);
  if (block >= tiles) {  // the tail
    const int used = a.clips ? min(max(a.cu_seqlens[a.clips], 0), a.tokens) : 0;
    const int begin = used + (block - tiles) * kRows;
    const bool last = block + 1 == static_cast<int>(gridDim.x);
    return {0, 0, 0, 0, 0, 0, min(begin, a.tokens), last ? a.tokens : min(begin + kRows, a.tokens)};
  }
  const int clip = revit::find_segment(a.cu_seqlens, a.clips, a.tokens, kRows, block);
  const revit::Rows rows = revit::rows_of(a.cu_seqlens, clip, a.tokens);
  const int first = revit::first_tile(a.cu_seqlens, clip, a.tokens, kRows);
  const int blocks = revit::first_tile(a.cu_seqlens, clip + 1, a.tokens, kRows) - first, own = block - first;
  if (own >= blocks) return {};
  Share s = {rows.begin, 0, max(a.frames[clip], 0), 0, 0, 0, 0, 0};
  s.stride = s.frames ? rows.count() / s.frames : 0;
  s.positions = max(s.stride - a.prefix, 0);
  auto part = [&](int64_t all, int i) { return static_cast<int>(all * i / blocks); };
  const int64_t sequences = static_cast<int64_t>(s.positions) * a.heads;
  s.begin = part(sequences, own), s.end = part(sequences, own + 1);
  s.zero_begin = rows.begin + part(rows.count(), own), s.zero_end = rows.begin + part(rows.count(), own + 1);
  return s;
}

template <class X>
__device__ __forceinline__ void zero_row(const Strided& y, const Arguments& a, int row) {
  X* to = static_cast<X*>(y.data) + row * y.token;
  for (int column = threadIdx.x; column < a.heads * a.dim; column += kThreads) revit::store_one(to + column, 0.f);
}

// A row of a sequence: the columns of this lane.
template <class X>
__device__ __forceinline__ void load_row(const Strided& x, int row, int head, int column, const Arguments& a,
                                         float (&y)[kUnit]) {
  const X* from = static_cast<const X*>(x.data) + row * x.token + head * x.head;
  revit::widen(revit::load<kUnit>(from, column, a.dim, a.whole), y);
}

template <class X>
__device__ __forceinline__ void store_row(const float (&x)[kUnit], const Strided& y, int row, int head, int column,
                                          const Arguments& a) {
  X* to = static_cast<X*>(y.data) + row * y.token + head * y.head;
  revit::store(revit::narrow<X, kUnit>(x), to, column, a.dim, a.whole);
}

// The product of two rows, in every lane that has part of them.
template <int kLanes>
__device__ __forceinline__ float dot(const float (&a)[kUnit], const float (&b)[kUnit]) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kUnit; ++i) sum = fmaf(a[i], b[i], sum);
#pragma unroll
  for (int step = kLanes / 2; step; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  return sum;
}

__device__ __forceinline__ void add(float (&y)[kUnit], float factor, const float (&x)[kUnit]) {
#pragma unroll
  for (int i = 0; i < kUnit; ++i) y[i] = fmaf(factor, x[i], y[i]);
}

// f(first row, head, column, whether it is there) for each of the block's sequences; all lanes come as often.
template <int kLanes, class F>
__device__ __forceinline__ void each_sequence(const Share& s, const Arguments& a, F f) {
  constexpr int kGroups = kThreads / kLanes;
  const int group = threadIdx.x / kLanes, column = threadIdx.x % kLanes * kUnit;
  for (int at = s.begin; at < s.end; at += kGroups) {
    const int sequence = min(at + group, s.end - 1);
    f(s.first + s.stride - s.positions + sequence / a.heads, sequence % a.heads, column, at + group < s.end);
  }
}

template <int kLanes, class X>
__global__ void __launch_bounds__(kThreads) forward_kernel(const Arguments a) {
  constexpr int kQueries = 4;
  const Share s = share_of(a);
  for (int row = s.zero_begin; row < s.zero_end; ++row) {
    if (s.takes_part(row)) continue;
    zero_row<X>(a.y, a, row);
    for (int head = threadIdx.x; head < a.heads; head += kThreads) a.lse[row * a.heads + head] = 0;
  }
  const float factor = a.scale * kLog2E;
  each_sequence<kLanes>(s, a, [&](int first, int head, int column, bool there) {
    for (int i = 0; i < s.frames; i += kQueries) {
      float q[kQueries][kUnit], sums[kQueries][kUnit] = {}, top[kQueries], total[kQueries] = {};
#pragma unroll
      for (int r = 0; r < kQueries; ++r) {
        load_row<X>(a.q, first + min(i + r, s.frames - 1) * s.stride, head, column, a, q[r]);
        top[r] = -INFINITY;
      }
      for (int j = 0; j < s.frames; ++j) {
        float k[kUnit], v[kUnit];
        load_row<X>(a.k, first + j * s.stride, head, column, a, k);
        load_row<X>(a.v, first + j * s.stride, head, column, a, v);
#pragma unroll
        for (int r = 0; r < kQueries; ++r) {
          const float score = dot<kLanes>(q[r], k) * factor, most = fmaxf(top[r], score);
          const float shrink = exp2f(top[r] - most), weight = exp2f(score - most);
          top[r] = most;
          total[r] = fmaf(total[r], shrink, weight);
#pragma unroll
          for (int c = 0; c < kUnit; ++c) sums[r][c] = fmaf(sums[r][c], shrink, weight * v[c]);
        }
      }
#pragma unroll
      for (int r = 0; r < kQueries; ++r) {
        if (!there || i + r >= s.frames) continue;
        const int row = first + (i + r) * s.stride;
#pragma unroll
        for (int c = 0; c < kUnit; ++c) sums[r][c] /= total[r];
        store_row<X>(sums[r], a.y, row, head, column, a);
        if (!column) a.lse[row * a.heads + head] = (top[r] + log2f(total[r])) / kLog2E;
      }
    }
  });
}

template <int kLanes, class X>
__global__ void __launch_bounds__(kThreads) backward_kernel(const Arguments a) {
  constexpr int kAtOnce = 2;
  const Share s = share_of(a);
  for (int row = s.zero_begin; row < s.zero_end; ++row) {
    if (s.takes_part(row)) continue;
    zero_row<X>(a.dq, a, row), zero_row<X>(a.dk, a, row), zero_row<X>(a.dv, a, row);
  }
  const float factor = a.scale * kLog2E;
  each_sequence<kLanes>(s, a, [&](int first, int head, int column, bool there) {
    auto row_of = [&](int frame) { return first + min(frame, s.frames - 1) * s.stride; };
    // Of a query: its gradient, the log of its sum, and what its weights' gradients are beyond that of its scores.
    auto load_gradient = [&](int row, float(&grad)[kUnit], float& lse, float& delta) {
      float out[kUnit];
      load_row<X>(a.grad, row, head, column, a, grad);
      load_row<X>(a.out, row, head, column, a, out);
      delta = dot<kLanes>(grad, out);
      lse = a.lse[row * a.heads + head] * kLog2E;
    };
    for (int i = 0; i < s.frames; i += kAtOnce) {
      float q[kAtOnce][kUnit], grad[kAtOnce][kUnit], dq[kAtOnce][kUnit] = {}, lse[kAtOnce], delta[kAtOnce];
#pragma unroll
      for (int r = 0; r < kAtOnce; ++r) {
        load_row<X>(a.q, row_of(i + r), head, column, a, q[r]);
        load_gradient(row_of(i + r), grad[r], lse[r], delta[r]);
      }
      for (int j = 0; j < s.frames; ++j) {
        float k[kUnit], v[kUnit];
        load_row<X>(a.k, row_of(j), head, column, a, k);
        load_row<X>(a.v, row_of(j), head, column, a, v);
#pragma unroll
        for (int r = 0; r < kAtOnce; ++r) {
          const float weight = exp2f(dot<kLanes>(q[r], k) * factor - lse[r]);
          add(dq[r], weight * (dot<kLanes>(grad[r], v) - delta[r]) * a.scale, k);
        }
      }
#pragma unroll
      for (int r = 0; r < kAtOnce; ++r)
        if (there && i + r < s.frames) store_row<X>(dq[r], a.dq, row_of(i + r), head, column, a);
    }
    for (int j = 0; j < s.frames; j += kAtOnce) {
      float k[kAtOnce][kUnit], v[kAtOnce][kUnit], dk[kAtOnce][kUnit] = {}, dv[kAtOnce][kUnit] = {};
#pragma unroll
      for (int r = 0; r < kAtOnce; ++r) {
        load_row<X>(a.k, row_of(j + r), head, column, a, k[r]);
        load_row<X>(a.v, row_of(j + r), head, column, a, v[r]);
      }
      for (int i = 0; i < s.frames; ++i) {
        float q[kUnit], grad[kUnit], lse, delta;
        load_row<X>(a.q, row_of(i), head, column, a, q);
        load_gradient(row_of(i), grad, lse, delta);
#pragma unroll
        for (int r = 0; r < kAtOnce; ++r) {
          const float weight = exp2f(dot<kLanes>(q, k[r]) * factor - lse);
          add(dk[r], weight * (dot<kLanes>(grad, v[r]) - delta) * a.scale, q);
          add(dv[r], weight, grad);
        }
      }
#pragma unroll
      for (int r = 0; r < kAtOnce; ++r) {
        if (!there || j + r >= s.frames) continue;
        store_row<X>(dk[r], a.dk, row_of(j + r), head, column, a);
        store_row<X>(dv[r], a.dv, row_of(j + r), head, column, a);
      }
    }
  });
}

Strided strided(const Tensor& x) { return {x.data_ptr(), x.stride(0), x.stride(1)}; }

Arguments arguments(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens, const Tensor& frames,
                    int64_t prefix, double scale, std::initializer_list<const Tensor*> more) {
  STD_TORCH_CHECK(q.size(0) * q.size(1) < int64_t{1} << 31, "tokens times heads must be below 2^31");
  STD_TORCH_CHECK(q.size(2) <= 32 * kUnit, "head_dim must be at most ", 32 * kUnit, ", got ", q.size(2));
  Arguments a = {};
  a.q = strided(q), a.k = strided(k), a.v = strided(v);
  a.cu_seqlens = static_cast<const int*>(cu_seqlens.data_ptr());
  a.frames = static_cast<const int*>(frames.data_ptr());
  a.clips = static_cast<int>(frames.size(0)), a.tokens = static_cast<int>(q.size(0));
  a.heads = static_cast<int>(q.size(1)), a.dim = static_cast<int>(q.size(2));
  a.prefix = static_cast<int>(std::min<int64_t>(prefix, a.tokens)), a.scale = static_cast<float>(scale);
  const int64_t unit = 16 / q.element_size();
  a.whole = q.size(2) % kUnit == 0;
  auto whole = [&](const Tensor& x) {
    return x.stride(0) % unit == 0 && x.stride(1) % unit == 0 && revit::on_vector(x.data_ptr());
  };
  for (const Tensor* x : {&q, &k, &v}) a.whole = a.whole && whole(*x);
  for (const Tensor* x : more) a.whole = a.whole && whole(*x);
  return a;
}

// f(std::integral_constant of how many lanes share a row)
template <class F>
void with_lanes(int dim, F f) {
  if (dim <= 4 * kUnit) return f(std::integral_constant<int, 4>{});
  if (dim <= 8 * kUnit) return f(std::integral_constant<int, 8>{});
  if (dim <= 16 * kUnit) return f(std::integral_constant<int, 16>{});
  return f(std::integral_constant<int, 32>{});
}

// Blocks for the clips, and for the tail as many as are of use.
dim3 grid_of(const Arguments& a) {
  const int tail = std::max(1, std::min((a.tokens + kRows - 1) / kRows, 64));
  return dim3(a.tokens ? revit::most_tiles(a.clips, a.tokens, kRows) + tail : 0);
}

// q, k, v: (tokens, heads, head_dim). Returns y like q, contiguous, and the log of each row's sum, (tokens, heads) fp32.
std::tuple<Tensor, Tensor> temporal_attention_cuda(const Tensor& q, const Tensor& k, const Tensor& v,
                                                   const Tensor& cu_seqlens, const Tensor& frames, int64_t prefix,
                                                   double scale) {
  Tensor y = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2)});
  Tensor lse = torch::stable::new_empty(q, {q.size(0), q.size(1)}, ScalarType::Float);
  Arguments a = arguments(q, k, v, cu_seqlens, frames, prefix, scale, {&y});
  a.y = strided(y), a.lse = static_cast<float*>(lse.data_ptr());
  const revit::Stream stream(q);
  revit::with_type(q.scalar_type(), [&](auto type) {
    using X = decltype(type);
    with_lanes(a.dim, [&](auto lanes) { stream.launch(forward_kernel<lanes, X>, grid_of(a), kThreads, 0, a); });
  });
  return {y, lse};
}

std::tuple<Tensor, Tensor, Tensor> temporal_attention_backward_cuda(const Tensor& grad, const Tensor& q,
                                                                    const Tensor& k, const Tensor& v,
                                                                    const Tensor& out, const Tensor& lse,
                                                                    const Tensor& cu_seqlens, const Tensor& frames,
                                                                    int64_t prefix, double scale) {
  auto like = [&] { return torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2)}); };
  Tensor dq = like(), dk = like(), dv = like();
  Arguments a = arguments(q, k, v, cu_seqlens, frames, prefix, scale, {&grad, &out, &dq, &dk, &dv});
  a.grad = strided(grad), a.out = strided(out), a.lse = static_cast<float*>(lse.data_ptr());
  a.dq = strided(dq), a.dk = strided(dk), a.dv = strided(dv);
  const revit::Stream stream(q);
  revit::with_type(q.scalar_type(), [&](auto type) {
    using X = decltype(type);
    with_lanes(a.dim, [&](auto lanes) { stream.launch(backward_kernel<lanes, X>, grid_of(a), kThreads, 0, a); });
  });
  return {dq, dk, dv};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(revit_kernels, m) {
  m.def(
      "temporal_attention_cuda(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, Tensor frames, int prefix, float scale)"
      " -> (Tensor, Tensor)");
  m.def(
      "temporal_attention_backward_cuda(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
      " Tensor cu_seqlens, Tensor frames, int prefix, float scale) -> (Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(revit_kernels, REVIT_CUDA_KEY, m) {
  m.impl("temporal_attention_cuda", TORCH_BOX(&temporal_attention_cuda));
  m.impl("temporal_attention_backward_cuda", TORCH_BOX(&temporal_attention_backward_cuda));
}
