// Attention within each image of a packed batch on NVIDIA GPUs from sm_80 on: mma.sync on 16-bit numbers, on Hopper
// wgmma for the forward pass; softmax and sums in fp32. No atomics: the same results in every run, and for an image in
// any company.

#include <algorithm>
#include <optional>
#include <tuple>

#include "cuda_backward.h"
#include "cuda_forward.h"
#include "cuda_hopper.h"

namespace {

using namespace revit_attention_cuda;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

View view(const Tensor& x) {
  return {static_cast<const uint16_t*>(x.data_ptr()), x.stride(0), x.stride(1)};
}

uint16_t* pointer(const Tensor& x) { return static_cast<uint16_t*>(x.data_ptr()); }

// Heads that one block goes through: as many as leave every multiprocessor several blocks.
int head_group(int tiles, int heads) {
  const int wanted = 8 * revit::multiprocessors();
  int group = std::min(heads, 4);
  while (group > 1 && static_cast<int64_t>(tiles) * ((heads + group - 1) / group) < wanted) group /= 2;
  return group;
}

using Table = std::optional<Tensor>;

// cos, sin: (positions, pairs) or (positions, heads, pairs) fp32; row: (tokens,)
Rotary rotary(const Table& cos, const Table& sin, const Table& row, bool half) {
  if (!cos) return {};
  STD_TORCH_CHECK(!half || cos->size(-1) % 8 == 0, "halves need a multiple of 8 pairs, got ", cos->size(-1));
  return {static_cast<const float*>(cos->data_ptr()),
          static_cast<const float*>(sin->data_ptr()),
          static_cast<const int*>(row->data_ptr()),
          cos->stride(0),
          cos->dim() == 3 ? cos->stride(1) : 0,
          static_cast<int>(cos->size(0)),
          static_cast<int>(cos->size(-1)),
          half};
}

Packed packed(const Tensor& q, const Tensor& k, const Tensor& cu_seqlens, const Tensor& cu_seqlens_k, double scale,
              const Rotary& rotary) {
  return {static_cast<const int*>(cu_seqlens.data_ptr()),
          static_cast<const int*>(cu_seqlens_k.data_ptr()),
          static_cast<int>(q.size(0)),
          static_cast<int>(k.size(0)),
          static_cast<int>(cu_seqlens.size(0) - 1),
          static_cast<int>(q.size(1)),
          static_cast<int>(q.size(2)),
          1,
          static_cast<float>(scale),
          rotary};
}

// A block for every tile of rows that the images can have, and those that write zeros behind the last image.
dim3 grid(Packed& p, int tokens, int warps) {
  const int tiles = revit::most_tiles(p.images, tokens, warps * kGroup);
  p.head_group = head_group(tiles, p.heads);
  return dim3(tiles + kTailBlocks, (p.heads + p.head_group - 1) / p.head_group);
}

// Calls run.template operator()<columns in shared memory, kind>() for the head_dim and dtype of q.
template <class Run>
void for_shape(const Tensor& q, Run run) {
  const int64_t dim = q.size(2);
  auto by_dim = [&](auto kind) {
    using Kind = decltype(kind);
    if (dim <= 32)
      run(std::integral_constant<int, 32>(), Kind());
    else if (dim <= 64)
      run(std::integral_constant<int, 64>(), Kind());
    else if (dim <= 80)
      run(std::integral_constant<int, 80>(), Kind());
    else if (dim <= 96)
      run(std::integral_constant<int, 96>(), Kind());
    else
      run(std::integral_constant<int, 128>(), Kind());
  };
  STD_TORCH_CHECK(dim % 8 == 0 && dim <= 128, "head_dim must be a multiple of 8, at most 128, got ", dim);
  if (q.scalar_type() == ScalarType::BFloat16)
    by_dim(revit::bfloat16());
  else
    by_dim(revit::float16());
}

// Tiles of 64 queries that a block on Hopper has of an image: two for each warpgroup, so all of an image with up to 384
// rows. And all heads, or as many as leave every multiprocessor two blocks; where even one leaves less, fewer tiles.
template <class Shape>
int hopper_tiles(Packed& p) {
  const int64_t wanted = int64_t{2} * Shape::kBlocks * revit::multiprocessors();
  int tiles = 2 * Shape::kWarpgroups;
  auto blocks = [&] { return static_cast<int64_t>(revit::most_tiles(p.images, p.tokens, tiles * kRows)); };
  if (blocks() * p.heads < wanted) tiles = Shape::kWarpgroups;
  p.head_group = p.heads;
  while (p.head_group > 1 && blocks() * ceil_div(p.heads, p.head_group) < wanted)
    p.head_group = ceil_div(p.head_group, 2);
  return tiles;
}

// Whether it went to Hopper's kernel.
template <int kDim, class Kind>
bool forward_on_hopper(const revit::Stream& stream, const Tensor& q, const Tensor& k, const Tensor& v, uint16_t* y,
                       float* lse, Packed p) {
  using Shape = HopperShape<kDim>;
  if (!p.tokens_k || p.rotary.cos || !revit::on_hopper(hopper_kernel<kDim, Kind>)) return false;
  HopperMaps maps;
  auto encode = [&](revit::TensorMap(&to)[2], const Tensor& x) {
    for (int tail = 0; tail < (Shape::kTail ? 2 : 1); ++tail)
      if (!revit::encode(to[tail], x.data_ptr(), static_cast<int>(x.size(0)), p.heads, p.dim, x.stride(0), x.stride(1),
                         kBoxRows, tail ? Shape::kTail : 64))
        return false;
    return true;
  };
  if (!encode(maps.q, q) || !encode(maps.k, k) || !encode(maps.v, v)) return false;
  const int tiles = hopper_tiles<Shape>(p);
  const dim3 grid(revit::most_tiles(p.images, p.tokens, tiles * kRows) + kTailBlocks,
                  ceil_div(p.heads, p.head_group));
  stream.launch(hopper_kernel<kDim, Kind>, grid, Shape::kThreads, Shape::kShared, maps, y, lse, p, tiles);
  return true;
}

// q, y: (tokens, heads, head_dim); k, v: (key tokens, heads, head_dim); lse: (tokens, heads) fp32
std::tuple<Tensor, Tensor> attention_cuda(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens,
                                          const Tensor& cu_seqlens_k, double scale, const Table& cos, const Table& sin,
                                          const Table& row, bool half) {
  Tensor y = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2)});
  Tensor lse = torch::stable::new_empty(q, {q.size(0), q.size(1)}, ScalarType::Float);
  if (!y.numel()) return {y, lse};
  const revit::Stream stream(q);
  Packed p = packed(q, k, cu_seqlens, cu_seqlens_k, scale, rotary(cos, sin, row, half));
  for_shape(q, [&](auto columns, auto kind) {
    constexpr int kDim = decltype(columns)::value;
    using Shape = ForwardShape<kDim>;
    float* const lse_data = static_cast<float*>(lse.data_ptr());
    constexpr int kHopperDim = kDim < 64 ? 64 : kDim;
    if (forward_on_hopper<kHopperDim, decltype(kind)>(stream, q, k, v, pointer(y), lse_data, p)) return;
    const dim3 blocks = grid(p, p.tokens, Shape::kWarps);
    stream.launch(forward_kernel<kDim, decltype(kind)>, blocks, Shape::kWarps * 32, Shape::kShared, view(q), view(k),
                  view(v), pointer(y), lse_data, p);
  });
  return {y, lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward_cuda(const Tensor& grad, const Tensor& q, const Tensor& k,
                                                           const Tensor& v, const Tensor& y, const Tensor& lse,
                                                           const Tensor& cu_seqlens, const Tensor& cu_seqlens_k,
                                                           double scale, const Table& cos, const Table& sin,
                                                           const Table& row, bool half) {
  Tensor dq = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2)});
  Tensor dk = torch::stable::new_empty(k, {k.size(0), k.size(1), k.size(2)});
  Tensor dv = torch::stable::new_empty(v, {v.size(0), v.size(1), v.size(2)});
  Tensor delta = torch::stable::new_empty(lse, {lse.size(0), lse.size(1)});
  const revit::Stream stream(q);
  Packed p = packed(q, k, cu_seqlens, cu_seqlens_k, scale, rotary(cos, sin, row, half));
  const float* lse_data = static_cast<const float*>(lse.data_ptr());
  float* delta_data = static_cast<float*>(delta.data_ptr());
  for_shape(q, [&](auto columns, auto kind) {
    constexpr int kDim = decltype(columns)::value;
    using Kind = decltype(kind);
    if (dq.numel()) {
      using Shape = QueriesShape<kDim>;
      const dim3 blocks = grid(p, p.tokens, Shape::kWarps);
      stream.launch(backward_queries_kernel<kDim, Kind>, blocks, Shape::kWarps * 32, Shape::kShared, view(grad),
                    view(q), view(k), view(v), view(y), lse_data, delta_data, pointer(dq), p);
    }
    if (dk.numel()) {
      using Shape = KeysShape<kDim>;
      STD_TORCH_CHECK(Shape::kTurns || !p.rotary.cos, "no gradients of turned rows for head_dim ", p.dim);
      const dim3 blocks = grid(p, p.tokens_k, Shape::kWarps);
      stream.launch(backward_keys_kernel<kDim, Kind>, blocks, Shape::kWarps * 32, Shape::kShared, view(grad), view(q),
                    view(k), view(v), lse_data, static_cast<const float*>(delta_data), pointer(dk), pointer(dv), p);
    }
  });
  return {dq, dk, dv};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(revit_kernels, m) {
  m.def(
      "attention_cuda(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, Tensor cu_seqlens_k, float scale,"
      " Tensor? cos=None, Tensor? sin=None, Tensor? row=None, bool half=False) -> (Tensor, Tensor)");
  m.def(
      "attention_backward_cuda(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor y, Tensor lse, Tensor cu_seqlens,"
      " Tensor cu_seqlens_k, float scale, Tensor? cos=None, Tensor? sin=None, Tensor? row=None, bool half=False)"
      " -> (Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(revit_kernels, REVIT_CUDA_KEY, m) {
  m.impl("attention_cuda", TORCH_BOX(&attention_cuda));
  m.impl("attention_backward_cuda", TORCH_BOX(&attention_backward_cuda));
}
