// Rows of pixels: read, resized, normalised and dealt out to patches. No include guard: compiled once per instruction
// set.

constexpr int kWide = kRows / kLanes;  // vectors for kRows numbers

template <class T>
INLINE void read_row(float* y, const T* x, int64_t step, int64_t n) {
  if constexpr (sizeof(T) == 1) {
    if (step == 1)
      for (int64_t i = 0; i < n; ++i) y[i] = x[i];
    else
      for (int64_t i = 0; i < n; ++i) y[i] = x[i * step];
  } else {
    if (step == 1)
      copy(y, x, n);
    else
      for (int64_t i = 0; i < n; ++i) copy(y + i, x + i * step, 1);
  }
}

// One row of one plane, as floats.
inline void load_row(float* y, const Image& image, ScalarType type, int64_t plane, int64_t row) {
  const int64_t n = image.width * image.pitch, step = image.pitch == 1 ? image.pixel_stride : 1;
  const int64_t at = plane * image.channel_stride + row * image.row_stride;
  if (type == ScalarType::Byte)
    read_row(y, reinterpret_cast<const uint8_t*>(image.data) + at, step, n);
  else if (type == ScalarType::BFloat16)
    read_row(y, reinterpret_cast<const Bfloat16*>(image.data) + at, step, n);
  else
    read_row(y, reinterpret_cast<const float*>(image.data) + at, step, n);
}

inline void take_every(float* y, const float* x, int64_t step, int64_t n) {
  if (step == 3)
    for (int64_t i = 0; i < n; ++i) y[i] = x[i * 3];
  else
    for (int64_t i = 0; i < n; ++i) y[i] = x[i * step];
}

// The sum of `count` times kRows numbers of x, `stride` apart.
INLINE void weighted_sum(Floats (&sum)[kWide], const float* x, int64_t stride, const float* weight, int64_t count) {
  for (int v = 0; v < kWide; ++v) sum[v] = Floats{};
  for (int64_t k = 0; k < count; ++k)
    for (int v = 0; v < kWide; ++v) sum[v] = fma(splat(weight[k]), load(x + k * stride + v * kLanes), sum[v]);
}

// Column j of a square to y + j * stride.
INLINE void store_columns(const Floats (&square)[kRows][kWide], float* y, int64_t stride) {
  for (int v = 0; v < kWide; ++v)
    for (int top = 0; top < kRows; top += kLanes) {
      Floats block[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) block[i] = square[top + i][v];
      transpose(block);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) write(y + (v * kLanes + i) * stride + top, block[i]);
    }
}

// kRows rows of the resized image, along the columns: x: (source rows, pitch of `length` floats), rows from `lowest` on
// -> y: (length, kRows), so that the rows of the result lie side by side and the other axis needs no gather.
inline void resize_down(float* y, const float* x, int64_t length, const Taps& down, int64_t row, int64_t rows,
                        int64_t lowest) {
  for (int64_t i = 0; i < length; i += kRows) {
    Floats sum[kRows][kWide] = {};
    for (int64_t r = 0; r < rows; ++r)
      weighted_sum(sum[r], x + (down.first[row + r] - lowest) * length + i, length,
                   &down.weight[(row + r) * down.width], down.count[row + r]);
    store_columns(sum, y + i * kRows, kRows);
  }
}

// The other axis: x: (pixels, pitch, kRows) -> y: (kRows, length of a row)
inline void resize_across(float* y, const float* x, int64_t length, int64_t pitch, const Taps& across,
                          int64_t columns) {
  for (int64_t i = 0; i < columns; i += kRows) {
    Floats sum[kRows][kWide] = {};
    for (int64_t j = 0; j < std::min(kRows, columns - i); ++j)
      weighted_sum(sum[j], x + across.first[i + j] * pitch * kRows, pitch * kRows,
                   &across.weight[(i + j) * across.width], across.count[i + j]);
    store_columns(sum, y + i, length);
  }
}

