// The position table resized to every grid of a list in one launch, and the gradient of that, each the other's
// transpose. The host makes the weights (ops/pos_embed/taps.py); no atomics: the same results in every run.

#include <algorithm>
#include <climits>
#include <vector>

#include "cuda/launch.h"
#include "cuda/vectors.h"

using torch::stable::Tensor;

namespace {

constexpr int kChannels = 4, kBlock = 32 * kChannels;        // of a thread, and of a block
constexpr int kWarps = 8, kThreads = 32 * kWarps, kOwn = 4;  // kOwn: columns that a warp makes
constexpr int kTile = kWarps * kOwn;                         // columns that a block makes, or reads at a time
constexpr size_t kShared = (kTile * kBlock + kTile * kTile) * sizeof(float);
static_assert(kTile == 32, "a thread reads the weights of one column made, and is told by its lane which");

// x: the table (rows, columns, dim) forward, the gradient (cells, dim) backward. y: the other of the two.
struct Arguments {
  const void* x;
  void* y;
  const int32_t* grids;  // (grid_count, 4): rows, columns, first cell, first band
  const int2* bands;     // of each row of what is made, then of each column: first cell of the input, count
  const float* weights;  // (bands, width)
  int grid_count, width, rows, columns, dim;
  int most_rows, most_tiles;  // of what is made: of a grid forward, of the table backward
  bool whole;
};

// A block makes kTile columns of one row, and kBlock channels of them: of one grid forward, of the table backward.
template <class T, bool kBackward>
__global__ void __launch_bounds__(kThreads, 2) resample_kernel(const Arguments a) {
  REVIT_DYNAMIC_SHARED(shared);
  float* middle = reinterpret_cast<float*>(shared);  // [kTile, kBlock]: columns of the input, resized along rows
  float* across = middle + kTile * kBlock;           // [kTile, kTile]: columns of the input, columns made
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, channel = blockIdx.y * kBlock + lane * kChannels;
  const int tile = blockIdx.x % a.most_tiles, row = blockIdx.x / a.most_tiles % a.most_rows;
  const int one = blockIdx.x / a.most_tiles / a.most_rows;
  int columns = a.columns, start = 0;  // of what is made
  if constexpr (!kBackward) {
    const int32_t* grid = a.grids + 4 * one;
    if (row >= grid[0]) return;
    columns = grid[1], start = grid[2];
  }
  const int first = tile * kTile, made = min(kTile, columns - first);
  if (made <= 0) return;

  float sum[kOwn][kChannels] = {};
  for (int g = kBackward ? 0 : one; g < (kBackward ? a.grid_count : one + 1); ++g) {
    const int32_t* grid = a.grids + 4 * g;
    const T* x = static_cast<const T*>(a.x) + (kBackward ? static_cast<int64_t>(grid[2]) * a.dim : 0);
    const int pitch = kBackward ? grid[1] : a.columns;
    if (grid[0] == a.rows && grid[1] == a.columns) {
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        if (warp * kOwn + i >= made) continue;
        const int64_t cell = static_cast<int64_t>(row) * pitch + first + warp * kOwn + i;
        float own[kChannels];
        revit::widen(revit::load<kChannels>(x + cell * a.dim, channel, a.dim, a.whole), own);
#pragma unroll
        for (int c = 0; c < kChannels; ++c) sum[i][c] += own[c];
      }
      continue;
    }
    const int down = grid[3] + row, along = grid[3] + (kBackward ? a.rows : grid[0]) + first + lane;  // bands
    const int2 rows = a.bands[down], mine = lane < made ? a.bands[along] : make_int2(0, 0);
    const float* factors = a.weights + static_cast<int64_t>(down) * a.width;  // [rows of the input]
    const float* shares = a.weights + static_cast<int64_t>(along) * a.width;  // [mine.y]
    int begin = mine.y ? mine.x : INT_MAX, end = mine.x + mine.y;  // of all: bands of neighbours need not be in order
#pragma unroll
    for (int bits = 16; bits; bits /= 2) {
      begin = min(begin, __shfl_xor_sync(~0u, begin, bits));
      end = max(end, __shfl_xor_sync(~0u, end, bits));
    }
    for (; begin < end; begin += kTile) {
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        const int other = warp + i * kWarps, k = begin + other - mine.x;
        across[other * kTile + lane] = k >= 0 && k < mine.y ? shares[k] : 0;
      }
      __syncthreads();
      float part[kOwn][kChannels] = {};
      for (int i = 0; i < rows.y; ++i) {
        const float factor = factors[i];
        const int64_t cell = static_cast<int64_t>(rows.x + i) * pitch + begin + warp;
#pragma unroll
        for (int j = 0; j < kOwn; ++j) {
          if (begin + warp + j * kWarps >= end || factor == 0) continue;
          float own[kChannels];
          revit::widen(revit::load<kChannels>(x + (cell + j * kWarps) * a.dim, channel, a.dim, a.whole), own);
#pragma unroll
          for (int c = 0; c < kChannels; ++c) part[j][c] += factor * own[c];
        }
      }
#pragma unroll
      for (int j = 0; j < kOwn; ++j)
        reinterpret_cast<float4*>(middle)[(warp + j * kWarps) * 32 + lane] =
            make_float4(part[j][0], part[j][1], part[j][2], part[j][3]);
      __syncthreads();
      for (int j = 0; j < min(kTile, end - begin); ++j) {
        const float4 weights = reinterpret_cast<const float4*>(across)[j * kWarps + warp];
        const float4 resized = reinterpret_cast<const float4*>(middle)[j * 32 + lane];
        const float factor[kOwn] = {weights.x, weights.y, weights.z, weights.w};
        const float own[kChannels] = {resized.x, resized.y, resized.z, resized.w};
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
          if (warp * kOwn + i >= made || factor[i] == 0) continue;  // a NaN is felt where it has a share
#pragma unroll
          for (int c = 0; c < kChannels; ++c) sum[i][c] += factor[i] * own[c];
        }
      }
      __syncthreads();
    }
  }
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    if (warp * kOwn + i >= made) continue;
    const int64_t cell = start + static_cast<int64_t>(row) * columns + first + warp * kOwn + i;
    revit::store(revit::narrow<T, kChannels>(sum[i]), static_cast<T*>(a.y) + cell * a.dim, channel, a.dim, a.whole);
  }
}

