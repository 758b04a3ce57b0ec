// Images on the host, and where their tokens go.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <utility>
#include <vector>

#include "cpu/checks.h"
#include "pos_embed/interpolation.h"

namespace revit {
namespace {

constexpr int64_t kRows = 16;  // rows of a resized image that are made at a time, and columns: a multiple of all kLanes

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

// What a patch's numbers are: bf16, or fp32, or fp32 that a bf16 would hold.
enum class Number { kFloat, kBfloat16, kRounded };

// Some pixel rows of a resized image, kRows at most, and where they go.
struct Cut {
  const Image& image;
  ScalarType type;            // of the pixels
  const Taps *down, *across;  // null: the image fits as it is
  int64_t row, rows;
  int64_t patches, ph, pw, stride;  // patches side by side; numbers from one patch of y to the next
  const float *scale, *shift;       // of each channel
  Number number;
  char* y;                          // where the patch of pixel (0, 0) lies
  float *source, *middle, *result;  // working memory

  static int64_t whole(int64_t pixels) { return (pixels + kRows - 1) / kRows * kRows; }
  int64_t length() const { return whole(image.width * image.pitch); }
  int64_t line() const { return whole(patches * pw); }
  int64_t lowest() const { return down ? down->first[row] : row; }
  int64_t source_rows() const {
    return down ? down->first[row + rows - 1] + down->count[row + rows - 1] - lowest() : 1;
  }
};

inline std::vector<Image> make_images(const std::vector<Tensor>& tensors, bool channels_last, int64_t channels) {
  std::vector<Image> images;
  for (const Tensor& t : tensors) {
    REVIT_CHECK(t.dim() == 3 || t.dim() == 4, "an image must have 3 axes, or 4 as a batch, got ", t.dim());
    REVIT_CHECK(t.scalar_type() == ScalarType::Byte || is_number(t.scalar_type()),
                "images must be of uint8, float32 or bfloat16");
    REVIT_CHECK(t.scalar_type() == tensors[0].scalar_type(), "images must all be of one dtype");
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
    REVIT_CHECK(image.channels == channels, "images must have the ", channels, " channels of the weight, got ",
                image.channels);
    REVIT_CHECK(image.height <= kMostCells && image.width <= kMostCells, "an image must be at most ", kMostCells,
                " pixels high and wide");
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
  const Boundaries boundaries("cu_seqlens", cu_seqlens, capacity);
  REVIT_CHECK(prefix >= 0 && prefix <= kMostCells, "prefix must be at least 0, got ", prefix);
  check("placement", placement, {boundaries.images, 3}, ScalarType::Int);
  const int32_t* place = static_cast<const int32_t*>(placement.data_ptr());
  REVIT_CHECK(boundaries.at[0] == 0, "cu_seqlens must begin with 0");
  std::vector<Entry> entries(boundaries.images, {0, 0, 0, 0});
  for (int64_t i = 0; i < boundaries.images; ++i) {
    const int64_t h = place[i * 3], w = place[i * 3 + 1], cell = place[i * 3 + 2], length = boundaries.length(i);
    if (length == 0) continue;
    REVIT_CHECK(h > 0 && w > 0 && cell >= 0 && length == prefix + h * w, "image ", i, " has ", length, " tokens where ",
                prefix, " + ", h, " x ", w, " were expected, from cell ", cell, " on");
    entries[i] = {boundaries.at[i] + prefix, h, w, cell};
  }
  return entries;
}

// pos, prefix: as they go into y, or are beside a weight, of this dtype and width.
inline void check_tables(const std::vector<Entry>& entries, const std::optional<Tensor>& pos,
                         const std::optional<Tensor>& prefix, int64_t prefix_tokens, const Tensor& y, int64_t dim) {
  check("pos", pos, {kAny, dim}, y.scalar_type());
  check("prefix", prefix, {prefix_tokens, dim}, y.scalar_type());
  for (const Entry& entry : entries)
    REVIT_CHECK(!pos || entry.cell + entry.rows * entry.columns <= pos->size(0),
                "pos has too few rows: ", pos->size(0));
}

}  // namespace
}  // namespace revit