// kWidth: of a patch; 0: any
template <Number kNumber, int64_t kWidth, class T>
INLINE void cut_row(T* y, const float* x, float scale, float shift, int64_t patches, int64_t width, int64_t stride) {
  const int64_t n = kWidth ? kWidth : width;
  for (int64_t q = 0; q < patches; ++q) {
    const auto put = [&](int64_t i, auto part) INLINE_LAMBDA {
      const Floats pixels = fma(load(x + q * n + i, part), splat(scale), splat(shift));
      store(y + q * stride + i, kNumber == Number::kRounded ? widen(narrow(pixels)) : pixels, part);
    };
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) put(i, Full{});
    if (i < n) n < kLanes ? put(i, Part{n - i}) : put(n - kLanes, Full{});  // some of them twice
  }
}

template <Number kNumber, class T>
INLINE void cut_row(T* y, const float* x, float scale, float shift, int64_t patches, int64_t width, int64_t stride) {
  if (width == 16) return cut_row<kNumber, 16>(y, x, scale, shift, patches, width, stride);
  if (width == 14) return cut_row<kNumber, 14>(y, x, scale, shift, patches, width, stride);
  if (width == 32) return cut_row<kNumber, 32>(y, x, scale, shift, patches, width, stride);
  return cut_row<kNumber, 0>(y, x, scale, shift, patches, width, stride);
}

// One row of pixels of one channel, normalised and dealt out to the patches it crosses: `stride` apart in y.
inline void cut_row(Number number, char* y, const float* x, float scale, float shift, int64_t patches, int64_t width,
                    int64_t stride) {
  if (number == Number::kBfloat16)
    cut_row<Number::kBfloat16>(reinterpret_cast<Bfloat16*>(y), x, scale, shift, patches, width, stride);
  else if (number == Number::kRounded)
    cut_row<Number::kRounded>(reinterpret_cast<float*>(y), x, scale, shift, patches, width, stride);
  else
    cut_row<Number::kFloat>(reinterpret_cast<float*>(y), x, scale, shift, patches, width, stride);
}

inline void cut_rows(const Cut& cut) {
  const Image& image = cut.image;
  const int64_t pitch = image.pitch, columns = cut.patches * cut.pw;
  const auto put = [&](const float* pixels, int64_t row, int64_t channel) {
    const int64_t at = row / cut.ph * cut.patches * cut.stride + (channel * cut.ph + row % cut.ph) * cut.pw;
    cut_row(cut.number, cut.y + at * (cut.number == Number::kBfloat16 ? 2 : 4), pixels, cut.scale[channel],
            cut.shift[channel], cut.patches, cut.pw, cut.stride);
  };
  for (int64_t plane = 0; plane < image.planes; ++plane) {
    if (!cut.down) {
      for (int64_t r = 0; r < cut.rows; ++r) {
        load_row(cut.source, image, cut.type, plane, cut.row + r);
        for (int64_t c = 0; c < pitch; ++c) {
          if (pitch > 1) take_every(cut.result, cut.source + c, pitch, columns);
          put(pitch > 1 ? cut.result : cut.source, cut.row + r, plane + c);
        }
      }
      continue;
    }
    const int64_t length = cut.length(), line = cut.line(), lowest = cut.lowest();
    for (int64_t r = 0; r < cut.source_rows(); ++r)
      load_row(cut.source + r * length, image, cut.type, plane, lowest + r);
    resize_down(cut.middle, cut.source, length, *cut.down, cut.row, cut.rows, lowest);
    for (int64_t c = 0; c < pitch; ++c) {
      resize_across(cut.result, cut.middle + c * kRows, line, pitch, *cut.across, columns);
      for (int64_t r = 0; r < cut.rows; ++r) put(cut.result + r * line, cut.row + r, plane + c);
    }
  }
}

// y += x, both of n numbers
template <class Y, class X>
inline void add_row(Y* y, const X* x, int64_t n) {
  each_vector(n, [&](int64_t i, auto part, int) { store(y + i, load(y + i, part) + load(x + i, part), part); });
}
