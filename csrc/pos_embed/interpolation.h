// The weights with which F.interpolate resizes along one axis, and their sums over rows. Compiles for the host and for
// CUDA.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define REVIT_EVERYWHERE __host__ __device__
#else
#define REVIT_EVERYWHERE
#endif

namespace revit {

// Resizing `source` cells to `target` along one axis. `offset` is DINOv2's: it changes the scale and nothing else.
struct Axis {
  int32_t source, target;
  bool cubic, antialias, align_corners;
  double offset;

  REVIT_EVERYWHERE double scale() const {
    if (align_corners) return target > 1 ? (source - 1.0) / (target - 1.0) : 0;
    return source / (target + offset);
  }
  // How far the filter reaches, in cells of the source, for one unit of its argument.
  REVIT_EVERYWHERE double stretch() const { return antialias && scale() > 1 ? scale() : 1; }
};

// The cells first to first + count that one target cell is made of. Where not antialiased they may lie outside.
struct Window {
  int32_t first, count;
  double centre, inverse;  // inverse: of the stretch
};

REVIT_EVERYWHERE inline Window window(const Axis& axis, int32_t target) {
  const double scale = axis.scale(), stretch = axis.stretch(), reach = (axis.cubic ? 2 : 1) * stretch;
  if (axis.antialias) {
    const double centre = scale * (target + 0.5);
    const double low = std::floor(centre - reach + 0.5), high = std::floor(centre + reach + 0.5);
    const int32_t first = low > 0 ? static_cast<int32_t>(low) : 0;
    const int32_t last = high < axis.source ? static_cast<int32_t>(high) : axis.source;
    return {first, last - first, centre - 0.5, 1 / stretch};
  }
  double centre = axis.align_corners ? scale * target : scale * (target + 0.5) - 0.5;
  if (!axis.cubic && centre < 0) centre = 0;
  return {static_cast<int32_t>(std::floor(centre)) - (axis.cubic ? 1 : 0), axis.cubic ? 4 : 2, centre, 1};
}

// The filter at a distance in units of its stretch: Keys' cubic, a = -0.5 if antialiased and -0.75 if not; or a
// triangle.
template <class T>
REVIT_EVERYWHERE T filter(T x, bool cubic, bool antialias) {
  x = x < 0 ? -x : x;
  if (!cubic) return x < 1 ? 1 - x : 0;
  const T a = antialias ? T(-0.5) : T(-0.75);
  const T near = ((a + 2) * x - (a + 3)) * x * x + 1, far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a;
  return x < 1 ? near : x < 2 ? far : 0;
}

// The cells of the source that a window is about: for those outside of it the border stands.
REVIT_EVERYWHERE inline int32_t first_cell(const Axis& axis, const Window& w) {
  return w.first < 0 ? 0 : w.first < axis.source ? w.first : axis.source - 1;
}
REVIT_EVERYWHERE inline int32_t last_cell(const Axis& axis, const Window& w) {
  const int32_t last = w.first + w.count - 1;
  return last < 0 ? 0 : last < axis.source ? last : axis.source - 1;
}

// What the filter gives to a cell of the source; 0 for one that the window is not about.
REVIT_EVERYWHERE inline double share(const Axis& axis, const Window& w, int32_t cell) {
  const int32_t last = w.first + w.count - 1;
  const int32_t from = cell == 0 || cell < w.first ? w.first : cell;
  const int32_t to = cell == axis.source - 1 || cell > last ? last : cell;
  double sum = 0;
  for (int32_t k = from; k <= to; ++k) sum += filter((k - w.centre) * w.inverse, axis.cubic, axis.antialias);
  return sum;
}

// The sum of the shares, by which they are divided.
REVIT_EVERYWHERE inline double whole(const Axis& axis, const Window& w) {
  double sum = 0;
  for (int32_t cell = first_cell(axis, w); cell <= last_cell(axis, w); ++cell) sum += share(axis, w, cell);
  return sum;
}

}  // namespace revit

#if !defined(__CUDACC__)
#include <algorithm>
#include <stdexcept>
#include <vector>

namespace revit {

// Target cell i is the sum of weight[i * width + k] * source cell first[i] + k over k < count[i].
struct Taps {
  int64_t width = 0;
  std::vector<int32_t> first, count;
  std::vector<float> weight;
};

inline Taps taps(const Axis& axis) {
  // Where the last cell lies must be an int32.
  if (axis.source < 1 || axis.target < 1 || !(axis.target + axis.offset > 0) || !(axis.scale() * axis.target < 1 << 30))
    throw std::invalid_argument("an axis to resize must be of 1 to 2**30 cells, and the grid and offset above 0");
  Taps taps;
  const double reach = std::ceil((axis.cubic ? 2 : 1) * axis.stretch());
  taps.width = static_cast<int64_t>(std::min<double>(reach * 2 + 1, axis.source));
  taps.first.resize(axis.target);
  taps.count.resize(axis.target);
  taps.weight.assign(axis.target * taps.width, 0);
  for (int32_t i = 0; i < axis.target; ++i) {
    const Window w = window(axis, i);
    const double sum = whole(axis, w);
    taps.first[i] = first_cell(axis, w);
    taps.count[i] = last_cell(axis, w) - taps.first[i] + 1;
    for (int32_t k = 0; k < taps.count[i]; ++k)
      taps.weight[i * taps.width + k] = static_cast<float>(share(axis, w, taps.first[i] + k) / sum);
  }
  return taps;
}

}  // namespace revit
#endif
