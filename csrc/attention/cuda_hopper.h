// Attention, forward, on Hopper: one thread has boxes of queries, keys and values copied to shared memory, ahead of the
// warpgroups that multiply them, 64 query rows each. Keys and values lie in a ring of slots of 64 rows.
//
// The image's length says how the block goes about a head:
// - one tile of 64 queries: a warpgroup of its own, others have other heads meanwhile; up to 64 keys are one block of
//   the softmax, so nothing is ever rescaled;
// - keys that all fit in the ring stay there while every tile of queries goes over them;
// - more keys stream through the ring, for as many tiles at a time as there are warpgroups.
// The tiles of all heads are dealt to the warpgroups in turn, so that all have as much to do. The last block of keys is
// 16, 32, 48 or 64 wide. A row's arithmetic is the same in all three: it depends on its image alone.
#pragma once

#include "cuda/hopper.h"
#include "cuda_tile.h"

namespace revit_attention_cuda {

constexpr int kRows = 64;     // of queries that a warpgroup has, and of keys in a slot
constexpr int kBoxRows = 16;  // that one copy brings: what is brought beyond the image's end is less than that

template <int kDim>
struct HopperShape {
  static constexpr int kWarpgroups = kDim > 64 ? 3 : 4;
  static constexpr int kBlocks = 1;  // on a multiprocessor
  static constexpr int kThreads = (kWarpgroups + 1) * 128;
  // Of a thread: as launched, then of those that multiply. What these gain, the warpgroup that copies has handed back.
  static constexpr int kLaunched = 65536 / (kThreads * kBlocks) / 8 * 8;
  static constexpr int kRegisters = kDim > 64 ? 160 : 112, kCopyRegisters = 24;
  static_assert(kRegisters * kWarpgroups + kCopyRegisters <= kLaunched * (kWarpgroups + 1), "would wait for ever");
  // Columns in rows of 128 bytes, and the rest in shorter ones: a head_dim of 80 has no use for 128.
  static constexpr int kTail = kDim % 64, kMain = kDim - kTail;
  static_assert(kTail == 0 || kTail == 16 || kTail == 32, "rows of 32 or 64 bytes");
  static constexpr int kOperand = kRows * kDim * 2;  // bytes of 64 rows
  static constexpr int kSlots = (225 * 1024 / kOperand - kWarpgroups) / 2;  // of 64 keys: 768, 576, 448, 320 by kDim
  static constexpr size_t kShared = 1024 + size_t{kOperand} * (kWarpgroups + 2 * kSlots);  // from a multiple of 1024 on
  static_assert(kBlocks * (kShared + 2048) <= 228 * 1024, "with plan, barriers and what the system has");
};

// For boxes of kMain and of kTail columns.
struct HopperMaps {
  revit::TensorMap q[2], k[2], v[2];
};

struct HopperPlan {
  Rows own, keys;         // own: of this block's tiles
  int tiles, chunks;      // of 64 queries, of 64 keys
  int first_head, heads;  // that the block goes through
  int passes;             // over the keys, per head
  bool stays;             // the keys do, in the ring, for all passes
};

template <int kDim>
__device__ void make_plan(HopperPlan& plan, const Packed& p, int block_tiles) {
  if (threadIdx.x < 32) {
    const int rows = block_tiles * kRows, block = blockIdx.x;
    const int image = find_segment(p.cu_seqlens, p.images, p.tokens, rows, block);
    HopperPlan made = {};
    if (image < p.images) {
      const Rows own = rows_of(p.cu_seqlens, image, p.tokens);
      const int tiles = ceil_div(own.count(), kRows), needed = ceil_div(tiles, block_tiles);
      const int mine = block - revit::first_tile(p.cu_seqlens, image, p.tokens, rows);
      if (mine >= 0 && mine < needed) {
        made.tiles = tiles / needed + (mine < tiles % needed ? 1 : 0);
        made.own.begin = own.begin + (mine * (tiles / needed) + min(mine, tiles % needed)) * kRows;
        made.own.end = min(made.own.begin + made.tiles * kRows, own.end);
      }
      made.keys = rows_of(p.cu_seqlens_k, image, p.tokens_k);
      made.chunks = ceil_div(made.keys.count(), kRows);
      made.first_head = blockIdx.y * p.head_group;
      made.heads = min(p.head_group, p.heads - made.first_head);
      made.passes = ceil_div(made.tiles, HopperShape<kDim>::kWarpgroups);
      made.stays = made.chunks <= HopperShape<kDim>::kSlots;
    }
    if (threadIdx.x == 0) plan = made;
  }
}

// Where the block's threads meet: the boxes of a slot or of queries are there, or are done with.
template <int kDim>
struct HopperBarriers {
  using Shape = HopperShape<kDim>;
  revit::Barrier full[Shape::kSlots], empty[Shape::kSlots];
  revit::Barrier queries_full[Shape::kWarpgroups], queries_empty[Shape::kWarpgroups];

