#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <string>
#include <vector>

#include "common/bfloat16.h"
#include "common/interpolation.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

constexpr int64_t kBlock = 256;  // channels that are resized at a time: what is between the two axes stays in L1

struct Grid {
  int64_t rows, columns, start;  // start: cells of the grids before this one
  bool same;                     // as the table's own
  revit::Taps down, across;
};

// y[i] = sum of weight[k] * x[k * stride + i] over k < count, for i < n. k is added in order, for every i alike.
REVIT_CLONES void weighted_sum(float* y, const float* x, int64_t stride, const float* weight, int64_t count,
                               int64_t n) {
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) {
    revit::Vector a = {}, b = {}, c = {}, d = {};
    for (int64_t k = 0; k < count; ++k) {
      const revit::Vector* row = reinterpret_cast<const revit::Vector*>(x + k * stride + i);
      a += weight[k] * row[0], b += weight[k] * row[1], c += weight[k] * row[2], d += weight[k] * row[3];
    }
    revit::Vector* out = reinterpret_cast<revit::Vector*>(y + i);
    out[0] = a, out[1] = b, out[2] = c, out[3] = d;
  }
  for (; i + 16 <= n; i += 16) {
    revit::Vector a = {};
    for (int64_t k = 0; k < count; ++k) a += weight[k] * *reinterpret_cast<const revit::Vector*>(x + k * stride + i);
    *reinterpret_cast<revit::Vector*>(y + i) = a;
  }
  for (; i < n; ++i) {
    float a = 0;
    for (int64_t k = 0; k < count; ++k) a = a + weight[k] * x[k * stride + i];
    y[i] = a;
  }
}

// y[i] += weight * x[i]
REVIT_CLONES void add_scaled(float* y, const float* x, float weight, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] += weight * x[i];
}

std::vector<Grid> make_grids(int64_t rows, int64_t columns, const std::vector<int64_t>& sizes, const std::string& mode,
                             bool antialias, bool align_corners, double offset) {
  std::vector<Grid> grids;
  int64_t start = 0;
  for (size_t i = 0; i + 1 < sizes.size(); i += 2) {
    const int64_t h = sizes[i], w = sizes[i + 1];
    const auto taps = [&](int64_t source, int64_t target) {
      return revit::taps({static_cast<int32_t>(source), static_cast<int32_t>(target), mode == "bicubic", antialias,
                          align_corners, offset});
    };
    const bool same = h == rows && w == columns;
    grids.push_back({h, w, start, same, same ? revit::Taps() : taps(rows, h), same ? revit::Taps() : taps(columns, w)});
    start += h * w;
  }
  return grids;
}

Tensor as_float(const Tensor& x) {
  if (x.scalar_type() == ScalarType::Float) return x;
  Tensor wide = torch::stable::new_empty(x, {x.numel()}, ScalarType::Float);
  revit::widen(static_cast<float*>(wide.data_ptr()), static_cast<const uint16_t*>(x.data_ptr()), x.numel());
  return wide;
}

}  // namespace

