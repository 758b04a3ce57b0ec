// A batch of images, and their patches: read, resized, normalised and cut.
#pragma once

#include <map>
#include <utility>
#include <vector>

#include "patch_embed/images.h"

#define KERNELS "patch_embed/pixels.h"
#include "cpu/isa.h"
#include "cpu/scratch.h"

namespace revit {
namespace {

// The images and where their patches are to lie: in the numbers of a patch, resized and normalised.
class Patches {
 public:
  Patches(const std::vector<Tensor>& tensors, const Tensor& weight, std::vector<Entry> places,
          const std::vector<double>& scale, const std::vector<double>& shift, bool cubic, bool channels_last)
      : entries(std::move(places)),
        ph(weight.size(2)),
        pw(weight.size(3)),
        width(weight.size(1) * ph * pw),
        images_(make_images(tensors, channels_last, weight.size(1))),
        type_(tensors.empty() ? ScalarType::Float : tensors[0].scalar_type()),
        scale_(scale.begin(), scale.end()),
        shift_(shift.begin(), shift.end()) {
    REVIT_CHECK(images_.size() == entries.size(), "images must be as many as placement has rows");
    const auto channels = static_cast<size_t>(weight.size(1));
    REVIT_CHECK(scale_.size() == channels && shift_.size() == channels, "scale and shift must be ", channels,
                " numbers, one per channel");
    for (size_t i = 0; i < entries.size(); ++i) {
      if (!entries[i].rows) continue;
      REVIT_CHECK(images_[i].height && images_[i].width, "image ", i, " is empty");
      REVIT_CHECK(height(i) <= kMostCells && entries[i].columns * pw <= kMostCells, "image ", i,
                  " would be resized to more than ", kMostCells, " pixels");
      if (!fits(i)) axes_.insert({axis(i, 0), 0}), axes_.insert({axis(i, 1), 0});
    }
    std::vector<std::pair<int64_t, int64_t>> pairs;
    for (auto& [pair, index] : axes_) index = pairs.size(), pairs.push_back(pair);
    taps_.resize(pairs.size());
    torch::stable::parallel_for(0, pairs.size(), 4, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        taps_[i] = revit::taps(
            {static_cast<int32_t>(pairs[i].first), static_cast<int32_t>(pairs[i].second), cubic, true, false, 0});
    });
  }

  // `rows` pixel rows of one resized image, kRows at most, from `row` on, into y: where the patch of pixel (0, 0) lies.
  // Patches lie `stride` numbers apart, `width` of which are written.
  void cut(size_t i, int64_t row, int64_t rows, char* y, int64_t stride, Number number, Arena& arena) const {
    const Taps* down = fits(i) ? nullptr : &taps_[axes_.at(axis(i, 0))];
    const Taps* across = fits(i) ? nullptr : &taps_[axes_.at(axis(i, 1))];
    Cut cut{images_[i], type_, down,   across,        row,           rows,   entries[i].columns,
            ph,         pw,    stride, scale_.data(), shift_.data(), number, y};
    const int64_t source = cut.source_rows() * cut.length(), middle = down ? cut.length() * kRows : 0;
    const int64_t result = cut.line() * kRows;
    arena.reserve(Arena::bytes<float>(source) + Arena::bytes<float>(middle) + Arena::bytes<float>(result));
    cut.source = arena.take<float>(source), cut.middle = arena.take<float>(middle);
    cut.result = arena.take<float>(result);
    cut_rows_(cut);
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

  void (*const cut_rows_)(const Cut&) = EVERY_ISA_PICK(cut_rows);
  const std::vector<Image> images_;
  const ScalarType type_;
  const std::vector<float> scale_, shift_;
  std::map<std::pair<int64_t, int64_t>, size_t> axes_;  // every distinct resize of an axis, and its taps
  std::vector<Taps> taps_;
};

}  // namespace
}  // namespace revit
