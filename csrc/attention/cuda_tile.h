// What the attention kernels share: which rows of which image a block has, rows of one head on their way through shared
// memory, and the operands of the tensor cores.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/launch.h"
#include "cuda/ptx.h"
#include "cuda/segments.h"

namespace revit_attention_cuda {

using revit::find_segment;
using revit::Rows;
using revit::rows_of;
using revit::SharedAddress;

constexpr int kGroup = 16;  // rows that one warp has: the tensor cores' tile
constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2 = 0.69314718055994531f;
constexpr int kTailBlocks = 8;  // blocks that write zeros into the rows of no image

// (tokens, heads, head_dim) of 16-bit numbers, the last dimension contiguous, every row on 16 bytes
struct View {
  const uint16_t* data;
  int64_t token, head;  // strides, in elements
  __device__ const uint16_t* at(int64_t t, int h) const { return data + t * token + h * head; }
};

// Angles by which pairs of channels of queries and keys are turned; no cos where none are.
struct Rotary {
  const float *cos, *sin;  // (positions, pairs), or (positions, heads, pairs)
  const int* row;          // (tokens,), outside the positions for a token that stays as it is
  int64_t position, head;  // strides; that of heads is 0 where they share their angles
  int positions, pairs;
  bool half;  // channel c belongs to c + pairs, of which there is a multiple of 8, not to its neighbour
  // Where a token's angles for a head are; below 0 for one that stays.
  __device__ int64_t at(int64_t token, int h) const {
    const int own = row[token];
    return own < 0 || own >= positions ? -1 : own * position + h * head;
  }
};

struct Packed {
  const int *cu_seqlens, *cu_seqlens_k;
  int tokens, tokens_k, images, heads, dim;
  int head_group;  // heads that a block goes through
  float scale;
  Rotary rotary;
};

// Rows in shared memory are 16 bytes longer than they need: eight of them then start in eight different banks.
template <int kDim>
constexpr int kRow = kDim + 8;

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// What one block has to do, in its shared memory: registers are for the products.
//
// Its own rows are in groups of 16, one to a warp; an image of few rows leaves room for other heads of it beside. The
// other rows are streamed: they pass through shared memory in chunks. How depends on the image's own length alone, so an
// image's arithmetic is the same in any company.
struct Plan {
  Rows own, streamed;
  int first_group, groups;  // of 16 own rows, in this block
  int beside;               // heads at a time
  int chunk;                // streamed rows at a time
  int flight;               // chunks on their way or in use
  int first_head, heads;    // that the block goes through
  int chunks, steps;        // of one head, and of all
};

// Its own rows are a tile of an image: the image's groups of 16 are dealt out evenly over as many blocks as they need.
template <int kWarps, int kSlots>
__device__ void make_plan(Plan& plan, const Packed& p, const int* cu_own, int own_tokens, const int* cu_streamed,
                          int streamed_tokens) {
  if (threadIdx.x < 32) {
    constexpr int kTile = kWarps * kGroup;
    const int block = blockIdx.x, image = find_segment(cu_own, p.images, own_tokens, kTile, block);
    Plan made = {};
    if (image < p.images) {
      made.own = rows_of(cu_own, image, own_tokens);
      made.streamed = rows_of(cu_streamed, image, streamed_tokens);
      const int groups = ceil_div(made.own.count(), kGroup), tiles = ceil_div(groups, kWarps);
      const int mine = block - revit::first_tile(cu_own, image, own_tokens, kTile);
      if (mine >= 0 && mine < tiles) {
        made.first_group = mine * (groups / tiles) + min(mine, groups % tiles);
        made.groups = groups / tiles + (mine < groups % tiles ? 1 : 0);
      }
      made.beside = groups * 4 <= kWarps ? 4 : groups * 2 <= kWarps ? 2 : 1;
      made.chunk = min(64, kSlots * 32 / made.beside);
      made.flight = kSlots * 64 / (made.beside * made.chunk);
      made.first_head = blockIdx.y * p.head_group;
      made.heads = min(p.head_group, p.heads - made.first_head);
      made.chunks = ceil_div(made.streamed.count(), made.chunk);
      made.steps = made.chunks * ceil_div(made.heads, made.beside);
    }
    if (threadIdx.x == 0) plan = made;
  }
  __syncthreads();
}

// Starts copying `rows` rows of one head to shared memory: those from `there` on, and columns from `dim` on, are zeros.
template <int kDim>
__device__ void stage(SharedAddress to, const View& from, int head, int first, int there, int rows, int dim) {
  constexpr int kPieces = kDim / 8;
  for (int i = threadIdx.x; i < rows * kPieces; i += blockDim.x) {
    const int row = i / kPieces, column = i % kPieces * 8;
    const bool inside = row < there && column < dim;
    const uint16_t* source = inside ? from.at(first + row, head) + column : from.data;
    revit::copy_async(to + (row * kRow<kDim> + column) * 2, source, inside);
  }
}

// The 16 rows of a warp as left operands of the tensor cores, straight from global memory.
template <int kDim>
__device__ void load_rows(uint32_t (&y)[kDim / 16][4], const View& from, int head, Rows rows, int dim) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = lane / 4 + 8 * half;
    const uint16_t* source = row < rows.count() ? from.at(rows.begin + row, head) : from.data;
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
#pragma unroll
      for (int right = 0; right < 2; ++right) {
        const int column = 16 * k + 8 * right + lane % 4 * 2;
        const bool inside = row < rows.count() && column < dim;
        y[k][half + 2 * right] = inside ? __ldg(reinterpret_cast<const uint32_t*>(source + column)) : 0u;
      }
    }
  }
}

