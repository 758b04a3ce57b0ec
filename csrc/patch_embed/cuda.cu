// Images of any size to packed tokens in one launch: a block makes the patches of some rows of the packed buffer in
// shared memory, multiplies them with the weight, and adds bias and position. And the sums of a gradient over images.
// No atomics: the same results in every run, and for an image in any company.

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "cuda/segments.h"
#include "cuda_product.h"

namespace {

using namespace revit_patch_embed_cuda;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// weight: (dim, stride), of which `width` count, every row on 16 bytes; y: (capacity, dim); patches: (capacity, width)
template <class T>
struct Arguments {
  Pixels pixels;
  const T *weight, *bias, *pos, *prefix_rows;
  T *y, *patches;
  const int *cu_seqlens, *placement, *image;
  int capacity, dim, stride, width, prefix, cells;
  int tiles;    // of columns, to a block
  bool paired;  // rows of bias, pos, prefix and y begin on 4 bytes, and can be read two numbers at a time
};

// What the block's rows are, from the device's own boundaries.
template <class T>
__device__ __forceinline__ Row<T> find_row(const Arguments<T>& a, int at) {
  Row<T> row = {};
  row.patch = -1;
  row.corner = reinterpret_cast<int64_t>(a.weight);
  row.image = at < a.capacity ? a.image[at] : -1;
  if (row.image < 0) return row;
  const int place = at - a.cu_seqlens[row.image];
  if (place < a.prefix) {
    if (a.prefix_rows && place >= 0) row.extra = a.prefix_rows + static_cast<int64_t>(place) * a.dim;
    return row;
  }
  row.rows = a.placement[3 * row.image], row.columns = a.placement[3 * row.image + 1];
  if (place - a.prefix >= row.rows * row.columns) return row;
  row.patch = place - a.prefix;
  const int cell = a.placement[3 * row.image + 2] + row.patch;
  if (a.pos && cell < a.cells) row.extra = a.pos + static_cast<int64_t>(cell) * a.dim;
  locate(row, a.pixels);
  return row;
}

template <class T, bool kLarge>
__global__ void __launch_bounds__(kThreads, 1) forward_kernel(const Arguments<T> a) {
  using Own = Shape<T, kLarge>;
  REVIT_DYNAMIC_SHARED(shared);
  T* ring = reinterpret_cast<T*>(shared);  // [kStages, kColumns, kRow]
  Row<T>* rows = reinterpret_cast<Row<T>*>(shared + Own::kRing);
  T* patches = reinterpret_cast<T*>(shared + Own::kFixed);
  const int chunks = (a.width + Own::kChunk - 1) / Own::kChunk, pitch = chunks * Own::kChunk + Own::kPad;
  const int first = blockIdx.x * Own::kTokens;
  for (int i = threadIdx.x; i < Own::kTokens; i += kThreads) rows[i] = find_row(a, first + i);
  __syncthreads();
  if (a.pixels.type == PixelType::kByte)
    make_patches<uint8_t, T, Own::kRows>(patches, pitch, rows, a.pixels, shared);
  else if (sizeof(T) == 4 || a.pixels.type == PixelType::kFloat)
    make_patches<float, T, Own::kRows>(patches, pitch, rows, a.pixels, shared);
  else if constexpr (sizeof(T) != 4)
    make_patches<T, T, Own::kRows>(patches, pitch, rows, a.pixels, shared);
  __syncthreads();

  const int first_column = blockIdx.y * a.tiles * kColumns;
  const int tiles = min(a.tiles, (a.dim - first_column + kColumns - 1) / kColumns), steps = tiles * chunks;
  auto start = [&](int step) {
    const int column = first_column + step / chunks * kColumns, k = step % chunks * Own::kChunk;
    const revit::SharedAddress to = revit::shared_address(ring + step % kStages * kColumns * Own::kRow);
#pragma unroll
    for (int i = threadIdx.x; i < kColumns * 8; i += kThreads) {
      const int row = i / 8, own = i % 8 * Own::kPad;  // kPad numbers are 16 bytes
      const bool inside = step < steps && column + row < a.dim && k + own < a.stride;
      const T* from = inside ? a.weight + static_cast<int64_t>(column + row) * a.stride + k + own : a.weight;
      if (step < steps) revit::copy_async(to + (row * Own::kRow + own) * sizeof(T), from, inside);
    }
    revit::commit_copies();
  };
  for (int step = 0; step < kStages - 1; ++step) start(step);
  if (a.patches && blockIdx.y == 0) {
    const int there = min(Own::kTokens, a.capacity - first);
    for (int row = threadIdx.x / 32; row < there; row += kWarps)
      for (int k = threadIdx.x % 32; k < a.width; k += 32)
        a.patches[static_cast<int64_t>(first + row) * a.width + k] = patches[row * pitch + k];
  }

  Product<T, kLarge> product;
  constexpr int kPair = decltype(product)::kPair;
  product.clear();
  for (int step = 0, tile = 0, chunk = 0; step < steps; ++step) {
    revit::wait_for_copies<kStages - 2>();
    __syncthreads();
    start(step + kStages - 1);
    product.add(patches + chunk * Own::kChunk, pitch, ring + step % kStages * kColumns * Own::kRow);
    if (++chunk < chunks) continue;
    const int begin = first_column + tile * kColumns;
    product.finish([&](int row, int own, const float* sums) {
      const int column = begin + own;
      if (first + row >= a.capacity || column >= a.dim) return;
      const bool known = rows[row].patch >= 0;
      const T* extra = rows[row].extra;
      float value[2] = {};
      auto add = [&](const T* from) {
        if (kPair == 2 && a.paired) {
          if constexpr (kPair == 2) {
            const float2 two = revit::unpack(*reinterpret_cast<const uint32_t*>(from), T());
            value[0] += two.x, value[1] += two.y;
          }
          return;
        }
#pragma unroll
        for (int i = 0; i < kPair; ++i)
          if (column + i < a.dim) value[i] += revit::load_one(from + i);
      };
#pragma unroll
      for (int i = 0; i < kPair; ++i) value[i] = known ? sums[i] : 0;
      if (known && a.bias) add(a.bias + column);
      if (extra) add(extra + column);
      T* to = a.y + static_cast<int64_t>(first + row) * a.dim + column;
      if (kPair == 2 && a.paired) {
        if constexpr (kPair == 2) *reinterpret_cast<uint32_t*>(to) = revit::pack(value[0], value[1], T());
        return;
      }
#pragma unroll
      for (int i = 0; i < kPair; ++i)
        if (column + i < a.dim) revit::store_one(to + i, value[i]);
    });
    product.clear();
    chunk = 0, ++tile;
  }
  revit::wait_for_copies<0>();
}

constexpr int kChannels = 4, kBlock = 32 * kChannels;  // columns of a thread, and of a block

struct SumsArguments {
  const void* grad;  // (capacity, dim)
  float* sums;       // (prefix + cells, dim)
  const int *cu_seqlens, *placement;
  int images, capacity, dim, prefix;
  bool whole;
};

// A prefix token or a cell, and some columns: every kWarps-th image by one warp, then the warps in order.
template <class T>
__global__ void __launch_bounds__(kThreads) sums_kernel(const SumsArguments a) {
  REVIT_DYNAMIC_SHARED(shared);
  float4* partial = reinterpret_cast<float4*>(shared);  // [kWarps, 32]
  const int slot = blockIdx.x, warp = threadIdx.x / 32, column = blockIdx.y * kBlock + threadIdx.x % 32 * kChannels;
  float sum[kChannels] = {};
#pragma unroll 4
  for (int image = warp; image < a.images; image += kWarps) {
    const revit::Rows rows = revit::rows_of(a.cu_seqlens, image, a.capacity);
    const int place = slot < a.prefix ? slot : slot - a.placement[3 * image + 2];  // the token that is at this slot
    if ((slot >= a.prefix && place < a.prefix) || place >= rows.count()) continue;
    float own[kChannels];
    const T* row = static_cast<const T*>(a.grad) + static_cast<int64_t>(rows.begin + place) * a.dim;
    revit::widen(revit::load<kChannels>(row, column, a.dim, a.whole), own);
#pragma unroll
    for (int i = 0; i < kChannels; ++i) sum[i] += own[i];
  }
  partial[threadIdx.x] = make_float4(sum[0], sum[1], sum[2], sum[3]);
  __syncthreads();
  if (warp) return;
  for (int i = 1; i < kWarps; ++i) {
    const float4 more = partial[i * 32 + threadIdx.x];
    sum[0] += more.x, sum[1] += more.y, sum[2] += more.z, sum[3] += more.w;
  }
  float* to = a.sums + static_cast<int64_t>(slot) * a.dim;
  revit::store(revit::narrow<float, kChannels>(sum), to, column, a.dim, a.whole);
}

// Every image, as the kernels are to find it.
std::vector<Image> make_images(const std::vector<Tensor>& tensors, bool channels_last) {
  std::vector<Image> images;
  for (const Tensor& t : tensors) {
    const int64_t batched = t.dim() == 4, c = batched + (channels_last ? 2 : 0), h = batched + (channels_last ? 0 : 1);
    for (int64_t i = 0; i < (batched ? t.size(0) : 1); ++i) {
      const int64_t data = reinterpret_cast<int64_t>(t.data_ptr()) + (batched ? i * t.stride(0) * t.element_size() : 0);
      images.push_back({data, t.size(h), t.size(h + 1), t.stride(c), t.stride(h), t.stride(h + 1)});
    }
  }
  return images;
}

// table: (images, 6) int64, on the host: overwritten with what the kernel needs to know of each image.
void patch_embed_images_cuda(Tensor table, std::vector<Tensor> tensors, bool channels_last) {
  const auto images = make_images(tensors, channels_last);
  STD_TORCH_CHECK(table.numel() * 8 == static_cast<int64_t>(images.size() * sizeof(Image)), "table must be (",
                  images.size(), ", 6)");
  std::copy(images.begin(), images.end(), static_cast<Image*>(table.data_ptr()));
}

template <class T>
T* pointer(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<T*>(tensor->data_ptr()) : nullptr;
}

bool on_pair(const void* address) { return reinterpret_cast<uintptr_t>(address) % 4 == 0; }

// table: of the images, on the device; none where they are one tensor. weight: (dim, channels * patch_h * patch_w), its
// rows perhaps longer, so that they begin on 16 bytes. scale, shift: per channel, what a pixel is multiplied with, and
// what is then added -> (capacity, dim), and (capacity, width) the patches, or (0, width) if they are not to be kept
std::tuple<Tensor, Tensor> patch_embed_cuda(std::vector<Tensor> images, const std::optional<Tensor>& table,
                                            const Tensor& weight, const std::optional<Tensor>& bias,
                                            const Tensor& cu_seqlens, const Tensor& placement, const Tensor& image,
                                            const std::optional<Tensor>& pos, const std::optional<Tensor>& prefix,
                                            std::vector<double> scale, std::vector<double> shift, bool cubic,
                                            bool channels_last, int64_t prefix_tokens, int64_t patch_h, int64_t patch_w,
                                            bool keep) {
  const int64_t capacity = image.size(0), dim = weight.size(0), channels = scale.size();
  const int64_t width = channels * patch_h * patch_w;
  STD_TORCH_CHECK(channels <= kMostChannels && patch_h <= kMostPatchRows && weight.stride(0) >= width &&
                      weight.stride(0) * weight.element_size() % 16 == 0 && revit::on_vector(weight.data_ptr()),
                  "no CUDA kernel for a weight of this shape");
  Tensor y = torch::stable::new_empty(weight, {capacity, dim});
  Tensor patches = torch::stable::new_empty(weight, {keep ? capacity : 0, width});
  if (!capacity) return {y, patches};
  Pixels pixels = {};
  pixels.table = pointer<const Image>(table);
  pixels.bytes = images.empty() ? 1 : static_cast<int>(images[0].element_size());
  if (images.size() == 1) {
    const auto every = make_images(images, channels_last);
    if (!every.empty()) pixels.first = every[0];
    if (every.size() > 1) pixels.apart = every[1].data - every[0].data;
  }
  const ScalarType type = images.empty() ? ScalarType::Byte : images[0].scalar_type();
  pixels.type = type == ScalarType::Byte    ? PixelType::kByte
                : type == ScalarType::Float ? PixelType::kFloat
                                            : PixelType::kLikeWeight;
  STD_TORCH_CHECK(pixels.type != PixelType::kLikeWeight || type == weight.scalar_type(),
                  "images must be uint8, fp32 or of the dtype of the weight");
  pixels.channels = static_cast<int>(channels);
  pixels.patch_h = static_cast<int>(patch_h);
  pixels.patch_w = static_cast<int>(patch_w);
  pixels.cubic = cubic;
  for (int64_t i = 0; i < channels; ++i) {
    pixels.scale[i] = static_cast<float>(scale[i]);
    pixels.shift[i] = static_cast<float>(shift[i]);
  }
  const revit::Stream stream(weight);
  revit::with_type(weight.scalar_type(), [&](auto number) {
    using T = decltype(number);
    Arguments<T> a = {};
    a.pixels = pixels;
    a.weight = static_cast<const T*>(weight.data_ptr());
    a.bias = pointer<const T>(bias);
    a.pos = pointer<const T>(pos);
    a.prefix_rows = pointer<const T>(prefix);
    a.y = static_cast<T*>(y.data_ptr());
    a.patches = keep ? static_cast<T*>(patches.data_ptr()) : nullptr;
    a.cu_seqlens = static_cast<const int*>(cu_seqlens.data_ptr());
    a.placement = static_cast<const int*>(placement.data_ptr());
    a.image = static_cast<const int*>(image.data_ptr());
    a.capacity = static_cast<int>(capacity);
    a.dim = static_cast<int>(dim);
    a.stride = static_cast<int>(weight.stride(0));
    a.width = static_cast<int>(width);
    a.prefix = static_cast<int>(prefix_tokens);
    a.cells = pos ? static_cast<int>(pos->size(0)) : 0;
    a.paired = dim % 2 == 0 && on_pair(a.bias) && on_pair(a.pos) && on_pair(a.prefix_rows);
    auto launch = [&](auto large) {
      using Own = Shape<T, decltype(large)::value>;
      STD_TORCH_CHECK(width <= Own::kMostNumbers, "no CUDA kernel for patches of ", width, " numbers");
      // Few tokens: the columns go to several blocks, which then make the same patches.
      const int64_t blocks = (capacity + Own::kTokens - 1) / Own::kTokens, tiles = (dim + kColumns - 1) / kColumns;
      const int64_t parts = std::clamp<int64_t>(revit::multiprocessors() / blocks, 1, tiles);
      a.tiles = static_cast<int>((tiles + parts - 1) / parts);
      const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>((tiles + a.tiles - 1) / a.tiles));
      stream.launch(forward_kernel<T, decltype(large)::value>, grid, kThreads, Own::shared(a.width), a);
    };
    if (width <= Shape<T, true>::kMostNumbers)
      launch(std::true_type());
    else
      launch(std::false_type());
  });
  return {y, patches};
}

