// Images to patches: read, resized, normalised and cut. For cpu.cpp.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <optional>
#include <utility>
#include <vector>

#include "common/bfloat16.h"
#include "common/interpolation.h"

namespace revit_patches {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kRows = 16;  // rows of a resized image that are made at a time: the lanes of one vector
typedef float Lanes __attribute__((vector_size(64)));

// Where the pixels of one image lie. Either each channel is a plane of its own, or a row of pixels holds all channels.
struct Image {
  const char* data;
  int64_t channels, height, width;
  int64_t channel_stride, row_stride, pixel_stride;  // in elements
  int64_t planes, pitch;                             // planes * pitch = channels; pitch: channels in a row
};

struct Entry {
  int64_t first, rows, columns, cell;  // first row of the packed buffer; grid; first row of the position table
};

REVIT_CLONES static void widen_bytes(float* y, const uint8_t* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = x[i];
}

REVIT_CLONES static void take_every(float* y, const float* x, int64_t step, int64_t n) {
  if (step == 3)
    for (int64_t i = 0; i < n; ++i) y[i] = x[i * 3];
  else
    for (int64_t i = 0; i < n; ++i) y[i] = x[i * step];
}

// Exchanges the off-diagonal blocks of s x s: repeated for s = 1, 2, 4, 8 this transposes 16 x 16.
template <int s>
__attribute__((always_inline)) inline void exchange(Lanes* r) {
#define REVIT_UPPER(j) ((j) & s ? 16 + (j) - s : (j))
#define REVIT_LOWER(j) ((j) & s ? 16 + (j) : (j) + s)
#define REVIT_ALL(f) \
  f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7), f(8), f(9), f(10), f(11), f(12), f(13), f(14), f(15)
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i)
    if (!(i & s)) {
      const Lanes a = r[i], b = r[i + s];
      r[i] = __builtin_shufflevector(a, b, REVIT_ALL(REVIT_UPPER));
      r[i + s] = __builtin_shufflevector(a, b, REVIT_ALL(REVIT_LOWER));
    }
}

__attribute__((always_inline)) inline void transpose(Lanes* r) {
  exchange<1>(r), exchange<2>(r), exchange<4>(r), exchange<8>(r);
}

// 16 rows of the resized image, along the columns: x: (source rows, pitch of `length` floats), rows from `lowest` on
// -> y: (length, 16), so that the rows of the result lie side by side and the other axis needs no gather.
REVIT_CLONES static void resize_down(float* y, const float* x, int64_t length, const revit::Taps& down, int64_t row,
                                     int64_t rows, int64_t lowest) {
  for (int64_t i = 0; i < length; i += 16) {
    Lanes sum[16] = {};
    for (int64_t r = 0; r < rows; ++r) {
      const float* from = x + (down.first[row + r] - lowest) * length + i;
      const float* weight = &down.weight[(row + r) * down.width];
      Lanes total = {};
      for (int64_t k = 0; k < down.count[row + r]; ++k)
        total += weight[k] * *reinterpret_cast<const revit::Vector*>(from + k * length);
      sum[r] = total;
    }
    transpose(sum);
    for (int64_t j = 0; j < 16; ++j) *reinterpret_cast<revit::Vector*>(y + (i + j) * 16) = sum[j];
  }
}

// The other axis: x: (pixels, pitch, 16) -> y: (16, length of a row)
REVIT_CLONES static void resize_across(float* y, const float* x, int64_t length, int64_t pitch,
                                       const revit::Taps& across, int64_t columns) {
  for (int64_t i = 0; i < columns; i += 16) {
    Lanes sum[16] = {};
    for (int64_t j = 0; j < std::min<int64_t>(16, columns - i); ++j) {
      const float* from = x + across.first[i + j] * pitch * 16;
      const float* weight = &across.weight[(i + j) * across.width];
      Lanes total = {};
      for (int64_t k = 0; k < across.count[i + j]; ++k)
        total += weight[k] * *reinterpret_cast<const revit::Vector*>(from + k * pitch * 16);
      sum[j] = total;
    }
    transpose(sum);
    for (int64_t r = 0; r < 16; ++r) *reinterpret_cast<revit::Vector*>(y + r * length + i) = sum[r];
  }
}

// What a patch's numbers are: bf16, or fp32, or fp32 that a bf16 would hold.
enum class Number { kFloat, kBfloat16, kRounded };

template <typename T, int64_t kWidth>
__attribute__((always_inline)) inline void cut(T* y, const float* x, float scale, float shift, int64_t columns,
                                               int64_t width, int64_t stride) {
  const int64_t n = kWidth ? kWidth : width;
  for (int64_t q = 0; q < columns; ++q) {
    T* to = y + q * stride;
    const float* from = x + q * n;
    for (int64_t i = 0; i < n; ++i) {
      const float value = from[i] * scale + shift;
      if constexpr (sizeof(T) == 4)
        to[i] = value;
      else
        to[i] = revit::to_bfloat16(value);
    }
  }
}