// Turns the two channels of a pair, or turns them back.
template <bool kBack>
__device__ inline void turn(float& a, float& b, const Rotary& r, int64_t at, int pair) {
  const float cos = __ldg(r.cos + at + pair), sin = kBack ? -__ldg(r.sin + at + pair) : __ldg(r.sin + at + pair);
  const float first = a * cos - b * sin;
  b = b * cos + a * sin;
  a = first;
}

// Turns a row of which a thread has two neighbouring channels in every 8: read(block) and write(block, both).
template <int kDim, bool kBack, class Read, class Write>
__device__ __forceinline__ void turn_row(const Rotary& r, int64_t at, Read read, Write write) {
  const int own = threadIdx.x % 4 * 2;
  if (!r.half) {
#pragma unroll
    for (int block = 0; block < kDim / 8; ++block) {
      if (4 * block + own / 2 < r.pairs) {
        float2 x = read(block);
        turn<kBack>(x.x, x.y, r, at, 4 * block + own / 2);
        write(block, x);
      }
    }
    return;
  }
#pragma unroll
  for (int apart = 1; apart <= kDim / 16; ++apart) {  // registers have no index but a constant
    if (r.pairs == 8 * apart) {
#pragma unroll
      for (int block = 0; block < apart; ++block) {
        float2 a = read(block), b = read(block + apart);
        turn<kBack>(a.x, b.x, r, at, 8 * block + own);
        turn<kBack>(a.y, b.y, r, at, 8 * block + own + 1);
        write(block, a);
        write(block + apart, b);
      }
    }
  }
}

// Turns the 16 rows of a warp, as `load_rows` gives them.
template <int kDim, class Kind>
__device__ void turn_rows(uint32_t (&y)[kDim / 16][4], const Rotary& r, int head, Rows rows) {
  if (!r.cos) return;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = threadIdx.x % 32 / 4 + 8 * half;
    const int64_t at = row < rows.count() ? r.at(rows.begin + row, head) : -1;
    if (at >= 0)
      turn_row<kDim, false>(
          r, at, [&](int block) { return revit::unpack(y[block / 2][half + block % 2 * 2], Kind()); },
          [&](int block, float2 x) { y[block / 2][half + block % 2 * 2] = revit::pack(x.x, x.y, Kind()); });
  }
}

