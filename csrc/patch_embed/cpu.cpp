#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <utility>
#include <vector>

#include "cpu/threads.h"
#include "linear/linear.h"
#include "patch_embed/patches.h"

namespace revit {
namespace {

// weight: (dim, channels, patch_h, patch_w)
const Tensor& check_weight(const Tensor& weight) {
  check_sizes("weight", weight, {kAny, kAny, kAny, kAny});
  check_type("weight", weight);
  int64_t width = 1;
  REVIT_CHECK(weight.size(0) > 0, "weight must have at least one output");
  for (int64_t axis = 1; axis < 4; ++axis)
    REVIT_CHECK(weight.size(axis) > 0 && (width *= weight.size(axis)) <= kMostWidth,
                "weight must be (dim, channels, patch_h, patch_w), of 1 to ", kMostWidth, " numbers a patch");
  return weight;
}

constexpr int64_t kFewestPatches = 24, kMostPatches = 96;  // that are cut, and then multiplied, at a time

// images: (channels, height, width) each, or one batch of them -> (capacity, channels * patch_h * patch_w) in the dtype
// of weight: the pixels of each token, resized and normalised (scale * pixel + shift); zeros for other rows.
Tensor patchify_cpu(std::vector<Tensor> tensors, const Tensor& weight, const Tensor& cu_seqlens,
                    const Tensor& placement, std::vector<double> scale, std::vector<double> shift, bool cubic,
                    bool channels_last, int64_t prefix, int64_t capacity) {
  const Patches patches(tensors, check_weight(weight), make_entries(cu_seqlens, placement, prefix, capacity), scale,
                        shift, cubic, channels_last);
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
  each_of(work.size(), [&](int64_t task) {
    static thread_local Arena of_pixels;
    const auto [i, row] = work[task];
    patches.cut(i, row, std::min(kRows, patches.height(i) - row), out + entries[i].first * row_bytes, patches.width,
                bf16 ? Number::kBfloat16 : Number::kFloat, of_pixels);
  });
  return y;
}

// All in one sweep: a few patches at a time are cut, multiplied with the weight, added to their positions and placed.
// packed: the weight, zeros after each patch to a multiple of 4 numbers, and its bias, by pack_cpu
// pos: (cells, dim), prefix: (prefix_tokens, dim)
// Returns (capacity, dim).
Tensor patch_embed_cpu(std::vector<Tensor> tensors, const Tensor& weight, const Tensor& packed,
                       const Tensor& cu_seqlens, const Tensor& placement, std::optional<Tensor> pos,
                       std::optional<Tensor> prefix, std::vector<double> scale, std::vector<double> shift, bool cubic,
                       bool channels_last, int64_t prefix_tokens, int64_t capacity) {
  const Patches patches(tensors, check_weight(weight), make_entries(cu_seqlens, placement, prefix_tokens, capacity),
                        scale, shift, cubic, channels_last);
  const bool bf16 = weight.scalar_type() == ScalarType::BFloat16;
  const int64_t kind = bf16 ? 1 : 0, dim = weight.size(0), row_bytes = dim * (bf16 ? 2 : 4);
  const auto& entries = patches.entries;
  check_tables(entries, pos, prefix, prefix_tokens, weight, dim);
  const int64_t stride = (patches.width + 3) / 4 * 4;  // the product multiplies 4 numbers at a time
  const Linear product = revit::packed_weight(packed, kind, stride, dim);
  const int64_t unit = revit::layout(kind).unit;
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

  each_of(parts.size(), [&](int64_t task) {
    static thread_local Arena of_pixels, of_patches;
    const auto& [i, rows] = parts[task];
    const Entry& entry = entries[i];
    const int64_t count = rows.size() * entry.columns, skipped = rows.begin * entry.columns;
    char* cut = of_patches.only<char>(count * stride * unit);
    // Where patch 0 of the image would lie.
    char* cells = cut - skipped * stride * unit;
    for (int64_t row = rows.begin * patches.ph; row < rows.end * patches.ph; row += kRows)
      patches.cut(i, row, std::min(kRows, rows.end * patches.ph - row), cells, stride, number, of_pixels);
    for (int64_t p = 0; p < count && stride > patches.width; ++p)
      std::memset(cut + (p * stride + patches.width) * unit, 0, (stride - patches.width) * unit);
    const char* added = pos ? static_cast<const char*>(pos->data_ptr()) + (entry.cell + skipped) * row_bytes : nullptr;
    revit::multiply(product, kind, bf16, cut, count, {0, dim}, added, out + (entry.first + skipped) * row_bytes);
    if (rows.begin == 0 && prefix_tokens) {
      char* to = out + (entry.first - prefix_tokens) * row_bytes;
      if (prefix)
        std::memcpy(to, prefix->data_ptr(), prefix_tokens * row_bytes);
      else
        std::memset(to, 0, prefix_tokens * row_bytes);
    }
  });
  const int64_t used = static_cast<const int32_t*>(cu_seqlens.data_ptr())[entries.size()];
  if (used < capacity) std::memset(out + used * row_bytes, 0, (capacity - used) * row_bytes);
  return y;
}

// y: (capacity, dim), changed in place: adds the position of each patch, writes the prefix rows, clears the others.
void place_cpu(Tensor y, const Tensor& cu_seqlens, const Tensor& placement, std::optional<Tensor> pos,
               std::optional<Tensor> prefix, int64_t prefix_tokens) {
  check_rows("y", y, {kAny, kAny});
  check("y", y, {kAny, kAny}, y.scalar_type());
  const int64_t capacity = y.size(0), dim = y.size(1), row_bytes = dim * y.element_size();
  const bool bf16 = y.scalar_type() == ScalarType::BFloat16;
  const auto entries = make_entries(cu_seqlens, placement, prefix_tokens, capacity);
  const int64_t images = entries.size();
  const int32_t* cu = static_cast<const int32_t*>(cu_seqlens.data_ptr());
  check_tables(entries, pos, prefix, prefix_tokens, y, dim);
  static const auto add_bfloat16 = EVERY_ISA_PICK(add_row<Bfloat16, Bfloat16>);
  static const auto add_float = EVERY_ISA_PICK(add_row<float, float>);
  torch::stable::parallel_for(0, capacity, 32, [&](int64_t begin, int64_t end) {
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
        if (bf16)
          add_bfloat16(reinterpret_cast<Bfloat16*>(to), reinterpret_cast<const Bfloat16*>(from), dim);
        else
          add_float(reinterpret_cast<float*>(to), reinterpret_cast<const float*>(from), dim);
      }
    }
  });
}