  __device__ void init() {
    for (int i = 0; i < Shape::kSlots; ++i) {
      revit::init_barrier(&full[i], 1);
      revit::init_barrier(&empty[i], 4 * Shape::kWarpgroups);
    }
    for (int i = 0; i < Shape::kWarpgroups; ++i) {
      revit::init_barrier(&queries_full[i], 1);
      revit::init_barrier(&queries_empty[i], 4);
    }
    revit::fence_async();
  }
};

// Starts copying `boxes` times 16 rows of a head.
template <int kDim>
__device__ void copy_rows(SharedAddress to, const revit::TensorMap (&maps)[2], int head, int first, int boxes,
                          revit::Barrier* barrier) {
  using Shape = HopperShape<kDim>;
  for (int box = 0; box < boxes; ++box) {
    const int row = first + box * kBoxRows;
#pragma unroll
    for (int column = 0; column < Shape::kMain; column += 64)
      revit::copy_box(to + column * kRows * 2 + box * kBoxRows * 128, &maps[0], column, head, row, barrier);
    if constexpr (Shape::kTail > 0)
      revit::copy_box(to + (Shape::kMain * kRows + box * kBoxRows * Shape::kTail) * 2, &maps[1], Shape::kMain, head,
                      row, barrier);
  }
}

// The one thread that has everything copied: queries as their warpgroup has taken those before, slots as all are done.
template <int kDim>
__device__ void copy_all(SharedAddress buffer, HopperBarriers<kDim>& barriers, const HopperPlan& plan,
                         const HopperMaps& maps) {
  using Shape = HopperShape<kDim>;
  constexpr int kWarpgroups = Shape::kWarpgroups, kBoxBytes = kBoxRows * kDim * 2;
  const SharedAddress ring = buffer + kWarpgroups * Shape::kOperand;
  int step = 0;
  for (int i = 0; i < plan.heads; ++i) {
    const int head = plan.first_head + i;
    for (int pass = 0; pass < plan.passes; ++pass) {
      for (int tile = pass * kWarpgroups; tile < min((pass + 1) * kWarpgroups, plan.tiles); ++tile) {
        const int job = i * plan.tiles + tile, warpgroup = job % kWarpgroups, fill = job / kWarpgroups;
        const int first = plan.own.begin + tile * kRows;
        const int boxes = ceil_div(min(plan.own.end - first, kRows), kBoxRows);
        revit::wait(&barriers.queries_empty[warpgroup], fill % 2 ^ 1);
        revit::arrive_expecting(&barriers.queries_full[warpgroup], boxes * kBoxBytes);
        copy_rows<kDim>(buffer + warpgroup * Shape::kOperand, maps.q, head, first, boxes,
                        &barriers.queries_full[warpgroup]);
      }
      if (plan.stays && pass) continue;
      for (int chunk = 0; chunk < plan.chunks; ++chunk, ++step) {
        const int slot = step % Shape::kSlots, fill = step / Shape::kSlots;
        const int first = plan.keys.begin + chunk * kRows;
        const int boxes = ceil_div(min(plan.keys.end - first, kRows), kBoxRows);
        const SharedAddress keys = ring + slot * 2 * Shape::kOperand;
        revit::wait(&barriers.empty[slot], fill % 2 ^ 1);
        revit::arrive_expecting(&barriers.full[slot], 2 * boxes * kBoxBytes);
        copy_rows<kDim>(keys, maps.k, head, first, boxes, &barriers.full[slot]);
        copy_rows<kDim>(keys + Shape::kOperand, maps.v, head, first, boxes, &barriers.full[slot]);
      }
    }
  }
}

// 16 rows of a warp as left operands, from rows of kColumns numbers that lie as boxes do.
template <int kColumns, int kSteps>
__device__ void load_left(uint32_t (&y)[kSteps][4], int first, SharedAddress rows) {
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16 + lane % 16;
#pragma unroll
  for (int k = 0; k < kColumns / 16; ++k) {
    const int linear = row * kColumns * 2 + k * 32 + lane / 16 * 16;
    revit::load_matrices(y[first + k], rows + (linear ^ (linear >> 7 & (kColumns / 8 - 1)) << 4));
  }
}

// Zeros in the rows of values from `first` up to the next multiple of 16: weights of no key are zeros, but what was
// copied there may be NaN. Less than 16 rows of 128 bytes are a store for each thread.
template <int kDim>
__device__ void zero_values(SharedAddress values, int first, int warpgroup) {
  using Shape = HopperShape<kDim>;
  const int thread = threadIdx.x % 128, end = ceil_div(first, kBoxRows) * kBoxRows;
#pragma unroll
  for (int column = 0; column < Shape::kMain; column += 64)
    if (first + thread / 8 < end)
      revit::store_zeros(values + column * kRows * 2 + (first + thread / 8) * 128 + thread % 8 * 16);
  if constexpr (Shape::kTail > 0) {
    constexpr int kPieces = Shape::kTail / 8;
    const int row = first + thread / kPieces;
    if (row < end)
      revit::store_zeros(values + Shape::kMain * kRows * 2 + row * Shape::kTail * 2 + thread % kPieces * 16);
  }
  revit::fence_async();
  revit::sync_warpgroup(warpgroup);
}

// scores (64 x kTiles * 8) = queries (64 x kDim) keys^T
template <int kDim, int kTiles, class Kind>
__device__ __forceinline__ void start_scores(float (&scores)[kTiles][4], const uint32_t (&queries)[kDim / 16][4],
                                             SharedAddress keys) {
  using Shape = HopperShape<kDim>;
  revit::fence_products();
#pragma unroll
  for (int k = 0; k < Shape::kMain / 16; ++k) {
    const uint64_t b = revit::operand<128>(keys + k / 4 * 64 * kRows * 2 + k % 4 * 32, 16);
    revit::multiply_async<false>(scores, queries[k], b, k > 0, Kind());
  }
#pragma unroll
  for (int k = 0; k < Shape::kTail / 16; ++k) {
    const uint64_t b = revit::operand<Shape::kTail * 2>(keys + Shape::kMain * kRows * 2 + k * 32, 16);
    revit::multiply_async<false>(scores, queries[Shape::kMain / 16 + k], b, true, Kind());
  }
  revit::commit_products();
}

// sums (64 x kDim) += weights (64 x 16 * kSteps) values
template <int kDim, int kSteps, class Kind>
__device__ __forceinline__ void start_sums(float (&sums)[kDim / 8][4], const uint32_t (&weights)[kSteps][4],
                                           SharedAddress values) {
  using Shape = HopperShape<kDim>;
  auto& main = reinterpret_cast<float(&)[Shape::kMain / 8][4]>(sums);
  revit::fence_products();
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    const uint64_t b = revit::operand<128>(values + k * 16 * 128, 64 * kRows * 2);
    revit::multiply_async<true>(main, weights[k], b, true, Kind());
    if constexpr (Shape::kTail > 0) {
      auto& tail = reinterpret_cast<float(&)[Shape::kTail / 8][4]>(sums[Shape::kMain / 8]);
      const SharedAddress start = values + (Shape::kMain * kRows + k * 16 * Shape::kTail) * 2;
      revit::multiply_async<true>(tail, weights[k], revit::operand<Shape::kTail * 2>(start, 16), true, Kind());
    }
  }
  revit::commit_products();
}

