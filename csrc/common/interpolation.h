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
  double centre;
};

REVIT_EVERYWHERE inline Window window(const Axis& axis, int32_t target) {
  const double scale = axis.scale(), reach = (axis.cubic ? 2 : 1) * axis.stretch();
  if (axis.antialias) {
    const double centre = scale * (target + 0.5);
    const double low = std::floor(centre - reach + 0.5), high = std::floor(centre + reach + 0.5);
    const int32_t first = low > 0 ? static_cast<int32_t>(low) : 0;
    const int32_t last = high < axis.source ? static_cast<int32_t>(high) : axis.source;
    return {first, last - first, centre - 0.5};
  }
  double centre = axis.align_corners ? scale * target : scale * (target + 0.5) - 0.5;
  if (!axis.cubic && centre < 0) centre = 0;
  return {static_cast<int32_t>(std::floor(centre)) - (axis.cubic ? 1 : 0), axis.cubic ? 4 : 2, centre};
}

// The filter at a distance in units of its stretch: Keys' cubic, a = -0.5 if antialiased and -0.75 if not; or a
// triangle.
REVIT_EVERYWHERE inline double filter(double x, bool cubic, bool antialias) {
  x = x < 0 ? -x : x;
  if (!cubic) return x < 1 ? 1 - x : 0;
  const double a = antialias ? -0.5 : -0.75;
  const double near = ((a + 2) * x - (a + 3)) * x * x + 1, far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a;
  return x < 1 ? near : x < 2 ? far : 0;
}

}  // namespace revit

#if !defined(__CUDACC__)
#include <algorithm>
#include <vector>

namespace revit {

// Target cell i is the sum of weight[i * width + k] * source cell first[i] + k over k < count[i].
struct Taps {
  int32_t width = 0;
  std::vector<int32_t> first, count;
  std::vector<float> weight;
};

inline Taps taps(const Axis& axis) {
  Taps taps;
  taps.width = static_cast<int32_t>(std::ceil((axis.cubic ? 2 : 1) * axis.stretch())) * 2 + 1;
  taps.first.resize(axis.target);
  taps.count.resize(axis.target);
  taps.weight.assign(static_cast<size_t>(axis.target) * taps.width, 0);
  std::vector<double> weight(taps.width);
  const double inverse = 1 / axis.stretch();
  for (int32_t i = 0; i < axis.target; ++i) {
    const Window w = window(axis, i);
    const int32_t first = std::clamp(w.first, 0, axis.source - 1);
    const int32_t last = std::clamp(w.first + w.count - 1, 0, axis.source - 1);
    std::fill(weight.begin(), weight.end(), 0);
    double sum = 0;
    for (int32_t k = 0; k < w.count; ++k) {
      const double value = filter((w.first + k - w.centre) * inverse, axis.cubic, axis.antialias);
      weight[std::clamp(w.first + k, 0, axis.source - 1) - first] += value;
      sum += value;
    }
    taps.first[i] = first;
    taps.count[i] = last - first + 1;
    for (int32_t k = 0; k <= last - first; ++k) taps.weight[i * taps.width + k] = static_cast<float>(weight[k] / sum);
  }
  return taps;
}

}  // namespace revit
#endif
