#include <torch/csrc/stable/library.h>
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

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

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

REVIT_CLONES void widen_bytes(float* y, const uint8_t* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] = x[i];
}

REVIT_CLONES void take_every(float* y, const float* x, int64_t step, int64_t n) {
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
REVIT_CLONES void resize_down(float* y, const float* x, int64_t length, const revit::Taps& down, int64_t row,
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
REVIT_CLONES void resize_across(float* y, const float* x, int64_t length, int64_t pitch, const revit::Taps& across,
                                int64_t columns) {
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
REVIT_CLONES void cut_row(void* y, bool bf16, const float* x, float scale, float shift, int64_t columns, int64_t width,
                          int64_t stride) {
  if (bf16)
    cut_any(static_cast<uint16_t*>(y), x, scale, shift, columns, width, stride);
  else
    cut_any(static_cast<float*>(y), x, scale, shift, columns, width, stride);
}

// y += x, both of n values
REVIT_CLONES void add_row(float* y, const float* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] += x[i];
}

// One row of one plane, as floats. n: pixels * pitch
void load_row(float* y, const Image& image, ScalarType type, int64_t plane, int64_t row) {
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

std::vector<Image> make_images(const std::vector<Tensor>& tensors, bool channels_last) {
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
std::vector<Entry> make_entries(const Tensor& cu_seqlens, const Tensor& placement, int64_t prefix, int64_t capacity) {
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

}  // namespace

// images: (channels, height, width) each, or one batch of them -> (capacity, channels * patch_h * patch_w) in the dtype
// of weight: the pixels of each token, resized and normalised (scale * pixel + shift); zeros for other rows.
Tensor patchify_cpu(std::vector<Tensor> tensors, const Tensor& weight, const Tensor& cu_seqlens,
                    const Tensor& placement, std::vector<double> scale, std::vector<double> shift, bool cubic,
                    bool channels_last, int64_t prefix, int64_t capacity) {
  const int64_t ph = weight.size(2), pw = weight.size(3), channels = weight.size(1), width = channels * ph * pw;
  const bool bf16 = weight.scalar_type() == ScalarType::BFloat16;
  const int64_t item = bf16 ? 2 : 4;
  Tensor y = torch::stable::new_empty(weight, {capacity, width});
  char* out = static_cast<char*>(y.data_ptr());
  const auto images = make_images(tensors, channels_last);
  const auto entries = make_entries(cu_seqlens, placement, prefix, capacity);
  STD_TORCH_CHECK(images.size() == entries.size(), "images must be as many as placement has rows");
  const ScalarType type = tensors.empty() ? ScalarType::Float : tensors[0].scalar_type();

  // Every distinct resize of an axis, and the work: kRows rows of one resized image.
  std::map<std::pair<int64_t, int64_t>, size_t> axes;
  std::vector<std::pair<size_t, int64_t>> work;
  for (size_t i = 0; i < entries.size(); ++i) {
    const int64_t height = entries[i].rows * ph, columns = entries[i].columns * pw;
    if (height != images[i].height || columns != images[i].width) {
      if (height) axes.insert({{images[i].height, height}, 0}), axes.insert({{images[i].width, columns}, 0});
    }
    for (int64_t row = 0; row < height; row += kRows) work.push_back({i, row});
  }
  std::vector<std::pair<int64_t, int64_t>> pairs;
  for (auto& [pair, index] : axes) index = pairs.size(), pairs.push_back(pair);
  std::vector<revit::Taps> taps(pairs.size());
  torch::stable::parallel_for(0, pairs.size(), 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      taps[i] = revit::taps(
          {static_cast<int32_t>(pairs[i].first), static_cast<int32_t>(pairs[i].second), cubic, true, false, 0});
  });

  torch::stable::parallel_for(0, entries.size() + 1, 1, [&](int64_t begin, int64_t end) {
    const int32_t* cu = static_cast<const int32_t*>(cu_seqlens.data_ptr());
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = cu[i], last = i == static_cast<int64_t>(entries.size()) ? capacity : entries[i].first;
      if (last > first) std::memset(out + first * width * item, 0, (last - first) * width * item);
    }
  });

  torch::stable::parallel_for(0, work.size(), 1, [&](int64_t begin, int64_t end) {
    std::vector<float> source, middle, result;
    for (int64_t task = begin; task < end; ++task) {
      const auto [i, row] = work[task];
      const Image& image = images[i];
      const Entry& entry = entries[i];
      const int64_t height = entry.rows * ph, columns = entry.columns * pw, rows = std::min(kRows, height - row);
      const bool fits = height == image.height && columns == image.width;
      const auto put = [&](const float* pixels, int64_t y_pixel, int64_t channel) {
        const int64_t token = entry.first + y_pixel / ph * entry.columns;
        const int64_t at = token * width + (channel * ph + y_pixel % ph) * pw;
        cut_row(out + at * item, bf16, pixels, static_cast<float>(scale[channel]), static_cast<float>(shift[channel]),
                entry.columns, pw, width);
      };
      const int64_t pitch = image.pitch, length = (image.width * pitch + 15) / 16 * 16;
      for (int64_t plane = 0; plane < image.planes; ++plane) {
        if (fits) {
          source.resize(length), result.resize(columns);
          for (int64_t r = 0; r < rows; ++r) {
            load_row(source.data(), image, type, plane, row + r);
            for (int64_t c = 0; c < pitch; ++c) {
              if (pitch > 1) take_every(result.data(), source.data() + c, pitch, columns);
              put(pitch > 1 ? result.data() : source.data(), row + r, plane + c);
            }
          }
          continue;
        }
        const revit::Taps& down = taps[axes.at({image.height, height})];
        const revit::Taps& across = taps[axes.at({image.width, columns})];
        const int64_t lowest = down.first[row], line = (columns + 15) / 16 * 16;
        const int64_t highest = down.first[row + rows - 1] + down.count[row + rows - 1];
        source.resize((highest - lowest) * length), middle.resize(length * kRows), result.resize(line * kRows);
        for (int64_t r = lowest; r < highest; ++r) load_row(&source[(r - lowest) * length], image, type, plane, r);
        resize_down(middle.data(), source.data(), length, down, row, rows, lowest);
        for (int64_t c = 0; c < pitch; ++c) {
          resize_across(result.data(), middle.data() + c * kRows, line, pitch, across, columns);
          for (int64_t r = 0; r < rows; ++r) put(&result[r * line], row + r, plane + c);
        }
      }
    }
  });
  return y;
}

// y: (capacity, dim), changed in place: adds the position of each patch, writes the prefix rows, clears the others.
void place_cpu(Tensor y, const Tensor& cu_seqlens, const Tensor& placement, std::optional<Tensor> pos,
               std::optional<Tensor> prefix, int64_t prefix_tokens) {
  const int64_t capacity = y.size(0), dim = y.size(1), images = placement.size(0), row_bytes = dim * y.element_size();
  const bool bf16 = y.scalar_type() == ScalarType::BFloat16;
  const auto entries = make_entries(cu_seqlens, placement, prefix_tokens, capacity);
  const int32_t* cu = static_cast<const int32_t*>(cu_seqlens.data_ptr());
  const int64_t cells = pos ? pos->size(0) : 0;
  for (const auto& rows : {pos, prefix})
    STD_TORCH_CHECK(!rows || (rows->scalar_type() == y.scalar_type() && rows->size(1) == dim),
                    "pos and prefix must be of the dtype and width of y");
  for (const Entry& entry : entries)
    STD_TORCH_CHECK(!pos || entry.cell + entry.rows * entry.columns <= cells, "pos has too few rows: ", cells);
  torch::stable::parallel_for(0, capacity, 32, [&](int64_t begin, int64_t end) {
    std::vector<float> a(dim), b(dim);
    int64_t i = std::upper_bound(cu, cu + images + 1, begin) - cu - 1;  // the image that has row `begin`
    for (int64_t row = begin; row < end; ++row) {
      while (i < images && row >= cu[i + 1]) ++i;
      char* to = static_cast<char*>(y.data_ptr()) + row * row_bytes;
      const int64_t k = i < images ? row - entries[i].first : -1;  // the patch; below 0 for a prefix token
      if (i == images || (k < 0 && !prefix)) {
        std::memset(to, 0, row_bytes);
      } else if (k < 0) {
        std::memcpy(to, static_cast<const char*>(prefix->data_ptr()) + (k + prefix_tokens) * row_bytes, row_bytes);
      } else if (pos) {
        const char* from = static_cast<const char*>(pos->data_ptr()) + (entries[i].cell + k) * row_bytes;
        if (bf16) {
          revit::widen(a.data(), reinterpret_cast<const uint16_t*>(to), dim);
          revit::widen(b.data(), reinterpret_cast<const uint16_t*>(from), dim);
          add_row(a.data(), b.data(), dim);
          revit::narrow(reinterpret_cast<uint16_t*>(to), a.data(), dim);
        } else {
          add_row(reinterpret_cast<float*>(to), reinterpret_cast<const float*>(from), dim);
        }
      }
    }
  });
}

// grad: (capacity, dim) -> (prefix + cells, dim) fp32: its sums over the images, for each prefix token and each cell.
Tensor patch_embed_sums_cpu(const Tensor& grad, const Tensor& cu_seqlens, const Tensor& placement, int64_t prefix,
                            int64_t cells) {
  const int64_t dim = grad.size(1);
  const bool bf16 = grad.scalar_type() == ScalarType::BFloat16;
  const auto entries = make_entries(cu_seqlens, placement, prefix, grad.size(0));
  Tensor sums = torch::stable::new_empty(grad, {prefix + cells, dim}, ScalarType::Float);
  torch::stable::parallel_for(0, prefix + cells, 4, [&](int64_t begin, int64_t end) {
    std::vector<float> wide(dim);
    float* to = static_cast<float*>(sums.data_ptr());
    std::fill(to + begin * dim, to + end * dim, 0.0f);
    const auto add = [&](int64_t slot, int64_t row) {
      if (bf16) revit::widen(wide.data(), static_cast<const uint16_t*>(grad.data_ptr()) + row * dim, dim);
      add_row(to + slot * dim, bf16 ? wide.data() : static_cast<const float*>(grad.data_ptr()) + row * dim, dim);
    };
    for (const Entry& entry : entries) {
      if (entry.rows == 0) continue;
      for (int64_t slot = begin; slot < std::min(end, prefix); ++slot) add(slot, entry.first - prefix + slot);
      const int64_t low = std::max(begin, prefix + entry.cell);
      const int64_t high = std::min(end, prefix + entry.cell + entry.rows * entry.columns);
      for (int64_t slot = low; slot < high; ++slot) add(slot, entry.first + slot - prefix - entry.cell);
    }
  });
  return sums;
}

// grad: (capacity, dim), patches: (capacity, width) -> (dim, width), from the rows that are tokens.
Tensor patch_embed_weight_cpu(Tensor grad, Tensor patches, const Tensor& cu_seqlens) {
  const int64_t tokens = static_cast<const int32_t*>(cu_seqlens.data_ptr())[cu_seqlens.size(0) - 1];
  Tensor rows = torch::stable::narrow(grad, 0, 0, tokens);
  return torch::stable::matmul(torch::stable::transpose(rows, 0, 1), torch::stable::narrow(patches, 0, 0, tokens));
}

STABLE_TORCH_LIBRARY_FRAGMENT(revit_kernels, m) {
  m.def(
      "patchify_cpu(Tensor[] images, Tensor weight, Tensor cu_seqlens, Tensor placement, float[] scale, "
      "float[] shift, bool cubic, bool channels_last, int prefix, int capacity) -> Tensor");
  m.def(
      "place_cpu(Tensor(a!) y, Tensor cu_seqlens, Tensor placement, Tensor? pos, Tensor? prefix, int prefix_tokens) "
      "-> ()");
  m.def("patch_embed_sums_cpu(Tensor grad, Tensor cu_seqlens, Tensor placement, int prefix, int cells) -> Tensor");
  m.def("patch_embed_weight_cpu(Tensor grad, Tensor patches, Tensor cu_seqlens) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(revit_kernels, CPU, m) {
  m.impl("patchify_cpu", TORCH_BOX(&patchify_cpu));
  m.impl("place_cpu", TORCH_BOX(&place_cpu));
  m.impl("patch_embed_sums_cpu", TORCH_BOX(&patch_embed_sums_cpu));
  m.impl("patch_embed_weight_cpu", TORCH_BOX(&patch_embed_weight_cpu));
}
