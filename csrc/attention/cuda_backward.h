// Attention, backward: dq by query rows, then dk and dv by key rows. Both recompute the weights, so nothing is added up
// across blocks: the results are the same in every run.
#pragma once

#include "cuda_tile.h"

namespace revit_attention_cuda {

template <int kDim>
struct QueriesShape {
  static constexpr int kWarps = 8;
  static constexpr int kSlots = kDim > 80 ? 2 : 4;
  static constexpr int kTiles = kDim == 64 ? 2 : 4;
  static constexpr int kBlocks = kDim > 64 ? 1 : 2;
  static constexpr size_t kShared = size_t{kSlots} * 64 * 2 * kRow<kDim> * sizeof(uint16_t);
};

// dq of up to 128 query rows, and delta = sum(y * grad) of each for the other kernel. Keys and values are streamed.
template <int kDim, class Kind>
__global__ void __launch_bounds__(QueriesShape<kDim>::kWarps * 32, QueriesShape<kDim>::kBlocks)
    backward_queries_kernel(View grad, View q, View k, View v, View y, const float* lse, float* delta, uint16_t* dq,
                            Packed p) {
  using Shape = QueriesShape<kDim>;
  REVIT_DYNAMIC_SHARED(shared);
  const int tail = static_cast<int>(blockIdx.x) - revit::most_tiles(p.images, p.tokens, Shape::kWarps * kGroup);
  if (tail >= 0) {
    const int first = min(max(p.cu_seqlens[p.images], 0), p.tokens);
    if (!blockIdx.y) zero_tail(dq, first, p.tokens, static_cast<int64_t>(p.heads) * p.dim * 2, tail);
    return;
  }
  __shared__ Plan plan;
  make_plan<Shape::kWarps, Shape::kSlots>(plan, p, p.cu_seqlens, p.tokens, p.cu_seqlens_k, p.tokens_k);
  if (!plan.groups) return;
  const SharedAddress buffer = revit::shared_address(shared);
  auto start = [&](int step) { start_step<kDim>(buffer, plan, k, v, p.dim, step, [](auto...) {}); };
  for (int step = 0; step < plan.flight - 1; ++step) start(step);

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, place = warp / plan.groups;
  const float factor = p.scale * kLog2E;
  int step = 0;
  for (int round = 0; round * plan.beside < plan.heads; ++round) {
    const int head = plan.first_head + round * plan.beside + place;
    const bool busy = place < plan.beside && round * plan.beside + place < plan.heads;
    uint32_t queries[kDim / 16][4], grads[kDim / 16][4];
    float sums[kDim / 8][4] = {}, own_lse[2] = {}, own_delta[2] = {0, 0};
    if (busy) {
      const Rows own = rows_of_warp(plan);
      load_rows<kDim>(queries, q, head, own, p.dim);
      turn_rows<kDim, Kind>(queries, p.rotary, head, own);
      load_rows<kDim>(grads, grad, head, own, p.dim);
      {
        uint32_t outputs[kDim / 16][4];
        load_rows<kDim>(outputs, y, head, own, p.dim);
#pragma unroll
        for (int column = 0; column < kDim / 16; ++column) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float2 a = revit::unpack(outputs[column][i], Kind()), b = revit::unpack(grads[column][i], Kind());
            own_delta[i % 2] += a.x * b.x + a.y * b.y;
          }
        }
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        own_delta[i] = quad_sum(own_delta[i]);
        const int row = lane / 4 + 8 * i;
        const int64_t at = static_cast<int64_t>(own.begin + row) * p.heads + head;
        own_lse[i] = row < own.count() ? lse[at] * kLog2E : INFINITY;
        if (row < own.count() && lane % 4 == 0) delta[at] = own_delta[i];
      }
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
        float weights[Shape::kTiles][4] = {}, slopes[Shape::kTiles][4] = {};
        times_rows<kDim, Shape::kTiles, Kind>(weights, queries, chunk_keys + key * kRow<kDim> * 2, parts);
#pragma unroll
        for (int t = 0; t < Shape::kTiles; ++t) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const bool inside = 8 * t + lane % 4 * 2 + i % 2 < here;
            weights[t][i] = inside ? revit::exp2_approximate(fmaf(weights[t][i], factor, -own_lse[i / 2])) : 0;
          }
        }
        times_rows<kDim, Shape::kTiles, Kind>(slopes, grads, chunk_values + key * kRow<kDim> * 2, parts);
