// What a block has to know of its tokens, and the pixels of their patches: read once, resized where an image does not
// fit its grid, normalised, and rounded to the dtype of the weight.
#pragma once

#include "pos_embed/interpolation.h"
#include "cuda/launch.h"
#include "cuda/vectors.h"

namespace revit_patch_embed_cuda {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kMostChannels = 64, kMostPatchRows = 32;
constexpr int kLines = 8;  // rows of an image that a warp resizes at a time

// Strides in elements. The host writes six 64-bit numbers.
struct Image {
  int64_t data, height, width, channel, row, pixel;
};

enum class PixelType { kByte, kFloat, kLikeWeight };

struct Pixels {
  const Image* table;  // an entry per image; none where the images are one tensor
  Image first;         // then: the first of them
  int64_t apart;       // and the bytes from one to the next
  PixelType type;
  int bytes;  // of a pixel
  int channels, patch_h, patch_w;
  bool cubic;
  float scale[kMostChannels], shift[kMostChannels];  // what to multiply a pixel with, and what to add

  __device__ __forceinline__ Image image(int i) const {
    if (table) return table[i];
    Image image = first;
    image.data += i * apart;
    return image;
  }
};

// A row of the packed buffer.
template <class T>
struct alignas(16) Row {
  const T* extra;                // what is to be added to the product, or is all there is; may be null
  int64_t corner;                // the first pixel of a patch, where the image fits its grid; else anything readable
  int64_t channel, line, pixel;  // strides, 0 where it does not fit
  int image, patch;              // patch: below 0 for a row that is none
  int rows, columns;             // of the grid
  bool fits, whole;              // whole: pixels can be read four at a time
};

template <class T>
__device__ __forceinline__ void locate(Row<T>& row, const Pixels& p) {
  const Image image = p.image(row.image);
  row.fits = image.height == row.rows * p.patch_h && image.width == row.columns * p.patch_w;
  if (!row.fits) return;
  row.channel = image.channel, row.line = image.row, row.pixel = image.pixel;
  const int64_t y = row.patch / row.columns * p.patch_h, x = row.patch % row.columns * p.patch_w;
  row.corner = image.data + (y * image.row + x * image.pixel) * p.bytes;
  row.whole = image.pixel == 1 && p.patch_w % 4 == 0 && image.row % 4 == 0 && image.channel % 4 == 0 &&
              row.corner % (4 * p.bytes) == 0;
}

// kCount neighbouring pixels as they lie in memory: widened only when all that a thread wants are on their way.
template <class Pixel, int kCount>
struct Raw {
  static constexpr int kBytes = kCount * sizeof(Pixel);
  uint32_t words[(kBytes + 3) / 4];

  __device__ __forceinline__ void read(const Pixel* x) {
    if constexpr (kBytes == 1) words[0] = __ldg(reinterpret_cast<const uint8_t*>(x));
    if constexpr (kBytes == 2) words[0] = __ldg(reinterpret_cast<const uint16_t*>(x));
    if constexpr (kBytes == 4) words[0] = __ldg(reinterpret_cast<const uint32_t*>(x));
    if constexpr (kBytes == 8) {
      const uint2 two = __ldg(reinterpret_cast<const uint2*>(x));
      words[0] = two.x, words[1] = two.y;
    }
    if constexpr (kBytes == 16) {
      const uint4 four = __ldg(reinterpret_cast<const uint4*>(x));
      words[0] = four.x, words[1] = four.y, words[2] = four.z, words[3] = four.w;
    }
  }

