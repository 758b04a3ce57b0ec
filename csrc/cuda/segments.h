// Which image a block of a launch is about, found on the device in cu_seqlens: the host knows only upper bounds.
#pragma once

#include <cstdint>

namespace revit {

// Rows `begin` to `end` of the packed buffer; empty where cu_seqlens is no good.
struct Rows {
  int begin, end;
  __host__ __device__ int count() const { return end - begin; }
};

// An image's rows, within the buffer whatever cu_seqlens says.
__host__ __device__ inline Rows rows_of(const int* cu_seqlens, int image, int tokens) {
  int begin = cu_seqlens[image], end = cu_seqlens[image + 1];
  begin = begin < 0 ? 0 : begin > tokens ? tokens : begin;
  end = end > tokens ? tokens : end;
  return {begin, end < begin ? begin : end};
}

// The first of the blocks that an image may use, when a block takes `tile` rows of one image: floor((begin + image *
// (tile - 1)) / tile). From one image to the next it grows by at least the blocks that the image needs, so no prefix
// sum is needed to give every image blocks of its own; over all images at most one each is to spare.
__host__ __device__ inline int first_tile(const int* cu_seqlens, int image, int tokens, int tile) {
  int begin = cu_seqlens[image];
  begin = begin < 0 ? 0 : begin > tokens ? tokens : begin;
  return static_cast<int>((begin + static_cast<int64_t>(image) * (tile - 1)) / tile);
}

// Blocks for `images` images of `tokens` rows in all.
__host__ __device__ inline int most_tiles(int images, int tokens, int tile) {
  return static_cast<int>((tokens + static_cast<int64_t>(images) * (tile - 1)) / tile);
}

// The last image whose blocks begin at or before `block`. A lane of the warp tries each of 32 places at a time.
__device__ inline int find_segment(const int* cu_seqlens, int images, int tokens, int tile, int block) {
  const int lane = threadIdx.x % 32;
  int low = 0, high = images;  // the answer is at least low, and below high
  while (high - low > 1) {
    const int step = (high - low + 31) / 32;
    const int tried = low + lane * step;
    const bool before = tried < high && first_tile(cu_seqlens, tried, tokens, tile) <= block;
    const unsigned votes = __ballot_sync(~0u, before);
    const int last = votes ? 31 - __clz(static_cast<int>(votes)) : 0;
    low = low + last * step;
    high = min(high, low + step);
  }
  return images ? low : 0;
}

}  // namespace revit
