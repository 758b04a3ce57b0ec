#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <map>
#include <optional>
#include <utility>
#include <vector>

#include "common/bfloat16.h"
#include "common/interpolation.h"
#include "gemm/gemm.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

constexpr int64_t kRows = 16;  // rows of a resized image that are made at a time: the lanes of one vector
constexpr int64_t kFewestPatches = 24, kMostPatches = 96;  // that are cut, and then multiplied, at a time
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

REVIT_CLONES void round_to_bfloat16(float* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = static_cast<uint32_t>(revit::to_bfloat16(x[i])) << 16;
    std::memcpy(x + i, &bits, 4);
  }
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

// pos, prefix: as they go into y, or are beside a weight, of this dtype and width.
void check_tables(const std::vector<Entry>& entries, const std::optional<Tensor>& pos,
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

// f(i) for i in [0, count), each thread taking the next that is left. own: a thread's memory
template <class Own, class F>
void each(int64_t count, F f) {
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, std::min<int64_t>(count, torch::stable::get_num_threads()), 1, [&](int64_t, int64_t) {
    Own own;
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) f(i, own);
  });
}

}  // namespace

// images: (channels, height, width) each, or one batch of them -> (capacity, channels * patch_h * patch_w) in the dtype
// of weight: the pixels of each token, resized and normalised (scale * pixel + shift); zeros for other rows.
Tensor patchify_cpu(std::vector<Tensor> tensors, const Tensor& weight, const Tensor& cu_seqlens,
                    const Tensor& placement, std::vector<double> scale, std::vector<double> shift, bool cubic,
                    bool channels_last, int64_t prefix, int64_t capacity) {
  const Patches patches(tensors, weight, make_entries(cu_seqlens, placement, prefix, capacity), scale, shift, cubic,
                        channels_last);
  const bool bf16 = weight.scalar_type() == ScalarType::BFloat16;
  const int64_t row_bytes = patches.width * (bf16 ? 2 : 4);
  Tensor y = torch::stable::new_empty(weight, {capacity, patches.width});
  char* out = static_cast<char*>(y.data_ptr());
  const auto& entries = patches.entries;
  std::vector<std::pair<size_t, int64_t>> work;  // kRows rows of one resized image
  for (size_t i = 0; i < entries.size(); ++i)
    for (int64_t row = 0; row < patches.height(i); row += kRows) work.push_back({i, row});

  torch::stable::parallel_for(0, entries.size() + 1, 1, [&](int64_t begin, int64_t end) {
    const int32_t* cu = static_cast<const int32_t*>(cu_seqlens.data_ptr());
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = cu[i], last = i == static_cast<int64_t>(entries.size()) ? capacity : entries[i].first;
      if (last > first) std::memset(out + first * row_bytes, 0, (last - first) * row_bytes);
    }
  });
  each<Patches::Buffers>(work.size(), [&](int64_t task, Patches::Buffers& buffers) {
    const auto [i, row] = work[task];
    patches.cut(i, row, std::min(kRows, patches.height(i) - row), out + entries[i].first * row_bytes,
                bf16 ? Number::kBfloat16 : Number::kFloat, buffers);
  });
  return y;
}

