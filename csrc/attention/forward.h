// One item of the forward pass. Included like product.h.

// Turns one row of scores into exp2((score - top) * factor), rounded for the product; returns the top and the sum.
template <class Math>
INLINE void softmax_row(const float* scores, typename Math::Unit* weights, int64_t keys, float factor, float* top,
                        float* sum) {
  const int64_t full = keys / kLanes * kLanes, rest = keys - full;
  Floats most = splat(-INFINITY);
  for (int64_t j = 0; j < full; j += kLanes) most = maximum(most, load(scores + j));
  if (rest) most = maximum(most, keep(load(scores + full), Part{rest}, -INFINITY));
  *top = largest(most);
  const Floats f = splat(factor), shift = splat(-*top * factor);
  Floats sums{};
  for (int64_t j = 0; j < full; j += kLanes) {
    const Floats p = exp2<Math::kShortExp>(fma(load(scores + j), f, shift));
    sums += p;
    Math::store_row(weights, j, p);
  }
  if (rest) {
    const Floats p = keep(exp2<Math::kShortExp>(fma(load(scores + full), f, shift)), Part{rest});
    sums += p;
    Math::store_row(weights, full, p);
  }
  *sum = total(sums);
}

template <class Math, class T>
struct Forward {
  using Unit = typename Math::Unit;
  static constexpr int kRows = kLanes == 4 ? 4 : 6;

  const Problem<T>& p;
  const Piece& item;
  const int64_t dim = p.dim, depth = units<Math>(dim), width = ceil_div(depth, kLanes) * kLanes, keys = item.keys,
                key_units = units<Math>(keys), key_panels = ceil_div(keys, kLanes), dim_panels = ceil_div(dim, kLanes),
                row = key_panels * kLanes;
  Unit *packed_k, *packed_v, *query, *weights;
  float* scores;
  T* room;  // for rows that are turned

  Forward(const Problem<T>& problem, const Piece& item, Arena& scratch) : p(problem), item(item) {
    const int64_t turned_rows = p.rotation.cos ? std::max<int64_t>(keys, kRows) : 0;
    scratch.reserve(Arena::bytes<T>(turned_rows * dim) + Arena::bytes<Unit>(row * depth) +
                    Arena::bytes<Unit>(dim_panels * kLanes * key_units) + Arena::bytes<Unit>(kRows * width) +
                    Arena::bytes<float>(kRows * row) * 2);
    packed_k = scratch.take<Unit>(row * depth);
    packed_v = scratch.take<Unit>(dim_panels * kLanes * key_units);
    query = scratch.take<Unit>(kRows * width);
    scores = scratch.take<float>(kRows * row);
    weights = scratch.take<Unit>(kRows * row / Math::kPair);
    room = scratch.take<T>(turned_rows * dim);
  }

  void run() {
    const HeadRows<T> k = turned(p, p.k, item.first_key, item.head, keys, room);
    pack_columns<Math>(k.data, k.stride, keys, dim, packed_k);
    pack_rows<Math>(p.v.at(item.first_key, item.head), p.v.token, keys, dim, packed_v);
    for (int64_t blocks = ceil_div(item.queries, kRows), first = 0; blocks; --blocks) {
      const int64_t count = ceil_div(item.queries - first, blocks);
      switch (count) {
        case 1:
          rows<1>(first);
          break;
        case 2:
          rows<2>(first);
          break;
        case 3:
          rows<3>(first);
          break;
        case 4:
          rows<4>(first);
          break;
        case 5:
          if constexpr (kRows > 4) rows<5>(first);
          break;
        case 6:
          if constexpr (kRows > 4) rows<6>(first);
          break;
      }
      first += count;
    }
  }

  template <int R>
  __attribute__((noinline)) void rows(int64_t first) {
    const int64_t token = item.first_query + first, stride = row, head = item.head;
    const HeadRows<T> q = turned(p, p.q, token, head, R, room);
    copy_rows<Math>(q.data, q.stride, R, R, dim, query);
    float* s = scores;
    product<Math, R, false>(query, width, packed_k, depth, key_panels,
                            [=](int r, int64_t j, Floats x) INLINE_LAMBDA { write(s + r * stride + j, x); });
    const float factor = p.scale * kLog2E;
    float inverse[R];
    for (int r = 0; r < R; ++r) {
      float top, sum;
      softmax_row<Math>(scores + r * row, weights + r * row / Math::kPair, keys, factor, &top, &sum);
      inverse[r] = 1 / sum;
      p.lse[(token + r) * p.heads + head] = top * p.scale + std::log(sum);
    }
    T* y = p.y.at(token, head);
    const int64_t y_stride = p.y.token, columns = dim;
    product<Math, R, false>(weights, row / Math::kPair, packed_v, key_units, dim_panels,
                            [=, &inverse](int r, int64_t c, Floats x)
                                INLINE_LAMBDA { store(y + r * y_stride + c, x * inverse[r], columns - c); });
  }
};

template <class T>
void forward_item(const Problem<T>& problem, const Piece& item) {
  static thread_local Arena scratch;
  Forward<MathOf<T>, T>(problem, item, scratch).run();
}