// grad: (capacity, dim), contiguous -> (prefix + cells, dim) fp32: its sums over the images, for each prefix token and
// each cell
Tensor patch_embed_sums_cuda(const Tensor& grad, const Tensor& cu_seqlens, const Tensor& placement, int64_t prefix,
                             int64_t cells) {
  const int64_t dim = grad.size(1);
  Tensor sums = torch::stable::new_empty(grad, {prefix + cells, dim}, ScalarType::Float);
  SumsArguments a = {};
  a.grad = grad.data_ptr();
  a.sums = static_cast<float*>(sums.data_ptr());
  a.cu_seqlens = static_cast<const int*>(cu_seqlens.data_ptr());
  a.placement = static_cast<const int*>(placement.data_ptr());
  a.images = static_cast<int>(placement.size(0));
  a.capacity = static_cast<int>(grad.size(0));
  a.dim = static_cast<int>(dim);
  a.prefix = static_cast<int>(prefix);
  a.whole = dim % kChannels == 0 && revit::on_vector(a.grad);
  const revit::Stream stream(grad);
  revit::with_type(grad.scalar_type(), [&](auto type) {
    const dim3 grid(static_cast<unsigned>(prefix + cells), static_cast<unsigned>((dim + kBlock - 1) / kBlock));
    stream.launch(sums_kernel<decltype(type)>, grid, kThreads, kThreads * sizeof(float4), a);
  });
  return sums;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(revit_kernels, m) {
  m.def("patch_embed_images_cuda(Tensor(a!) table, Tensor[] images, bool channels_last) -> ()");
  m.def(
      "patch_embed_cuda(Tensor[] images, Tensor? table, Tensor weight, Tensor? bias, Tensor cu_seqlens, "
      "Tensor placement, Tensor image, Tensor? pos, Tensor? prefix, float[] scale, float[] shift, bool cubic, "
      "bool channels_last, int prefix_tokens, int patch_h, int patch_w, bool keep) -> (Tensor, Tensor)");
  m.def("patch_embed_sums_cuda(Tensor grad, Tensor cu_seqlens, Tensor placement, int prefix, int cells) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(revit_kernels, REVIT_CUDA_KEY, m) {
  m.impl("patch_embed_images_cuda", TORCH_BOX(&patch_embed_images_cuda));
  m.impl("patch_embed_cuda", TORCH_BOX(&patch_embed_cuda));
  m.impl("patch_embed_sums_cuda", TORCH_BOX(&patch_embed_sums_cuda));
}