  __device__ __forceinline__ float at(int i) const {
    if constexpr (sizeof(Pixel) == 1) return static_cast<float>(words[0] >> 8 * i & 0xff);
    if constexpr (sizeof(Pixel) == 4) return __uint_as_float(words[i]);
    if constexpr (sizeof(Pixel) == 2) {
      const float2 pair = revit::unpack(words[i / 2], Pixel());
      return i % 2 ? pair.y : pair.x;
    }
  }
};

// Patches of images that fit, of kRows rows to a warp, those in `copied`: kCount neighbouring pixels at a time.
template <int kCount, class Pixel, class T, int kRows>
__device__ __forceinline__ void copy_patches(T* patches, int pitch, const Row<T>* rows, unsigned copied,
                                             const Pixels& p) {
  const int lane = threadIdx.x % 32, area = p.patch_h * p.patch_w;
  rows += threadIdx.x / 32;
  patches += threadIdx.x / 32 * pitch;
  for (int k = lane * kCount; k < p.channels * area; k += 32 * kCount) {
    const int c = k / area, y = k % area / p.patch_w, x = k % p.patch_w;
    const float scale = p.scale[c], shift = p.shift[c];
    Raw<Pixel, kCount> raw[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const Row<T>& row = rows[i * kWarps];
      raw[i].read(reinterpret_cast<const Pixel*>(row.corner) + c * row.channel + y * row.line + x * row.pixel);
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (!(copied >> i & 1)) continue;
      T* to = patches + i * kWarps * pitch + k;
      float value[kCount];
#pragma unroll
      for (int j = 0; j < kCount; ++j) value[j] = raw[i].at(j) * scale + shift;
      if constexpr (kCount == 4)
        revit::store(revit::narrow<T, 4>(value), to, 0, 4, true);
      else
        revit::store_one(to, value[0]);
    }
  }
}

// What one pixel of the resized image is made of: filter((start + k) * inverse) of each pixel, divided by the sum.
struct Target {
  int first, count;
  float start, one_over_sum;
};

struct Filter {
  revit::Axis axis;
  float inverse;
  __device__ __forceinline__ float operator()(const Target& t, int k) const {
    return revit::filter((t.start + static_cast<float>(k)) * inverse, axis.cubic, true);
  }
  __device__ __forceinline__ Target target(int i) const {
    const revit::Window w = revit::window(axis, i);
    Target t = {w.first, w.count, static_cast<float>(w.first - w.centre), 0};
    for (int k = 0; k < t.count; ++k) t.one_over_sum += (*this)(t, k);
    t.one_over_sum = 1 / t.one_over_sum;
    return t;
  }
};

__device__ __forceinline__ Filter make_filter(int64_t source, int target, bool cubic) {
  const revit::Axis axis = {static_cast<int>(source), target, cubic, true, false, 0};
  return {axis, static_cast<float>(1 / axis.stretch())};
}

// What a warp needs to resize, for each row of a patch.
constexpr int kScratchOfRow = (32 + kLines) * sizeof(float) + sizeof(Target);

// One patch, by one warp. A lane has a column of one channel: kLines rows of the image are resized along it, then dealt
// out to the rows of the patch that they have a share in.
template <class Pixel, class T>
__device__ __forceinline__ void resize_patch(T* patch, const Row<T>& row, const Pixels& p, unsigned char* scratch) {
  float* sums = reinterpret_cast<float*>(scratch);  // [patch_h, 32]
  float* shares = sums + p.patch_h * 32;            // [patch_h, kLines]
  Target* targets = reinterpret_cast<Target*>(shares + p.patch_h * kLines);
  const int lane = threadIdx.x % 32, work = p.channels * p.patch_w;
  const Image image = p.image(row.image);
  const Filter down = make_filter(image.height, row.rows * p.patch_h, p.cubic);
  const Filter across = make_filter(image.width, row.columns * p.patch_w, p.cubic);
  __syncwarp();  // the last patch's sums and targets are done with
  for (int i = lane; i < p.patch_h; i += 32) targets[i] = down.target(row.patch / row.columns * p.patch_h + i);
  __syncwarp();
  const int top = targets[0].first, bottom = targets[p.patch_h - 1].first + targets[p.patch_h - 1].count;
  for (int job = lane; job - lane < work; job += 32) {
    const int c = job < work ? job / p.patch_w : 0, x = job % p.patch_w;
    Target target = across.target(row.patch % row.columns * p.patch_w + x);
    if (job >= work) target = {};
    const Pixel* column = reinterpret_cast<const Pixel*>(image.data) + c * image.channel + target.first * image.pixel;
    for (int i = 0; i < p.patch_h; ++i) sums[i * 32 + lane] = 0;
    int begin = 0, end = 0;  // the rows of the patch that are made of these lines, among others
    for (int y = top; y < bottom; y += kLines) {
      const int lines = min(kLines, bottom - y);
      while (targets[begin].first + targets[begin].count <= y) ++begin;
      while (end < p.patch_h && targets[end].first < y + lines) ++end;
      __syncwarp();
      for (int i = begin * kLines + lane; i < end * kLines; i += 32) {
        const Target& to = targets[i / kLines];
        const int k = y + i % kLines - to.first;
        shares[i] = k >= 0 && k < to.count ? down(to, k) * to.one_over_sum : 0;
      }
      __syncwarp();
      const Pixel* from[kLines];
#pragma unroll
      for (int line = 0; line < kLines; ++line) from[line] = column + min(y + line, bottom - 1) * image.row;
      float resized[kLines] = {};
      for (int k = 0; k < target.count; ++k) {
        const float share = across(target, k);
        Raw<Pixel, 1> pixel[kLines];
#pragma unroll
        for (int line = 0; line < kLines; ++line) pixel[line].read(from[line]), from[line] += image.pixel;
#pragma unroll
        for (int line = 0; line < kLines; ++line) resized[line] += share * pixel[line].at(0);
      }
#pragma unroll
      for (float& each : resized) each *= target.one_over_sum;
      for (int i = begin; i < end; ++i) {
        float sum = sums[i * 32 + lane];
#pragma unroll
        for (int line = 0; line < kLines; ++line) {
          const float share = shares[i * kLines + line];
          if (share != 0) sum += share * resized[line];  // a NaN is felt where it has a share
        }
        sums[i * 32 + lane] = sum;
      }
    }
    if (job >= work) continue;
    for (int i = 0; i < p.patch_h; ++i)
      revit::store_one(patch + (c * p.patch_h + i) * p.patch_w + x, sums[i * 32 + lane] * p.scale[c] + p.shift[c]);
  }
}

// The patches of kRows rows to a warp, `pitch` numbers apart: zeros in other rows and behind each patch.
template <class Pixel, class T, int kRows>
__device__ __forceinline__ void make_patches(T* patches, int pitch, const Row<T>* rows, const Pixels& p,
                                             unsigned char* scratch) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, width = p.channels * p.patch_h * p.patch_w;
  scratch += warp * p.patch_h * kScratchOfRow;
  bool whole = true;
  unsigned copied = 0;
  for (int i = 0; i < kRows; ++i) {
    const Row<T>& row = rows[warp + i * kWarps];
    T* patch = patches + (warp + i * kWarps) * pitch;
    for (int k = (row.patch < 0 ? 0 : width) + lane; k < pitch; k += 32) revit::store_one(patch + k, 0);
    if (row.patch < 0) continue;
    if (row.fits)
      copied |= 1u << i, whole = whole && row.whole;
    else
      resize_patch<Pixel>(patch, row, p, scratch);
  }
  if (copied && whole) copy_patches<4, Pixel, T, kRows>(patches, pitch, rows, copied, p);
  if (copied && !whole) copy_patches<1, Pixel, T, kRows>(patches, pitch, rows, copied, p);
}

}  // namespace revit_patch_embed_cuda
