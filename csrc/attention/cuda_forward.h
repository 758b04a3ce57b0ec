// Attention, forward: a block has up to 128 query rows of one image and goes through some of its heads; keys and values
// pass through shared memory in chunks that are copied while earlier ones are used.
#pragma once

#include "cuda_tile.h"

namespace revit_attention_cuda {

template <int kDim>
struct ForwardShape {
  static constexpr int kWarps = 8;
  static constexpr int kSlots = kDim > 80 ? 2 : 4;  // of 64 rows of keys and values: less than 99 KiB in all
  static constexpr int kTiles = kDim == 96 ? 2 : kDim > 32 ? 4 : 8;  // of 8 scores that a warp has in registers
  static constexpr int kBlocks = kDim > 96 ? 1 : 2;  // on a multiprocessor
  static constexpr size_t kShared = size_t{kSlots} * 64 * 2 * kRow<kDim> * sizeof(uint16_t);
};

template <int kDim, class Kind>
__global__ void __launch_bounds__(ForwardShape<kDim>::kWarps * 32, ForwardShape<kDim>::kBlocks)
    forward_kernel(View q, View k, View v, uint16_t* y, float* lse, Packed p) {
  using Shape = ForwardShape<kDim>;
  REVIT_DYNAMIC_SHARED(shared);
  const int tail = static_cast<int>(blockIdx.x) - revit::most_tiles(p.images, p.tokens, Shape::kWarps * kGroup);
  if (tail >= 0) {
    if (blockIdx.y) return;
    const int first = min(max(p.cu_seqlens[p.images], 0), p.tokens);
    zero_tail(y, first, p.tokens, static_cast<int64_t>(p.heads) * p.dim * 2, tail);
    zero_tail(lse, first, p.tokens, static_cast<int64_t>(p.heads) * 4, tail);
    return;
  }
  __shared__ Plan plan;
  make_plan<Shape::kWarps, Shape::kSlots>(plan, p, p.cu_seqlens, p.tokens, p.cu_seqlens_k, p.tokens_k);
  if (!plan.groups) return;
  const SharedAddress buffer = revit::shared_address(shared);
  auto start = [&](int step) { start_step<kDim>(buffer, plan, k, v, p.dim, step, [](auto...) {}); };
  for (int step = 0; step < plan.flight - 1; ++step) start(step);

  // Which of the heads beside one another the warp has.
  const int place = threadIdx.x / 32 / plan.groups;
  const float factor = fmaxf(p.scale * kLog2E, 1e-30f);  // so that -inf stays -inf; a scale of 0 still gives the mean
  int step = 0;
  for (int round = 0; round * plan.beside < plan.heads; ++round) {
    const int head = plan.first_head + round * plan.beside + place;
    const bool busy = place < plan.beside && round * plan.beside + place < plan.heads;
    uint32_t queries[kDim / 16][4];
    Softmax softmax;
    float sums[kDim / 8][4] = {};
    if (busy) {
      load_rows<kDim>(queries, q, head, rows_of_warp(plan), p.dim);
      turn_rows<kDim, Kind>(queries, p.rotary, head, rows_of_warp(plan));
    }
    for (int chunk = 0; chunk < plan.chunks; ++chunk, ++step) {
      wait_for_step(plan);
      start(step + plan.flight - 1);
      turn_step<kDim, Kind>(shared, plan, p.rotary, step);
      if (!busy) continue;
      const SharedAddress chunk_keys = buffer + slot_of(plan, step, place) * kRow<kDim> * 2;
      const SharedAddress chunk_values = chunk_keys + plan.chunk * kRow<kDim> * 2;
      const int left = min(plan.chunk, plan.streamed.count() - chunk * plan.chunk);
      for (int key = 0; key < left; key += Shape::kTiles * 8) {
        const int here = min(left - key, Shape::kTiles * 8), parts = ceil_div(here, kGroup);
        float scores[Shape::kTiles][4] = {};
        times_rows<kDim, Shape::kTiles, Kind>(scores, queries, chunk_keys + key * kRow<kDim> * 2, parts);
        float shrink[2];
        softmax.add<true>(scores, shrink, here, factor);
#pragma unroll
        for (int t = 0; t < kDim / 8; ++t) {
#pragma unroll
          for (int i = 0; i < 4; ++i) sums[t][i] *= shrink[i / 2];
        }
        times_columns<kDim, Shape::kTiles, Kind>(sums, scores, chunk_values + key * kRow<kDim> * 2, parts);
      }
    }
    if (!busy) continue;
    const Rows own = rows_of_warp(plan);
    const float inverse[2] = {softmax.inverse(0), softmax.inverse(1)};
    store_rows<kDim, Kind>(y, sums, inverse, p.heads, head, own, p.dim);
    softmax.store_lse(lse, p.heads, head, own, factor);
  }
  revit::wait_for_copies<0>();
}

}  // namespace revit_attention_cuda