#pragma unroll
        for (int t = 0; t < Shape::kTiles; ++t) {
#pragma unroll
          for (int i = 0; i < 4; ++i) slopes[t][i] = weights[t][i] * (slopes[t][i] - own_delta[i / 2]);
        }
        times_columns<kDim, Shape::kTiles, Kind>(sums, slopes, chunk_keys + key * kRow<kDim> * 2, parts);
      }
    }
    if (!busy) continue;
    const Rows own = rows_of_warp(plan);
    const float scale[2] = {p.scale, p.scale};
    turn_back<kDim>(sums, p.rotary, head, own);
    store_rows<kDim, Kind>(dq, sums, scale, p.heads, head, own, p.dim);
  }
  revit::wait_for_copies<0>();
}

template <int kDim>
struct KeysShape {
  static constexpr int kWarps = 4;
  static constexpr int kSlots = kDim > 64 ? 2 : 4;
  static constexpr int kTiles = kDim > 96 ? 2 : 4;
  static constexpr int kBlocks = kDim > 64 ? 1 : 2;
  static constexpr bool kTurns = kDim <= 96;  // beyond, turning takes more registers than there are
  // Queries and gradients, then lse and delta of each.
  static constexpr size_t kRows = size_t{kSlots} * 64;
  static constexpr size_t kShared = kRows * 2 * kRow<kDim> * sizeof(uint16_t) + kRows * 2 * sizeof(float);
};

