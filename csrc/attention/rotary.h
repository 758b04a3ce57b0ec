// Queries and keys turned by their positions' angles, before they are packed; gradients turned back. Included like
// product.h.

template <size_t... I>
INLINE Floats even(Floats a, Floats b, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, (2 * I)...);
}
template <size_t... I>
INLINE Floats odd(Floats a, Floats b, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, (2 * I + 1)...);
}

// y = the row x of one head, turned by the angles of its token, or back by them, and rounded to the type of y.
template <bool kBack, class Y, class X>
INLINE void rotate_row(const Rotation& r, int64_t token, int64_t head, const X* x, int64_t dim, Y* y) {
  constexpr auto kAll = std::make_index_sequence<kLanes>();
  const int64_t row = r.row[token], pairs = row < 0 ? 0 : r.pairs;
  const int64_t at = row < 0 ? 0 : row * r.position + head * r.head;
  const float *cos = r.cos + at, *sin = r.sin + at;
  for (int64_t i = 0; i < pairs; i += kLanes) {
    const int64_t count = pairs - i < kLanes ? pairs - i : kLanes;
    const Floats c = load(cos + i, count), s = kBack ? -load(sin + i, count) : load(sin + i, count);
    if (r.half) {
      const Floats a = load(x + i, count), b = load(x + pairs + i, count);
      store(y + i, fma(-b, s, a * c), count);
      store(y + pairs + i, fma(a, s, b * c), count);
    } else {
      const int64_t left = 2 * count < kLanes ? 2 * count : kLanes, right = 2 * count - left;
      const Floats first = load(x + 2 * i, left), second = load(x + 2 * i + kLanes, right);
      const Floats a = even(first, second, kAll), b = odd(first, second, kAll);
      const Floats turned = fma(-b, s, a * c), partner = fma(a, s, b * c);
      store(y + 2 * i, low_halves(turned, partner, kAll), left);
      store(y + 2 * i + kLanes, high_halves(turned, partner, kAll), right);
    }
  }
  copy(y + 2 * pairs, x + 2 * pairs, dim - 2 * pairs);
}

template <class T>
struct HeadRows {
  const T* data;
  int64_t stride;
};

// Rows of one head from token `first` on: as they lie there, or turned, in `room` for (count, dim).
template <class T>
HeadRows<T> turned(const Problem<T>& p, const Strided<const T>& x, int64_t first, int64_t head, int64_t count,
                   T* room) {
  if (!p.rotation.cos) return {x.at(first, head), x.token};
  for (int64_t t = 0; t < count; ++t) {
    expect(x.at(first + t, head) + p.dim, p.dim);
    rotate_row<false>(p.rotation, first + t, head, x.at(first + t, head), p.dim, room + t * p.dim);
  }
  return {room, p.dim};
}