template <typename T>
__attribute__((always_inline)) inline void cut_any(T* y, const float* x, float scale, float shift, int64_t columns,
                                                   int64_t width, int64_t stride) {
  if (width == 16) return cut<T, 16>(y, x, scale, shift, columns, width, stride);
  if (width == 14) return cut<T, 14>(y, x, scale, shift, columns, width, stride);
  if (width == 32) return cut<T, 32>(y, x, scale, shift, columns, width, stride);
  return cut<T, 0>(y, x, scale, shift, columns, width, stride);
}

// One row of pixels of one channel, normalised and dealt out to the patches it crosses: `stride` apart in y.
REVIT_CLONES static void cut_row(void* y, bool bf16, const float* x, float scale, float shift, int64_t columns,
                                 int64_t width, int64_t stride) {
  if (bf16)
    cut_any(static_cast<uint16_t*>(y), x, scale, shift, columns, width, stride);
  else
    cut_any(static_cast<float*>(y), x, scale, shift, columns, width, stride);
}

// One row of one plane, as floats. n: pixels * pitch
inline void load_row(float* y, const Image& image, ScalarType type, int64_t plane, int64_t row) {
  const int64_t n = image.width * image.pitch;
  const int64_t step = image.pitch == 1 ? image.pixel_stride : 1;
  const int64_t at = plane * image.channel_stride + row * image.row_stride;
  const auto each = [&](auto* x, auto convert) {
    if (step == 1) return convert(y, x + at, n);
    for (int64_t i = 0; i < n; ++i) convert(y + i, x + at + i * step, 1);
  };
  if (type == ScalarType::Byte)
    each(reinterpret_cast<const uint8_t*>(image.data), widen_bytes);
  else if (type == ScalarType::BFloat16)
    each(reinterpret_cast<const uint16_t*>(image.data), revit::widen);
  else
    each(reinterpret_cast<const float*>(image.data),
         [](float* to, const float* from, int64_t count) { std::memcpy(to, from, count * sizeof(float)); });
}

inline std::vector<Image> make_images(const std::vector<Tensor>& tensors, bool channels_last) {
  std::vector<Image> images;
  for (const Tensor& t : tensors) {
    const int64_t batched = t.dim() == 4, c = batched + (channels_last ? 2 : 0), h = batched + (channels_last ? 0 : 1);
    Image image{static_cast<const char*>(t.data_ptr()),
                t.size(c),
                t.size(h),
                t.size(h + 1),
                t.stride(c),
                t.stride(h),
                t.stride(h + 1),
                t.size(c),
                1};
    if (image.channels > 1 && image.channel_stride == 1 && image.pixel_stride == image.channels)
      image.planes = 1, image.pitch = image.channels;
    for (int64_t i = 0; i < (batched ? t.size(0) : 1); ++i) {
      images.push_back(image);
      if (batched) image.data += t.stride(0) * t.element_size();
    }
  }
  return images;
}

// Where each image's tokens are to go; those with none are left out (rows 0).
inline std::vector<Entry> make_entries(const Tensor& cu_seqlens, const Tensor& placement, int64_t prefix,
                                       int64_t capacity) {
  STD_TORCH_CHECK(cu_seqlens.scalar_type() == ScalarType::Int && placement.scalar_type() == ScalarType::Int,
                  "cu_seqlens and placement must be int32");
  STD_TORCH_CHECK(cu_seqlens.size(0) == placement.size(0) + 1, "cu_seqlens must have one more entry than placement");
  const int32_t* cu = static_cast<const int32_t*>(cu_seqlens.data_ptr());
  const int32_t* place = static_cast<const int32_t*>(placement.data_ptr());
  STD_TORCH_CHECK(cu[0] == 0, "cu_seqlens must begin with 0");
  std::vector<Entry> entries(placement.size(0), {0, 0, 0, 0});
  for (size_t i = 0; i < entries.size(); ++i) {
    const int64_t h = place[i * 3], w = place[i * 3 + 1], length = cu[i + 1] - cu[i];
    if (length == 0) continue;
    STD_TORCH_CHECK(cu[i] >= 0 && cu[i + 1] <= capacity && length == prefix + h * w, "image ", i, " has ", length,
                    " tokens where ", prefix, " + ", h, " x ", w, " were expected");
    entries[i] = {cu[i] + prefix, h, w, place[i * 3 + 2]};
  }
  return entries;
}

// pos, prefix: as they go into y, or are beside a weight, of this dtype and width.
inline void check_tables(const std::vector<Entry>& entries, const std::optional<Tensor>& pos,
                  const std::optional<Tensor>& prefix, const Tensor& y, int64_t dim) {
  for (const auto& rows : {pos, prefix})
    STD_TORCH_CHECK(!rows || (rows->scalar_type() == y.scalar_type() && rows->size(1) == dim),
                    "pos and prefix must be of the dtype and width of y");
  for (const Entry& entry : entries)
    STD_TORCH_CHECK(!pos || entry.cell + entry.rows * entry.columns <= pos->size(0), "pos has too few rows: ",
                    pos->size(0));
}

