// Pooling of some columns of one image, forward and backward. No include guard: compiled once per instruction set.

inline Floats larger(Floats v, Floats than) { return ((v > than) | (v != v)) ? v : than; }  // NaN stays, as in amax

constexpr int64_t kRowsPerSum = 32;

// The rows of x pooled, kVectors vectors of columns at a time.
template <class X, int kVectors, class N>
inline void pool_vectors(const PoolArguments& a, int64_t begin, int64_t end, int64_t image, int64_t column, N n) {
  const X* x = static_cast<const X*>(a.x) + column;
  X* y = static_cast<X*>(a.y) + image * a.dim + column;
  Floats sum[kVectors] = {}, most[kVectors] = {};
  if (begin < end)
    for (int v = 0; v < kVectors; ++v) most[v] = load(x + begin * a.stride + v * kLanes, n);
  for (int64_t first = begin; first < end; first += kRowsPerSum) {  // a sum of sums: rounding grows with both, not with
    Floats some[kVectors] = {};                                     // their product
    for (int64_t row = first; row < std::min(end, first + kRowsPerSum); ++row)
      for (int v = 0; v < kVectors; ++v) {
        const Floats value = load(x + row * a.stride + v * kLanes, n);
        some[v] += value;
        most[v] = larger(value, most[v]);
      }
    for (int v = 0; v < kVectors; ++v) sum[v] += some[v];
  }
  const float count = end > begin ? end - begin : 1;
  for (int v = 0; v < kVectors; ++v) {
    const Floats mean = sum[v] / count;
    const Floats pooled = a.average ? a.maximum ? 0.5f * (most[v] + mean) : mean : most[v];
    store(y + v * kLanes, pooled, n);
  }
}

// Every row of the image is written, those outside begin..end with zeros.
template <class X, int kVectors, class N>
inline void spread_vectors(const PoolArguments& a, int64_t begin, int64_t end, int64_t image, int64_t column, N n) {
  const X* x = static_cast<const X*>(a.x) + column;
  const X* grad = static_cast<const X*>(a.grad) + image * a.dim + column;
  X* dx = static_cast<X*>(a.y) + column;
  Floats most[kVectors] = {}, ties[kVectors] = {}, share[kVectors], even[kVectors];
  if (a.maximum && begin < end) {
    for (int v = 0; v < kVectors; ++v) most[v] = load(x + begin * a.stride + v * kLanes, n);
    for (int64_t row = begin; row < end; ++row)
      for (int v = 0; v < kVectors; ++v) {
        const Floats value = load(x + row * a.stride + v * kLanes, n), before = most[v];
        most[v] = larger(value, before);
        ties[v] = (value == most[v]) ? (most[v] == before ? ties[v] + 1.f : Floats{} + 1.f) : ties[v];
      }
  }
  const float count = end > begin ? end - begin : 1;
  for (int v = 0; v < kVectors; ++v) {
    const Floats own = load(grad + v * kLanes, n) * (a.average && a.maximum ? 0.5f : 1.f);
    even[v] = a.average ? own / count : Floats{};
    share[v] = own / ties[v];
  }
  for (int64_t row = begin; row < end; ++row)
    for (int v = 0; v < kVectors; ++v) {
      Floats out = even[v];
      if (a.maximum) out += load(x + row * a.stride + v * kLanes, n) == most[v] ? share[v] : Floats{};
      store(dx + row * a.dim + v * kLanes, out, n);
    }
}

// kBackward: spread the gradient; otherwise pool.
template <class X, bool kBackward>
inline void image_columns(const PoolArguments& a, int64_t image, int64_t first, int64_t last) {
  int64_t begin, end;
  pooled_rows(a, image, &begin, &end);
  auto some = [&](int64_t column, auto vectors, auto n) {
    if constexpr (kBackward)
      spread_vectors<X, vectors>(a, begin, end, image, column, n);
    else
      pool_vectors<X, vectors>(a, begin, end, image, column, n);
  };
  int64_t i = first;
  for (; i + 4 * kLanes <= last; i += 4 * kLanes) some(i, std::integral_constant<int, 4>{}, Full{});
  for (; i + kLanes <= last; i += kLanes) some(i, std::integral_constant<int, 1>{}, Full{});
  if (i < last) some(i, std::integral_constant<int, 1>{}, Part{last - i});
}

inline void pool_columns(const PoolArguments& a, int64_t image, int64_t first, int64_t last) {
  a.x_is_bf16 ? image_columns<Bfloat16, false>(a, image, first, last)
              : image_columns<float, false>(a, image, first, last);
}

inline void spread_columns(const PoolArguments& a, int64_t image, int64_t first, int64_t last) {
  a.x_is_bf16 ? image_columns<Bfloat16, true>(a, image, first, last)
              : image_columns<float, true>(a, image, first, last);
}