// dk and dv of up to 64 key rows. Queries and their gradients are streamed, with lse and delta of each.
template <int kDim, class Kind>
__global__ void __launch_bounds__(KeysShape<kDim>::kWarps * 32, KeysShape<kDim>::kBlocks)
    backward_keys_kernel(View grad, View q, View k, View v, const float* lse, const float* delta, uint16_t* dk,
                         uint16_t* dv, Packed p) {
  using Shape = KeysShape<kDim>;
  REVIT_DYNAMIC_SHARED(shared);
  float* const statistics = reinterpret_cast<float*>(shared + Shape::kRows * 2 * kRow<kDim> * sizeof(uint16_t));
  const int tail = static_cast<int>(blockIdx.x) - revit::most_tiles(p.images, p.tokens_k, Shape::kWarps * kGroup);
  if (tail >= 0) {
    if (blockIdx.y) return;
    const int first = min(max(p.cu_seqlens_k[p.images], 0), p.tokens_k);
    zero_tail(dk, first, p.tokens_k, static_cast<int64_t>(p.heads) * p.dim * 2, tail);
    zero_tail(dv, first, p.tokens_k, static_cast<int64_t>(p.heads) * p.dim * 2, tail);
    return;
  }
  __shared__ Plan plan;
  make_plan<Shape::kWarps, Shape::kSlots>(plan, p, p.cu_seqlens_k, p.tokens_k, p.cu_seqlens, p.tokens);
  if (!plan.groups) return;
  const SharedAddress buffer = revit::shared_address(shared);
  auto start = [&](int step) {
    start_step<kDim>(buffer, plan, q, grad, p.dim, step, [&](int slot, int head, int row, int there, int used) {
      for (int i = threadIdx.x; i < used; i += blockDim.x) {
        const int64_t at = static_cast<int64_t>(row + i) * p.heads + head;
        statistics[slot + i] = i < there ? lse[at] * kLog2E : INFINITY;  // weights of no query are zeros
        statistics[slot + plan.chunk + i] = i < there ? delta[at] : 0;
      }
    });
  };
  for (int step = 0; step < plan.flight - 1; ++step) start(step);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, place = warp / plan.groups;
  const float factor = p.scale * kLog2E;
  int step = 0;
  for (int round = 0; round * plan.beside < plan.heads; ++round) {
    const int head = plan.first_head + round * plan.beside + place;
    const bool busy = place < plan.beside && round * plan.beside + place < plan.heads;
    uint32_t own_keys[kDim / 16][4], own_values[kDim / 16][4];
    float key_sums[kDim / 8][4] = {}, value_sums[kDim / 8][4] = {};
    if (busy) {
      const Rows own = rows_of_warp(plan);
      load_rows<kDim>(own_keys, k, head, own, p.dim);
      if constexpr (Shape::kTurns) turn_rows<kDim, Kind>(own_keys, p.rotary, head, own);
      load_rows<kDim>(own_values, v, head, own, p.dim);
    }
    for (int chunk = 0; chunk < plan.chunks; ++chunk, ++step) {
      wait_for_step(plan);
      start(step + plan.flight - 1);
      if constexpr (Shape::kTurns) turn_step<kDim, Kind>(shared, plan, p.rotary, step);
      if (!busy) continue;
      const SharedAddress chunk_queries = buffer + slot_of(plan, step, place) * kRow<kDim> * 2;
      const SharedAddress chunk_grads = chunk_queries + plan.chunk * kRow<kDim> * 2;
      const float* chunk_lse = statistics + slot_of(plan, step, place);
      const float* chunk_delta = chunk_lse + plan.chunk;
      const int left = min(plan.chunk, plan.streamed.count() - chunk * plan.chunk);
      for (int query = 0; query < left; query += Shape::kTiles * 8) {
        const int here = min(left - query, Shape::kTiles * 8), parts = ceil_div(here, kGroup);
        float weights[Shape::kTiles][4] = {}, slopes[Shape::kTiles][4] = {};
        times_rows<kDim, Shape::kTiles, Kind>(weights, own_keys, chunk_queries + query * kRow<kDim> * 2, parts);
#pragma unroll
        for (int t = 0; t < Shape::kTiles; ++t) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int column = 8 * t + lane % 4 * 2 + i % 2;
            const bool inside = column < here;
            const float own_lse = chunk_lse[query + (inside ? column : 0)];
            weights[t][i] = inside ? revit::exp2_approximate(fmaf(weights[t][i], factor, -own_lse)) : 0;
          }
        }
        times_columns<kDim, Shape::kTiles, Kind>(value_sums, weights, chunk_grads + query * kRow<kDim> * 2, parts);
        times_rows<kDim, Shape::kTiles, Kind>(slopes, own_values, chunk_grads + query * kRow<kDim> * 2, parts);
#pragma unroll
        for (int t = 0; t < Shape::kTiles; ++t) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int column = 8 * t + lane % 4 * 2 + i % 2;
            const bool inside = column < here;
            const float own_delta = chunk_delta[query + (inside ? column : 0)];
            slopes[t][i] = inside ? weights[t][i] * (slopes[t][i] - own_delta) : 0;
          }
        }
        times_columns<kDim, Shape::kTiles, Kind>(key_sums, slopes, chunk_queries + query * kRow<kDim> * 2, parts);
      }
    }
    if (!busy) continue;
    const Rows own = rows_of_warp(plan);
    const float scale[2] = {p.scale, p.scale}, one[2] = {1, 1};
    store_rows<kDim, Kind>(dv, value_sums, one, p.heads, head, own, p.dim);  // first: turning takes registers
    if constexpr (Shape::kTurns) turn_back<kDim>(key_sums, p.rotary, head, own);
    store_rows<kDim, Kind>(dk, key_sums, scale, p.heads, head, own, p.dim);
  }
  revit::wait_for_copies<0>();
}

}  // namespace revit_attention_cuda