// Turns the gradients of 16 turned rows of a warp back.
template <int kDim>
__device__ void turn_back(float (&sums)[kDim / 8][4], const Rotary& r, int head, Rows rows) {
  if (!r.cos) return;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = threadIdx.x % 32 / 4 + 8 * half;
    const int64_t at = row < rows.count() ? r.at(rows.begin + row, head) : -1;
    if (at >= 0)
      turn_row<kDim, true>(
          r, at, [&](int block) { return float2{sums[block][2 * half], sums[block][2 * half + 1]}; },
          [&](int block, float2 x) { sums[block][2 * half] = x.x, sums[block][2 * half + 1] = x.y; });
  }
}

// The right operands of two neighbouring tiles of 8 columns, for s = a rows^T: 16 rows, from column `column` on.
template <int kDim>
__device__ void rows_operand(uint32_t (&b)[4], SharedAddress rows, int row, int column) {
  const int lane = threadIdx.x % 32, matrix = lane / 8;
  const int own = (matrix / 2 * 8 + lane % 8) * kRow<kDim> + matrix % 2 * 8;
  revit::load_matrices(b, rows + own * 2 + (row * kRow<kDim> + column) * 2);
}

// The right operands of two neighbouring tiles of 8 columns, for y = p rows: 16 rows, from column `column` on.
template <int kDim>
__device__ void columns_operand(uint32_t (&b)[4], SharedAddress rows, int row, int column) {
  const int lane = threadIdx.x % 32, matrix = lane / 8;
  const int own = (matrix % 2 * 8 + lane % 8) * kRow<kDim> + matrix / 2 * 8;
  revit::load_transposed(b, rows + own * 2 + (row * kRow<kDim> + column) * 2);
}

// sums (16 x kTiles * 8) += a (16 x kDim) rows^T, for the first 16 * `steps` rows
template <int kDim, int kTiles, class Kind>
__device__ void times_rows(float (&sums)[kTiles][4], const uint32_t (&a)[kDim / 16][4], SharedAddress rows, int steps) {
#pragma unroll
  for (int step = 0; step < kTiles / 2; ++step) {
    if (step < steps) {
#pragma unroll
      for (int k = 0; k < kDim / 16; ++k) {
        uint32_t b[4];
        rows_operand<kDim>(b, rows, 16 * step, 16 * k);
        revit::multiply_add(sums[2 * step], a[k], b[0], b[1], Kind());
        revit::multiply_add(sums[2 * step + 1], a[k], b[2], b[3], Kind());
      }
    }
  }
}

// sums (16 x kDim) += weights (16 x kTiles * 8) rows, for the first 16 * `steps` rows
template <int kDim, int kTiles, class Kind>
__device__ void times_columns(float (&sums)[kDim / 8][4], const float (&weights)[kTiles][4], SharedAddress rows,
                              int steps) {
#pragma unroll
  for (int step = 0; step < kTiles / 2; ++step) {
    if (step < steps) {
      const float(&left)[4] = weights[2 * step], (&right)[4] = weights[2 * step + 1];
      const uint32_t a[4] = {revit::pack(left[0], left[1], Kind()), revit::pack(left[2], left[3], Kind()),
                             revit::pack(right[0], right[1], Kind()), revit::pack(right[2], right[3], Kind())};
#pragma unroll
      for (int column = 0; column < kDim / 16; ++column) {
        uint32_t b[4];
        columns_operand<kDim>(b, rows, 16 * step, 16 * column);
        revit::multiply_add(sums[2 * column], a, b[0], b[1], Kind());
        revit::multiply_add(sums[2 * column + 1], a, b[2], b[3], Kind());
      }
    }
  }
}