// One block of keys, kTiles * 8 wide, of which `here` are there.
template <int kDim, int kTiles, bool kMasked, class Kind>
__device__ __forceinline__ void go_over(float (&sums)[kDim / 8][4], Softmax& softmax,
                                        const uint32_t (&queries)[kDim / 16][4], SharedAddress keys, int here,
                                        bool first, float factor, int warpgroup) {
  const SharedAddress values = keys + HopperShape<kDim>::kOperand;
  float scores[kTiles][4], shrink[2];
  start_scores<kDim, kTiles, Kind>(scores, queries, keys);
  if (kMasked && here % kBoxRows) zero_values<kDim>(values, here, warpgroup);
  revit::wait_for_products<0>();
  softmax.add<kMasked>(scores, shrink, here, factor);
  if (!first) {
#pragma unroll
    for (int t = 0; t < kDim / 8; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[t][i] *= shrink[i / 2];
    }
  }
  uint32_t weights[kTiles / 2][4];
#pragma unroll
  for (int k = 0; k < kTiles / 2; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      weights[k][i] = revit::pack(scores[2 * k + i / 2][i % 2 * 2], scores[2 * k + i / 2][i % 2 * 2 + 1], Kind());
  }
  start_sums<kDim, kTiles / 2, Kind>(sums, weights, values);
  revit::wait_for_products<0>();
}

