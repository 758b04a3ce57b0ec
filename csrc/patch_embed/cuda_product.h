// The product of the patches of a block with the weight, which passes through shared memory in chunks that are copied
// while earlier ones are used: tensor cores for 16-bit numbers, plain multiplications for fp32.
#pragma once

#include "cuda_pixels.h"

namespace revit_patch_embed_cuda {

constexpr int kColumns = 128;  // of the product at a time: rows of the weight
constexpr int kStages = 3;     // chunks on their way or in use

// kLarge: as many tokens as leave room for patches of kMostNumbers, and fewer for larger patches.
template <class T, bool kLarge>
struct Shape {
  static constexpr int kTokens = (kLarge ? 128 : 32) / sizeof(T);
  static constexpr int kRows = kTokens / kWarps;            // of a warp, while patches are made
  static constexpr int kChunk = 128 / sizeof(T);            // numbers of a patch at a time
  static constexpr int kPad = 16 / sizeof(T);               // rows in shared memory then start in different banks
  static constexpr int kRow = kChunk + kPad;                // of a chunk of the weight
  static constexpr int kMostNumbers = kLarge ? 832 : 3392;  // of a patch
  static constexpr int kRing = kStages * kColumns * kRow * sizeof(T);
  static constexpr int kFixed = kRing + kTokens * sizeof(Row<T>);

  static constexpr int chunks(int width) { return (width + kChunk - 1) / kChunk; }
  static constexpr int shared(int width) { return kFixed + kTokens * (chunks(width) * kChunk + kPad) * sizeof(T); }
};
static_assert(kWarps * kMostPatchRows * kScratchOfRow <= Shape<float, true>::kRing, "resizing borrows the ring");
static_assert(Shape<float, true>::shared(Shape<float, true>::kMostNumbers) <= 163 * 1024, "what sm_80 has");
static_assert(Shape<float, false>::shared(Shape<float, false>::kMostNumbers) <= 163 * 1024, "what sm_80 has");
static_assert(Shape<uint16_t, true>::shared(Shape<uint16_t, true>::kMostNumbers) <= 163 * 1024, "what sm_80 has");
static_assert(Shape<uint16_t, false>::shared(Shape<uint16_t, false>::kMostNumbers) <= 163 * 1024, "what sm_80 has");

// The sums of a thread, for T of 16 bits: rows (kTokens, kChunk) times chunk (kColumns, kChunk) transposed.
template <class T, bool kLarge>
class Product {
  using Own = Shape<T, kLarge>;
  static constexpr int kGroups = kLarge ? 2 : 1;                        // of 16 tokens, to a warp
  static constexpr int kAcross = kWarps * kGroups * 16 / Own::kTokens;  // warps side by side
  static constexpr int kTiles = kColumns / kAcross / 8;                 // of 8 columns, to a warp
  static_assert(kTiles % 2 == 0, "the right operands of two tiles are loaded at a time");
  float sums_[kGroups][kTiles][4];

  __device__ __forceinline__ int row() const { return threadIdx.x / 32 / kAcross * kGroups * 16; }
  __device__ __forceinline__ int column() const { return threadIdx.x / 32 % kAcross * kTiles * 8; }

 public:
  static constexpr int kPair = 2;  // neighbouring columns that `finish` gives at a time

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (auto& group : sums_)
#pragma unroll
      for (auto& tile : group)
#pragma unroll
        for (float& sum : tile) sum = 0;
  }

  __device__ __forceinline__ void add(const T* rows, int pitch, const T* chunk) {
    const int lane = threadIdx.x % 32, matrix = lane / 8;
    const revit::SharedAddress left =
        revit::shared_address(rows + (row() + matrix % 2 * 8 + lane % 8) * pitch + matrix / 2 * 8);
    const revit::SharedAddress right =
        revit::shared_address(chunk + (column() + matrix / 2 * 8 + lane % 8) * Own::kRow + matrix % 2 * 8);
#pragma unroll
    for (int k = 0; k < Own::kChunk; k += 16) {
      uint32_t a[kGroups][4];
#pragma unroll
      for (int i = 0; i < kGroups; ++i) revit::load_matrices(a[i], left + (i * 16 * pitch + k) * sizeof(T));
#pragma unroll
      for (int j = 0; j < kTiles; j += 2) {
        uint32_t b[4];
        revit::load_matrices(b, right + (j * 8 * Own::kRow + k) * sizeof(T));
#pragma unroll
        for (int i = 0; i < kGroups; ++i) {
          revit::multiply_add(sums_[i][j], a[i], b[0], b[1], T());
          revit::multiply_add(sums_[i][j + 1], a[i], b[2], b[3], T());
        }
      }
    }
  }

  template <class F>
  __device__ __forceinline__ void finish(F f) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < kGroups; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int j = 0; j < kTiles; ++j)
          f(row() + i * 16 + half * 8 + lane / 4, column() + j * 8 + lane % 4 * 2, &sums_[i][j][2 * half]);
  }
};

template <bool kLarge>
class Product<float, kLarge> {
  using Own = Shape<float, kLarge>;
  static constexpr int kSteps = kColumns / 32;
  float sums_[Own::kRows][kSteps];

 public:
  static constexpr int kPair = 1;

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (auto& row : sums_)
#pragma unroll
      for (float& sum : row) sum = 0;
  }

  __device__ __forceinline__ void add(const float* rows, int pitch, const float* chunk) {
    const float* left = rows + threadIdx.x / 32 * Own::kRows * pitch;
    const float* right = chunk + threadIdx.x % 32 * Own::kRow;
    float part[Own::kRows][kSteps] = {};  // sums of sums lose less than one long sum
#pragma unroll 2
    for (int k = 0; k < Own::kChunk; k += 4) {
      float4 b[kSteps];
#pragma unroll
      for (int j = 0; j < kSteps; ++j) b[j] = *reinterpret_cast<const float4*>(right + j * 32 * Own::kRow + k);
#pragma unroll
      for (int i = 0; i < Own::kRows; ++i) {
        const float4 a = *reinterpret_cast<const float4*>(left + i * pitch + k);
#pragma unroll
        for (int j = 0; j < kSteps; ++j) {
          part[i][j] += a.x * b[j].x;
          part[i][j] += a.y * b[j].y;
          part[i][j] += a.z * b[j].z;
          part[i][j] += a.w * b[j].w;
        }
      }
    }
#pragma unroll
    for (int i = 0; i < Own::kRows; ++i)
#pragma unroll
      for (int j = 0; j < kSteps; ++j) sums_[i][j] += part[i][j];
  }

  template <class F>
  __device__ __forceinline__ void finish(F f) const {
#pragma unroll
    for (int i = 0; i < Own::kRows; ++i)
#pragma unroll
      for (int j = 0; j < kSteps; ++j)
        f(static_cast<int>(threadIdx.x / 32 * Own::kRows) + i, static_cast<int>(threadIdx.x % 32) + 32 * j,
          &sums_[i][j]);
  }
};

}  // namespace revit_patch_embed_cuda