// grad: (capacity, dim) -> (prefix + cells, dim) fp32: its sums over the images, for each prefix token and each cell.
Tensor patch_embed_sums_cpu(const Tensor& grad, const Tensor& cu_seqlens, const Tensor& placement, int64_t prefix,
                            int64_t cells) {
  check_rows("grad", grad, {kAny, kAny});
  check("grad", grad, {kAny, kAny}, grad.scalar_type());
  const int64_t dim = grad.size(1);
  const bool bf16 = grad.scalar_type() == ScalarType::BFloat16;
  const auto entries = make_entries(cu_seqlens, placement, prefix, grad.size(0));
  REVIT_CHECK(cells >= 0 && cells <= kMostCells, "cells must be at least 0, got ", cells);
  for (const Entry& entry : entries)
    REVIT_CHECK(entry.cell + entry.rows * entry.columns <= cells, "there are too few cells: ", cells);
  Tensor sums = torch::stable::new_empty(grad, {prefix + cells, dim}, ScalarType::Float);
  static const auto add_bfloat16 = EVERY_ISA_PICK(add_row<float, Bfloat16>);
  static const auto add_float = EVERY_ISA_PICK(add_row<float, float>);
  torch::stable::parallel_for(0, prefix + cells, 4, [&](int64_t begin, int64_t end) {
    float* to = static_cast<float*>(sums.data_ptr());
    std::fill(to + begin * dim, to + end * dim, 0.0f);
    const auto add = [&](int64_t slot, int64_t row) {
      if (bf16)
        add_bfloat16(to + slot * dim, static_cast<const Bfloat16*>(grad.data_ptr()) + row * dim, dim);
      else
        add_float(to + slot * dim, static_cast<const float*>(grad.data_ptr()) + row * dim, dim);
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
  check_rows("grad", grad, {kAny, kAny});
  check_sizes("patches", patches, {grad.size(0), kAny});
  REVIT_CHECK(patches.scalar_type() == grad.scalar_type(), "grad and patches must be of one dtype");
  const Boundaries boundaries("cu_seqlens", cu_seqlens, grad.size(0));
  const int64_t tokens = boundaries.at[boundaries.images];
  Tensor rows = torch::stable::narrow(grad, 0, 0, tokens);
  return torch::stable::matmul(torch::stable::transpose(rows, 0, 1), torch::stable::narrow(patches, 0, 0, tokens));
}

}  // namespace
}  // namespace revit

STABLE_TORCH_LIBRARY_FRAGMENT(revit_kernels, m) {
  m.def(
      "patchify_cpu(Tensor[] images, Tensor weight, Tensor cu_seqlens, Tensor placement, float[] scale, "
      "float[] shift, bool cubic, bool channels_last, int prefix, int capacity) -> Tensor");
  m.def(
      "patch_embed_cpu(Tensor[] images, Tensor weight, Tensor packed, Tensor cu_seqlens, Tensor placement, Tensor? "
      "pos, "
      "Tensor? prefix, float[] scale, float[] shift, bool cubic, bool channels_last, int prefix_tokens, int capacity) "
      "-> Tensor");
  m.def(
      "place_cpu(Tensor(a!) y, Tensor cu_seqlens, Tensor placement, Tensor? pos, Tensor? prefix, int prefix_tokens) "
      "-> ()");
  m.def("patch_embed_sums_cpu(Tensor grad, Tensor cu_seqlens, Tensor placement, int prefix, int cells) -> Tensor");
  m.def("patch_embed_weight_cpu(Tensor grad, Tensor patches, Tensor cu_seqlens) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(revit_kernels, CPU, m) {
  m.impl("patchify_cpu", TORCH_BOX(&revit::patchify_cpu));
  m.impl("patch_embed_cpu", TORCH_BOX(&revit::patch_embed_cpu));
  m.impl("place_cpu", TORCH_BOX(&revit::place_cpu));
  m.impl("patch_embed_sums_cpu", TORCH_BOX(&revit::patch_embed_sums_cpu));
  m.impl("patch_embed_weight_cpu", TORCH_BOX(&revit::patch_embed_weight_cpu));
}