// table: (rows, columns, dim), sizes: rows and columns of each grid -> (cells, dim)
Tensor pos_embed_cpu(const Tensor& table, std::vector<int64_t> sizes, std::string mode, bool antialias,
                     bool align_corners, double offset) {
  const int64_t rows = table.size(0), columns = table.size(1), dim = table.size(2), item = table.element_size();
  const auto grids = make_grids(rows, columns, sizes, mode, antialias, align_corners, offset);
  std::vector<std::pair<int64_t, int64_t>> work;  // grid, row of the grid
  for (size_t g = 0; g < grids.size(); ++g)
    for (int64_t r = 0; r < grids[g].rows; ++r) work.push_back({g, r});
  const int64_t cells = grids.empty() ? 0 : grids.back().start + grids.back().rows * grids.back().columns;
  Tensor y = torch::stable::new_empty(table, {cells, dim});
  if (cells == 0 || dim == 0) return y;
  const Tensor wide = as_float(table);
  const float* x = static_cast<const float*>(wide.data_ptr());
  const bool bf16 = table.scalar_type() == ScalarType::BFloat16;

  torch::stable::parallel_for(0, work.size(), 4, [&](int64_t begin, int64_t end) {
    std::vector<float> middle(columns * kBlock), out(kBlock);
    for (int64_t i = begin; i < end; ++i) {
      const Grid& grid = grids[work[i].first];
      const int64_t r = work[i].second, cell = grid.start + r * grid.columns;
      char* to = static_cast<char*>(y.data_ptr()) + cell * dim * item;
      if (grid.same) {
        std::memcpy(to, static_cast<const char*>(table.data_ptr()) + r * columns * dim * item, columns * dim * item);
        continue;
      }
      const revit::Taps &down = grid.down, &across = grid.across;
      for (int64_t d = 0; d < dim; d += kBlock) {
        const int64_t n = std::min(kBlock, dim - d);
        for (int64_t c = 0; c < columns; ++c)
          weighted_sum(&middle[c * n], x + (down.first[r] * columns + c) * dim + d, columns * dim,
                       &down.weight[r * down.width], down.count[r], n);
        for (int64_t q = 0; q < grid.columns; ++q) {
          float* result = bf16 ? out.data() : reinterpret_cast<float*>(to) + q * dim + d;
          weighted_sum(result, &middle[across.first[q] * n], n, &across.weight[q * across.width], across.count[q], n);
          if (bf16) revit::narrow(reinterpret_cast<uint16_t*>(to) + q * dim + d, result, n);
        }
      }
    }
  });
  return y;
}

// grad: (cells, dim) -> the gradient of the table, (rows, columns, dim)
Tensor pos_embed_backward_cpu(const Tensor& grad, int64_t rows, int64_t columns, std::vector<int64_t> sizes,
                              std::string mode, bool antialias, bool align_corners, double offset) {
  const int64_t dim = grad.size(1), block = 64, blocks = (dim + block - 1) / block;
  const auto grids = make_grids(rows, columns, sizes, mode, antialias, align_corners, offset);
  Tensor dtable = torch::stable::new_empty(grad, {rows, columns, dim});
  const Tensor wide = as_float(grad);
  const float* g = static_cast<const float*>(wide.data_ptr());
  const bool bf16 = grad.scalar_type() == ScalarType::BFloat16;

  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> sum(rows * columns * block), middle(columns * block);
    for (int64_t b = begin; b < end; ++b) {
      const int64_t d = b * block, n = std::min(block, dim - d);
      std::fill(sum.begin(), sum.end(), 0.0f);
      for (const Grid& grid : grids)
        for (int64_t r = 0; r < grid.rows; ++r) {
          const float* from = g + (grid.start + r * grid.columns) * dim + d;
          if (grid.same) {
            for (int64_t q = 0; q < columns; ++q) add_scaled(&sum[(r * columns + q) * n], from + q * dim, 1, n);
            continue;
          }
          const revit::Taps &down = grid.down, &across = grid.across;
          std::fill(middle.begin(), middle.end(), 0.0f);
          for (int64_t q = 0; q < grid.columns; ++q)
            for (int64_t k = 0; k < across.count[q]; ++k)
              add_scaled(&middle[(across.first[q] + k) * n], from + q * dim, across.weight[q * across.width + k], n);
          for (int64_t k = 0; k < down.count[r]; ++k)
            add_scaled(&sum[(down.first[r] + k) * columns * n], middle.data(), down.weight[r * down.width + k],
                       columns * n);
        }
      for (int64_t c = 0; c < rows * columns; ++c)
        if (bf16)
          revit::narrow(static_cast<uint16_t*>(dtable.data_ptr()) + c * dim + d, &sum[c * n], n);
        else
          std::memcpy(static_cast<float*>(dtable.data_ptr()) + c * dim + d, &sum[c * n], n * sizeof(float));
    }
  });
  return dtable;
}

STABLE_TORCH_LIBRARY_FRAGMENT(revit_kernels, m) {
  m.def(
      "pos_embed_cpu(Tensor table, int[] sizes, str mode, bool antialias, bool align_corners, float offset) -> Tensor");
  m.def(
      "pos_embed_backward_cpu(Tensor grad, int rows, int columns, int[] sizes, str mode, bool antialias, "
      "bool align_corners, float offset) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(revit_kernels, CPU, m) {
  m.impl("pos_embed_cpu", TORCH_BOX(&pos_embed_cpu));
  m.impl("pos_embed_backward_cpu", TORCH_BOX(&pos_embed_backward_cpu));
}
