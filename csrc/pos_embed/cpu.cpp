#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <type_traits>
#include <vector>

#include "pos_embed/interpolation.h"

namespace revit {
namespace {

constexpr int64_t kBlock = 256;  // channels that are resized at a time: what is between the two axes stays in L1

struct Grid {
  int64_t rows, columns, start;  // start: cells of the grids before this one
  bool same;                     // as the table's own
  Taps down, across;
};

// One row of cells of a grid, made of the table, (rows, columns, dim).
struct ResizedRow {
  const Grid& grid;
  int64_t row;
  const float* table;
  int64_t columns, dim;
};

}  // namespace
}  // namespace revit

#define KERNELS "pos_embed/rows.h"
#include "cpu/checks.h"
#include "cpu/isa.h"
#include "cpu/scratch.h"

namespace revit {
namespace {

std::vector<Grid> make_grids(int64_t rows, int64_t columns, const std::vector<int64_t>& sizes, const std::string& mode,
                             bool antialias, bool align_corners, double offset) {
  REVIT_CHECK(mode == "bicubic" || mode == "bilinear", "there is no interpolation ", mode);
  REVIT_CHECK(rows > 0 && columns > 0 && rows <= kMostCells && columns <= kMostCells, "a table must be of 1 to ",
              kMostCells, " rows and columns, got ", rows, " and ", columns);
  REVIT_CHECK(sizes.size() % 2 == 0, "sizes must be of rows and columns in turn, got ", sizes.size());
  std::vector<Grid> grids;
  int64_t start = 0;
  for (size_t i = 0; i < sizes.size(); i += 2) {
    const int64_t h = sizes[i], w = sizes[i + 1];
    REVIT_CHECK(h > 0 && w > 0 && h <= kMostCells && w <= kMostCells && start + h * w <= kMostCells,
                "grids must be at least (1, 1), and of at most ", kMostCells, " cells together, got (", h, ", ", w,
                ")");
    const auto taps = [&](int64_t source, int64_t target) {
      return revit::taps({static_cast<int32_t>(source), static_cast<int32_t>(target), mode == "bicubic", antialias,
                          align_corners, offset});
    };
    const bool same = h == rows && w == columns;
    grids.push_back({h, w, start, same, same ? Taps() : taps(rows, h), same ? Taps() : taps(columns, w)});
    start += h * w;
  }
  return grids;
}

Tensor as_float(const Tensor& x) {
  if (x.scalar_type() == ScalarType::Float) return x;
  Tensor wide = torch::stable::new_empty(x, {x.numel()}, ScalarType::Float);
  static const auto widen = EVERY_ISA_PICK(copy<float, Bfloat16>);
  widen(static_cast<float*>(wide.data_ptr()), static_cast<const Bfloat16*>(x.data_ptr()), x.numel());
  return wide;
}

// table: (rows, columns, dim), sizes: rows and columns of each grid -> (cells, dim)
Tensor pos_embed_cpu(const Tensor& table, std::vector<int64_t> sizes, std::string mode, bool antialias,
                     bool align_corners, double offset) {
  check_type("table", table);
  check("table", table, {kAny, kAny, kAny}, table.scalar_type());
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

  static const auto resize_row = EVERY_ISA_PICK(resize_row);
  torch::stable::parallel_for(0, work.size(), 4, [&](int64_t begin, int64_t end) {
    static thread_local Arena of_middle;
    float* middle = of_middle.only<float>(columns * kBlock);
    for (int64_t i = begin; i < end; ++i) {
      const Grid& grid = grids[work[i].first];
      const int64_t r = work[i].second, cell = grid.start + r * grid.columns;
      char* to = static_cast<char*>(y.data_ptr()) + cell * dim * item;
      if (grid.same) {
        std::memcpy(to, static_cast<const char*>(table.data_ptr()) + r * columns * dim * item, columns * dim * item);
        continue;
      }
      resize_row({grid, r, x, columns, dim}, bf16, to, middle);
    }
  });
  return y;
}

// grad: (cells, dim) -> the gradient of the table, (rows, columns, dim)
Tensor pos_embed_backward_cpu(const Tensor& grad, int64_t rows, int64_t columns, std::vector<int64_t> sizes,
                              std::string mode, bool antialias, bool align_corners, double offset) {
  const auto grids = make_grids(rows, columns, sizes, mode, antialias, align_corners, offset);
  check_rows("grad", grad, {grids.empty() ? 0 : grids.back().start + grids.back().rows * grids.back().columns, kAny});
  check("grad", grad, {kAny, kAny}, grad.scalar_type());
  const int64_t dim = grad.size(1), block = 64, blocks = (dim + block - 1) / block;
  Tensor dtable = torch::stable::new_empty(grad, {rows, columns, dim});
  const Tensor wide = as_float(grad);
  const float* g = static_cast<const float*>(wide.data_ptr());
  const bool bf16 = grad.scalar_type() == ScalarType::BFloat16;

  static const auto spread_row = EVERY_ISA_PICK(spread_row);
  static const auto narrow = EVERY_ISA_PICK(copy<Bfloat16, float>);
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    static thread_local Arena of_sums, of_middle;
    float* sum = of_sums.only<float>(rows * columns * block);
    float* middle = of_middle.only<float>(columns * block);
    for (int64_t b = begin; b < end; ++b) {
      const int64_t d = b * block, n = std::min(block, dim - d);
      std::fill_n(sum, rows * columns * n, 0.0f);
      for (const Grid& grid : grids)
        for (int64_t r = 0; r < grid.rows; ++r)
          spread_row(grid, r, g + (grid.start + r * grid.columns) * dim + d, dim, columns, n, sum, middle);
      for (int64_t c = 0; c < rows * columns; ++c)
        if (bf16)
          narrow(static_cast<Bfloat16*>(dtable.data_ptr()) + c * dim + d, &sum[c * n], n);
        else
          std::memcpy(static_cast<float*>(dtable.data_ptr()) + c * dim + d, &sum[c * n], n * sizeof(float));
    }
  });
  return dtable;
}

}  // namespace
}  // namespace revit

STABLE_TORCH_LIBRARY_FRAGMENT(revit_kernels, m) {
  m.def(
      "pos_embed_cpu(Tensor table, int[] sizes, str mode, bool antialias, bool align_corners, float offset) -> Tensor");
  m.def(
      "pos_embed_backward_cpu(Tensor grad, int rows, int columns, int[] sizes, str mode, bool antialias, "
      "bool align_corners, float offset) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(revit_kernels, CPU, m) {
  m.impl("pos_embed_cpu", TORCH_BOX(&revit::pos_embed_cpu));
  m.impl("pos_embed_backward_cpu", TORCH_BOX(&revit::pos_embed_backward_cpu));
}