// Element i of lane j becomes element j of lane i, within every four lanes.
__device__ inline void transpose_quad(uint32_t (&x)[4]) {
  const int lane = threadIdx.x % 4;
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & bit) continue;
      const bool upper = lane & bit;
      const uint32_t other = __shfl_xor_sync(~0u, upper ? x[i] : x[i | bit], bit);
      (upper ? x[i] : x[i | bit]) = other;
    }
  }
}

// Writes 16 rows of sums, each times its own factor, to a contiguous (tokens, heads, dim): 16 bytes at a time.
template <int kDim, class Kind>
__device__ void store_rows(uint16_t* y, const float (&sums)[kDim / 8][4], const float (&factor)[2], int64_t heads,
                           int head, Rows rows, int dim) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = lane / 4 + 8 * half;
    uint16_t* to = y + ((rows.begin + row) * heads + head) * dim;
#pragma unroll
    for (int tile = 0; tile < kDim / 8; tile += 4) {
      uint32_t pairs[4] = {};
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (tile + i < kDim / 8)
          pairs[i] = revit::pack(sums[tile + i][2 * half] * factor[half], sums[tile + i][2 * half + 1] * factor[half],
                                 Kind());
      transpose_quad(pairs);
      const int column = (tile + lane % 4) * 8;
      if (row < rows.count() && column < dim)
        *reinterpret_cast<uint4*>(to + column) = {pairs[0], pairs[1], pairs[2], pairs[3]};
    }
  }
}

// Zeros in the rows from `first` on of a contiguous buffer of `tokens` rows of `width` bytes, by the last kTailBlocks.
__device__ inline void zero_tail(void* y, int first, int tokens, int64_t width, int block) {
  unsigned char* to = static_cast<unsigned char*>(y);
  const int64_t end = tokens * width / 4, step = static_cast<int64_t>(kTailBlocks) * blockDim.x;
  for (int64_t i = first * width / 4 + block * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < end; i += step)
    reinterpret_cast<uint32_t*>(to)[i] = 0;
}

// The rows of a warp. Asked for again where they are needed again: kept, they would take registers from the products.
__device__ inline Rows rows_of_warp(const Plan& plan) {
  const int group = plan.first_group + static_cast<int>(threadIdx.x / 32) % plan.groups;
  const int first = plan.own.begin + group * kGroup;
  return {first, min(first + kGroup, plan.own.end)};
}

// Where the streamed rows of a step lie in shared memory: for each head beside, two operands of `chunk` rows.
__device__ inline int slot_of(const Plan& plan, int step, int beside) {
  return ((step & (plan.flight - 1)) * plan.beside + beside) * 2 * plan.chunk;
}

// Starts copying the streamed rows of a step, of two operands, to shared memory; calls also(slot, head, row, rows there,
// rows used) for what else belongs to them.
template <int kDim, class Also>
__device__ void start_step(SharedAddress shared, const Plan& plan, const View& a, const View& b, int dim, int step,
                           Also also) {
  if (step < plan.steps) {
    const int round = step / plan.chunks, row = (step - round * plan.chunks) * plan.chunk;
    const int there = min(plan.chunk, plan.streamed.count() - row), used = ceil_div(there, kGroup) * kGroup;
    for (int beside = 0; beside < plan.beside && round * plan.beside + beside < plan.heads; ++beside) {
      const int head = plan.first_head + round * plan.beside + beside, slot = slot_of(plan, step, beside);
      stage<kDim>(shared + slot * kRow<kDim> * 2, a, head, plan.streamed.begin + row, there, used, dim);
      stage<kDim>(shared + (slot + plan.chunk) * kRow<kDim> * 2, b, head, plan.streamed.begin + row, there, used, dim);
      also(slot, head, plan.streamed.begin + row, there, used);
    }
  }
  revit::commit_copies();
}