// The images and where their patches are to lie: in the numbers of a patch, resized and normalised.
class Patches {
 public:
  Patches(const std::vector<Tensor>& tensors, const Tensor& weight, std::vector<Entry> places,
          const std::vector<double>& scale, const std::vector<double>& shift, bool cubic, bool channels_last)
      : entries(std::move(places)),
        ph(weight.size(2)),
        pw(weight.size(3)),
        width(weight.size(1) * ph * pw),
        images_(make_images(tensors, channels_last)),
        type_(tensors.empty() ? ScalarType::Float : tensors[0].scalar_type()),
        scale_(scale.begin(), scale.end()),
        shift_(shift.begin(), shift.end()) {
    STD_TORCH_CHECK(images_.size() == entries.size(), "images must be as many as placement has rows");
    for (size_t i = 0; i < entries.size(); ++i)
      if (entries[i].rows && !fits(i)) axes_.insert({axis(i, 0), 0}), axes_.insert({axis(i, 1), 0});
    std::vector<std::pair<int64_t, int64_t>> pairs;
    for (auto& [pair, index] : axes_) index = pairs.size(), pairs.push_back(pair);
    taps_.resize(pairs.size());
    torch::stable::parallel_for(0, pairs.size(), 4, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        taps_[i] = revit::taps(
            {static_cast<int32_t>(pairs[i].first), static_cast<int32_t>(pairs[i].second), cubic, true, false, 0});
    });
  }

  // Working memory of a thread.
  struct Buffers {
    std::vector<float> source, middle, result;
  };

  // `rows` pixel rows of one resized image, kRows at most, from `row` on, into y: where the patch of pixel (0, 0) lies.
  // Every patch has `width` numbers.
  void cut(size_t i, int64_t row, int64_t rows, char* y, Number number, Buffers& buffers) const {
    auto& [source, middle, result] = buffers;
    const Image& image = images_[i];
    const Entry& entry = entries[i];
    const int64_t columns = entry.columns * pw, pitch = image.pitch, item = number == Number::kBfloat16 ? 2 : 4;
    const auto put = [&](const float* pixels, int64_t y_pixel, int64_t channel) {
      const int64_t at = y_pixel / ph * entry.columns * width + (channel * ph + y_pixel % ph) * pw;
      cut_row(y + at * item, number == Number::kBfloat16, pixels, scale_[channel], shift_[channel], entry.columns, pw,
              width);
    };
    const int64_t length = (image.width * pitch + 15) / 16 * 16;
    for (int64_t plane = 0; plane < image.planes; ++plane) {
      if (fits(i)) {
        source.resize(length), result.resize(columns);
        for (int64_t r = 0; r < rows; ++r) {
          load_row(source.data(), image, type_, plane, row + r);
          for (int64_t c = 0; c < pitch; ++c) {
            if (pitch > 1) take_every(result.data(), source.data() + c, pitch, columns);
            put(pitch > 1 ? result.data() : source.data(), row + r, plane + c);
          }
        }
        continue;
      }
      const revit::Taps& down = taps_[axes_.at(axis(i, 0))];
      const revit::Taps& across = taps_[axes_.at(axis(i, 1))];
      const int64_t lowest = down.first[row], line = (columns + 15) / 16 * 16;
      const int64_t highest = down.first[row + rows - 1] + down.count[row + rows - 1];
      source.resize((highest - lowest) * length), middle.resize(length * kRows), result.resize(line * kRows);
      for (int64_t r = lowest; r < highest; ++r) load_row(&source[(r - lowest) * length], image, type_, plane, r);
      resize_down(middle.data(), source.data(), length, down, row, rows, lowest);
      for (int64_t c = 0; c < pitch; ++c) {
        resize_across(result.data(), middle.data() + c * kRows, line, pitch, across, columns);
        for (int64_t r = 0; r < rows; ++r) put(&result[r * line], row + r, plane + c);
      }
    }
  }

  int64_t height(size_t i) const { return entries[i].rows * ph; }

  const std::vector<Entry> entries;
  const int64_t ph, pw, width;

 private:
  bool fits(size_t i) const { return height(i) == images_[i].height && entries[i].columns * pw == images_[i].width; }
  std::pair<int64_t, int64_t> axis(size_t i, int which) const {
    if (which == 0) return {images_[i].height, height(i)};
    return {images_[i].width, entries[i].columns * pw};
  }

  const std::vector<Image> images_;
  const ScalarType type_;
  const std::vector<float> scale_, shift_;
  std::map<std::pair<int64_t, int64_t>, size_t> axes_;  // every distinct resize of an axis, and its taps
  std::vector<revit::Taps> taps_;
};

}  // namespace revit_patches