// Makes y of x. sizes: rows and columns of each grid, as `grids` has them on the device.
template <bool kBackward>
void resample(const Tensor& x, const Tensor& y, const Tensor& grids, const Tensor& bands, const Tensor& weights,
              const std::vector<int64_t>& sizes, int64_t rows, int64_t columns) {
  const int64_t count = static_cast<int64_t>(sizes.size()) / 2, dim = x.size(x.dim() - 1);
  int64_t most_rows = kBackward ? rows : 0, most_columns = kBackward ? columns : 0;
  for (int64_t i = 0; !kBackward && i < count; ++i) {
    most_rows = std::max(most_rows, sizes[2 * i]);
    most_columns = std::max(most_columns, sizes[2 * i + 1]);
  }
  if (!most_rows || !dim) return;
  const int64_t most_tiles = (most_columns + kTile - 1) / kTile;
  const int64_t blocks = (kBackward ? 1 : count) * most_rows * most_tiles;
  STD_TORCH_CHECK(blocks < int64_t{1} << 31, "grids too many and too large for one launch");
  Arguments a = {};
  a.x = x.data_ptr();
  a.y = y.data_ptr();
  a.grids = static_cast<const int32_t*>(grids.data_ptr());
  a.bands = static_cast<const int2*>(bands.data_ptr());
  a.weights = static_cast<const float*>(weights.data_ptr());
  a.grid_count = static_cast<int>(count);
  a.width = static_cast<int>(weights.size(1));
  a.rows = static_cast<int>(rows);
  a.columns = static_cast<int>(columns);
  a.dim = static_cast<int>(dim);
  a.most_rows = static_cast<int>(most_rows);
  a.most_tiles = static_cast<int>(most_tiles);
  a.whole = dim % kChannels == 0 && revit::on_vector(a.x);
  const revit::Stream stream(x);
  revit::with_type(x.scalar_type(), [&](auto type) {
    const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>((dim + kBlock - 1) / kBlock));
    stream.launch(resample_kernel<decltype(type), kBackward>, grid, kThreads, kShared, a);
  });
}

// table: (rows, columns, dim), contiguous; grids, bands, weights: as taps.py plans them -> (cells, dim)
Tensor pos_embed_cuda(const Tensor& table, const Tensor& grids, const Tensor& bands, const Tensor& weights,
                      std::vector<int64_t> sizes) {
  int64_t cells = 0;
  for (size_t i = 0; i + 1 < sizes.size(); i += 2) cells += sizes[i] * sizes[i + 1];
  Tensor y = torch::stable::new_empty(table, {cells, table.size(2)});
  resample<false>(table, y, grids, bands, weights, sizes, table.size(0), table.size(1));
  return y;
}

// grad: (cells, dim), contiguous -> the gradient of the table, (rows, columns, dim)
Tensor pos_embed_backward_cuda(const Tensor& grad, const Tensor& grids, const Tensor& bands, const Tensor& weights,
                               int64_t rows, int64_t columns, std::vector<int64_t> sizes) {
  Tensor y = torch::stable::new_empty(grad, {rows, columns, grad.size(1)});
  resample<true>(grad, y, grids, bands, weights, sizes, rows, columns);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(revit_kernels, m) {
  m.def("pos_embed_cuda(Tensor table, Tensor grids, Tensor bands, Tensor weights, int[] sizes) -> Tensor");
  m.def(
      "pos_embed_backward_cuda(Tensor grad, Tensor grids, Tensor bands, Tensor weights, int rows, int columns, "
      "int[] sizes) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(revit_kernels, REVIT_CUDA_KEY, m) {
  m.impl("pos_embed_cuda", TORCH_BOX(&pos_embed_cuda));
  m.impl("pos_embed_backward_cuda", TORCH_BOX(&pos_embed_backward_cuda));
}