// Turns the rows of a step's first operand where they lie in shared memory, once they are there.
template <int kDim, class Kind>
__device__ void turn_step(unsigned char* shared, const Plan& plan, const Rotary& r, int step) {
  if (!r.cos) return;
  const int round = step / plan.chunks, row = (step - round * plan.chunks) * plan.chunk;
  const int there = min(plan.chunk, plan.streamed.count() - row), words = r.half ? r.pairs / 2 : r.pairs;
  for (int beside = 0; beside < plan.beside && round * plan.beside + beside < plan.heads; ++beside) {
    const int head = plan.first_head + round * plan.beside + beside;
    uint32_t* const rows = reinterpret_cast<uint32_t*>(shared) + slot_of(plan, step, beside) * (kRow<kDim> / 2);
    for (int i = threadIdx.x; i < there * words; i += blockDim.x) {
      const int own = i / words, word = i % words;
      const int64_t at = r.at(plan.streamed.begin + row + own, head);
      if (at < 0) continue;
      uint32_t* const first = rows + own * (kRow<kDim> / 2) + word;
      float2 a = revit::unpack(*first, Kind());
      if (r.half) {
        uint32_t* const second = first + r.pairs / 2;
        float2 b = revit::unpack(*second, Kind());
        turn<false>(a.x, b.x, r, at, 2 * word);
        turn<false>(a.y, b.y, r, at, 2 * word + 1);
        *second = revit::pack(b.x, b.y, Kind());
      } else {
        turn<false>(a.x, a.y, r, at, word);
      }
      *first = revit::pack(a.x, a.y, Kind());
    }
  }
  __syncthreads();
}

// Until the step's rows are there for all threads, and all are done with those that the next copies go over.
__device__ inline void wait_for_step(const Plan& plan) {
  if (plan.flight == 4)
    revit::wait_for_copies<2>();
  else
    revit::wait_for_copies<0>();
  __syncthreads();
}

// The largest of a row's scores, or their sum: a row lies in four neighbouring lanes.
__device__ inline float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
__device__ inline float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// The softmax of two rows, 8 apart, of which a thread sees every fourth pair of scores: block after block of keys.
struct Softmax {
  float top[2] = {-INFINITY, -INFINITY}, total[2] = {0, 0};

  // Makes weights of the scores, of which those from `here` on count for nothing; what was summed before shrinks.
  template <bool kMasked, int kTiles>
  __device__ void add(float (&scores)[kTiles][4], float (&shrink)[2], int here, float factor) {
    const int column = threadIdx.x % 4 * 2;
    float highest[2] = {top[0], top[1]};
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (kMasked && 8 * t + column + i % 2 >= here) scores[t][i] = -INFINITY;
        highest[i / 2] = fmaxf(highest[i / 2], scores[t][i]);
      }
    }
    float base[2], added[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      highest[i] = quad_max(highest[i]);
      base[i] = highest[i] == -INFINITY ? 0 : highest[i] * factor;
      shrink[i] = revit::exp2_approximate(top[i] * factor - base[i]);
      top[i] = highest[i];
    }
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        scores[t][i] = revit::exp2_approximate(fmaf(scores[t][i], factor, -base[i / 2]));
        added[i / 2] += scores[t][i];
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) total[i] = total[i] * shrink[i] + quad_sum(added[i]);
  }

  // 1 / sum of a row's weights: what makes them add up to one. No keys: zeros.
  __device__ float inverse(int i) const { return total[i] == 0 ? 0 : 1 / total[i]; }

  // Writes log(sum(exp(score * scale))) of the rows of a warp to (tokens, heads).
  __device__ void store_lse(float* lse, int heads, int head, Rows rows, float factor) const {
    const int lane = threadIdx.x % 32;
    if (lane % 4 >= 2) return;
    const int row = lane / 4 + lane % 4 * 8;
    const float highest = lane % 4 ? top[1] : top[0], sum = lane % 4 ? total[1] : total[0];
    if (row < rows.count())
      lse[static_cast<int64_t>(rows.begin + row) * heads + head] = (highest * factor + log2f(sum)) * kLn2;
  }
};

}  // namespace revit_attention_cuda
