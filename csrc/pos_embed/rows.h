// Resizing of a table of positions, and its gradient. No include guard: compiled once per instruction set.

// y[i] = sum of weight[k] * x[k * stride + i] over k < count, for i < n. k is added in order, for every i alike.
template <class T>
INLINE void weighted_sum(T* y, const float* x, int64_t stride, const float* weight, int64_t count, int64_t n) {
  const auto vectors = [&](int64_t i, auto some, auto part) INLINE_LAMBDA {
    constexpr int kSome = decltype(some)::value;
    Floats sum[kSome] = {};
    for (int64_t k = 0; k < count; ++k)
      for (int v = 0; v < kSome; ++v)
        sum[v] = fma(splat(weight[k]), load(x + k * stride + i + v * kLanes, part), sum[v]);
    for (int v = 0; v < kSome; ++v) store(y + i + v * kLanes, sum[v], part);
  };
  constexpr int kMany = kLanes == 16 ? 4 : 8;
  int64_t i = 0;
  for (; i + kMany * kLanes <= n; i += kMany * kLanes) vectors(i, std::integral_constant<int, kMany>(), Full{});
  for (; i + kLanes <= n; i += kLanes) vectors(i, std::integral_constant<int, 1>(), Full{});
  if (i < n) vectors(i, std::integral_constant<int, 1>(), Part{n - i});
}

template <class T>
inline void resize_row_to(T* y, const ResizedRow& row, float* middle) {
  const Taps &down = row.grid.down, &across = row.grid.across;
  const int64_t columns = row.columns, dim = row.dim, r = row.row;
  for (int64_t d = 0; d < dim; d += kBlock) {
    const int64_t n = std::min(kBlock, dim - d);
    for (int64_t c = 0; c < columns; ++c)
      weighted_sum(middle + c * n, row.table + (down.first[r] * columns + c) * dim + d, columns * dim,
                   &down.weight[r * down.width], down.count[r], n);
    for (int64_t q = 0; q < row.grid.columns; ++q)
      weighted_sum(y + q * dim + d, middle + across.first[q] * n, n, &across.weight[q * across.width], across.count[q],
                   n);
  }
}

// y: (columns of the grid, dim) bf16 or fp32; middle: (columns of the table, kBlock)
inline void resize_row(const ResizedRow& row, bool is_bf16, void* y, float* middle) {
  is_bf16 ? resize_row_to(static_cast<Bfloat16*>(y), row, middle) : resize_row_to(static_cast<float*>(y), row, middle);
}

// y += weight * x
INLINE void add_scaled(float* y, const float* x, float weight, int64_t n) {
  each_vector(n, [&](int64_t i, auto part, int) {
    store(y + i, fma(splat(weight), load(x + i, part), load(y + i, part)), part);
  });
}

// What one row of a grid adds to n channels of the table's gradient.
// grad: (columns of the grid, n), dim apart; sum: (rows, columns, n); middle: (columns, n)
inline void spread_row(const Grid& grid, int64_t r, const float* grad, int64_t dim, int64_t columns, int64_t n,
                       float* sum, float* middle) {
  if (grid.same) {
    for (int64_t q = 0; q < columns; ++q) add_scaled(sum + (r * columns + q) * n, grad + q * dim, 1, n);
    return;
  }
  const Taps &down = grid.down, &across = grid.across;
  std::memset(middle, 0, columns * n * sizeof(float));
  for (int64_t q = 0; q < grid.columns; ++q)
    for (int64_t k = 0; k < across.count[q]; ++k)
      add_scaled(middle + (across.first[q] + k) * n, grad + q * dim, across.weight[q * across.width + k], n);
  for (int64_t k = 0; k < down.count[r]; ++k)
    add_scaled(sum + (down.first[r] + k) * columns * n, middle, down.weight[r * down.width + k], columns * n);
}