// All in one sweep: a few patches at a time are cut, multiplied with the weight, added to their positions and placed.
// packed: the weight and its bias, by pack_cpu; pos: (cells, dim), prefix: (prefix_tokens, dim)
// Returns (capacity, dim).
Tensor patch_embed_cpu(std::vector<Tensor> tensors, const Tensor& weight, const Tensor& packed,
                       const Tensor& cu_seqlens, const Tensor& placement, std::optional<Tensor> pos,
                       std::optional<Tensor> prefix, std::vector<double> scale, std::vector<double> shift, bool cubic,
                       bool channels_last, int64_t prefix_tokens, int64_t capacity) {
  const Patches patches(tensors, weight, make_entries(cu_seqlens, placement, prefix_tokens, capacity), scale, shift,
                        cubic, channels_last);
  const bool bf16 = weight.scalar_type() == ScalarType::BFloat16;
  const int64_t kind = bf16 ? 1 : 0, dim = weight.size(0), row_bytes = dim * (bf16 ? 2 : 4);
  const auto& entries = patches.entries;
  check_tables(entries, pos, prefix, weight, dim);
  const Linear product = revit_gemm::linear(static_cast<char*>(packed.data_ptr()), kind, patches.width, dim);
  const int64_t unit = revit_gemm::layout(kind).unit;
  const Number number = !bf16 ? Number::kFloat : unit == 2 ? Number::kBfloat16 : Number::kRounded;
  Tensor y = torch::stable::new_empty(weight, {capacity, dim});
  char* out = static_cast<char*>(y.data_ptr());

  // Some rows of patches of an image: many enough to be worth reading the weight, few enough to stay in cache.
  struct Part {
    size_t image;
    Span rows;
  };
  std::vector<Part> parts;
  int64_t total = 0;
  for (const Entry& entry : entries) total += entry.rows * entry.columns;
  const int64_t fair = total / (2 * torch::stable::get_num_threads());
  const int64_t most = std::clamp(fair, kFewestPatches, kMostPatches);
  for (size_t i = 0; i < entries.size(); ++i) {
    const Entry& entry = entries[i];
    const int64_t wanted = (entry.rows * entry.columns + most - 1) / most, count = std::min(wanted, entry.rows);
    for (int64_t k = 0; k < count; ++k) parts.push_back({i, Span{0, entry.rows}.part(k, count)});
  }

  struct Own {
    Patches::Buffers buffers;
    std::vector<char> patches;
  };
  each<Own>(parts.size(), [&](int64_t task, Own& own) {
    const auto& [i, rows] = parts[task];
    const Entry& entry = entries[i];
    const int64_t count = rows.size() * entry.columns, skipped = rows.begin * entry.columns;
    own.patches.resize(count * patches.width * unit);
    // Where patch 0 of the image would lie.
    char* cells = own.patches.data() - skipped * patches.width * unit;
    for (int64_t row = rows.begin * patches.ph; row < rows.end * patches.ph; row += kRows)
      patches.cut(i, row, std::min(kRows, rows.end * patches.ph - row), cells, number, own.buffers);
    if (number == Number::kRounded)
      round_to_bfloat16(reinterpret_cast<float*>(own.patches.data()), count * patches.width);
    const char* added = pos ? static_cast<const char*>(pos->data_ptr()) + (entry.cell + skipped) * row_bytes : nullptr;
    revit_gemm::multiply(product, kind, bf16, own.patches.data(), count, {0, dim}, added,
                         out + (entry.first + skipped) * row_bytes);
    if (rows.begin == 0 && prefix_tokens) {
      char* to = out + (entry.first - prefix_tokens) * row_bytes;
      if (prefix)
        std::memcpy(to, prefix->data_ptr(), prefix_tokens * row_bytes);
      else
        std::memset(to, 0, prefix_tokens * row_bytes);
    }
  });
  const int64_t used = static_cast<const int32_t*>(cu_seqlens.data_ptr())[entries.size()];
  std::memset(out + used * row_bytes, 0, (capacity - used) * row_bytes);
  return y;
}

// y: (capacity, dim), changed in place: adds the position of each patch, writes the prefix rows, clears the others.
void place_cpu(Tensor y, const Tensor& cu_seqlens, const Tensor& placement, std::optional<Tensor> pos,
               std::optional<Tensor> prefix, int64_t prefix_tokens) {
  const int64_t capacity = y.size(0), dim = y.size(1), images = placement.size(0), row_bytes = dim * y.element_size();
  const bool bf16 = y.scalar_type() == ScalarType::BFloat16;
  const auto entries = make_entries(cu_seqlens, placement, prefix_tokens, capacity);
  const int32_t* cu = static_cast<const int32_t*>(cu_seqlens.data_ptr());
  check_tables(entries, pos, prefix, y, dim);
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
      "patch_embed_cpu(Tensor[] images, Tensor weight, Tensor packed, Tensor cu_seqlens, Tensor placement, Tensor? pos, "
      "Tensor? prefix, float[] scale, float[] shift, bool cubic, bool channels_last, int prefix_tokens, int capacity) "
      "-> Tensor");
  m.def(
      "place_cpu(Tensor(a!) y, Tensor cu_seqlens, Tensor placement, Tensor? pos, Tensor? prefix, int prefix_tokens) "
      "-> ()");
  m.def("patch_embed_sums_cpu(Tensor grad, Tensor cu_seqlens, Tensor placement, int prefix, int cells) -> Tensor");
  m.def("patch_embed_weight_cpu(Tensor grad, Tensor patches, Tensor cu_seqlens) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(revit_kernels, CPU, m) {
  m.impl("patchify_cpu", TORCH_BOX(&patchify_cpu));
  m.impl("patch_embed_cpu", TORCH_BOX(&patch_embed_cpu));
  m.impl("place_cpu", TORCH_BOX(&place_cpu));
  m.impl("patch_embed_sums_cpu", TORCH_BOX(&patch_embed_sums_cpu));
  m.impl("patch_embed_weight_cpu", TORCH_BOX(&patch_embed_weight_cpu));
}