// What a warpgroup does: its tiles of queries, of one head after the other.
template <int kDim, class Kind>
__device__ void multiply_all(SharedAddress buffer, HopperBarriers<kDim>& barriers, const HopperPlan& plan, uint16_t* y,
                             float* lse, const Packed& p) {
  using Shape = HopperShape<kDim>;
  constexpr int kWarpgroups = Shape::kWarpgroups;
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), warpgroup = warp / 4;  // known to be the same in all lanes
  const bool leader = threadIdx.x % 32 == 0;
  const SharedAddress own_queries = buffer + warpgroup * Shape::kOperand, ring = buffer + kWarpgroups * Shape::kOperand;
  const float factor = fmaxf(p.scale * kLog2E, 1e-30f);  // so that -inf stays -inf; a scale of 0 still gives the mean
  int step = 0;
  for (int i = 0; i < plan.heads; ++i) {
    const int head = plan.first_head + i;
    const int rank = (warpgroup + kWarpgroups - i * plan.tiles % kWarpgroups) % kWarpgroups;  // in every pass
    for (int pass = 0; pass < plan.passes; ++pass) {
      const int tile = pass * kWarpgroups + rank;
      const bool busy = tile < plan.tiles, again = plan.stays && pass;
      const bool last = !plan.stays || tile + kWarpgroups >= plan.tiles;
      if (again && !busy) break;
      if (again) step -= plan.chunks;
      uint32_t queries[kDim / 16][4];
      Softmax softmax;
      float sums[kDim / 8][4] = {};
      if (busy) {
        revit::wait(&barriers.queries_full[warpgroup], (i * plan.tiles + tile) / kWarpgroups % 2);
        load_left<64>(queries, 0, own_queries);
        if constexpr (Shape::kMain > 64) load_left<64>(queries, 4, own_queries + 64 * kRows * 2);
        if constexpr (Shape::kTail > 0)
          load_left<Shape::kTail>(queries, Shape::kMain / 16, own_queries + Shape::kMain * kRows * 2);
        __syncwarp();
        if (leader) revit::arrive(&barriers.queries_empty[warpgroup]);
      }
      for (int chunk = 0; chunk < plan.chunks; ++chunk, ++step) {
        const int slot = step % Shape::kSlots;
        if (!again) revit::wait(&barriers.full[slot], step / Shape::kSlots % 2);
        if (busy) {
          const SharedAddress keys = ring + slot * 2 * Shape::kOperand;
          const int here = min(plan.keys.count() - chunk * kRows, kRows);
          auto block = [&](auto tiles, auto masked) {
            go_over<kDim, decltype(tiles)::value, decltype(masked)::value, Kind>(sums, softmax, queries, keys, here,
                                                                                 chunk == 0, factor, warpgroup);
          };
          if (here == 64)
            block(std::integral_constant<int, 8>(), std::false_type());
          else if (here > 48)
            block(std::integral_constant<int, 8>(), std::true_type());
          else if (here > 32)
            block(std::integral_constant<int, 6>(), std::true_type());
          else if (here > 16)
            block(std::integral_constant<int, 4>(), std::true_type());
          else
            block(std::integral_constant<int, 2>(), std::true_type());
        }
        if (last && leader) revit::arrive(&barriers.empty[slot]);
      }
      if (!busy) continue;
      const int first = plan.own.begin + tile * kRows + warp % 4 * kGroup;
      const Rows rows = {first, min(first + kGroup, plan.own.end)};
      const float inverse[2] = {softmax.inverse(0), softmax.inverse(1)};
      store_rows<kDim, Kind>(y, sums, inverse, p.heads, head, rows, p.dim);
      softmax.store_lse(lse, p.heads, head, rows, factor);
    }
  }
}

template <int kDim, class Kind>
__global__ void __launch_bounds__(HopperShape<kDim>::kThreads, HopperShape<kDim>::kBlocks)
    hopper_kernel(const __grid_constant__ HopperMaps maps, uint16_t* y, float* lse, Packed p, int block_tiles) {
#ifdef REVIT_HOPPER_CODE
  using Shape = HopperShape<kDim>;
  REVIT_DYNAMIC_SHARED(shared);
  const int tail = static_cast<int>(blockIdx.x) - revit::most_tiles(p.images, p.tokens, block_tiles * kRows);
  if (tail >= 0) {
    if (blockIdx.y) return;
    const int first = min(max(p.cu_seqlens[p.images], 0), p.tokens);
    zero_tail(y, first, p.tokens, static_cast<int64_t>(p.heads) * p.dim * 2, tail);
    zero_tail(lse, first, p.tokens, static_cast<int64_t>(p.heads) * 4, tail);
    return;
  }
  __shared__ HopperPlan plan;
  __shared__ HopperBarriers<kDim> barriers;
  if (threadIdx.x == Shape::kThreads - 1) {
    for (const revit::TensorMap* map : {maps.q, maps.k, maps.v})
      for (int i = 0; i < (Shape::kTail ? 2 : 1); ++i) revit::prefetch_map(map + i);
    barriers.init();
  }
  make_plan<kDim>(plan, p, block_tiles);
  __syncthreads();
  if (!plan.tiles) return;
  const SharedAddress buffer = (revit::shared_address(shared) + 1023) & ~SharedAddress{1023};
  if (threadIdx.x < Shape::kWarpgroups * 128) {
    revit::grow_registers<Shape::kRegisters>();
    multiply_all<kDim, Kind>(buffer, barriers, plan, y, lse, p);
  } else {
    revit::shrink_registers<Shape::kCopyRegisters>();
    if (threadIdx.x == Shape::kWarpgroups * 128) copy_all<kDim>(buffer, barriers, plan, maps);
  }
#endif
}

}  // namespace revit_attention_cuda
