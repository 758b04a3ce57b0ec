// One item of the backward pass: an image's gradients for one head. Included like product.h.

template <class Math, class T>
struct Backward {
  using Unit = typename Math::Unit;
  static constexpr int kRows = kLanes == 4 ? 4 : 6;
  static constexpr int64_t kChunk = 126;  // queries whose weights are kept at a time: they and their keys fit in L2

  const Problem<T>& p;
  const Piece& item;
  const int64_t dim = p.dim, depth = units<Math>(dim), width = ceil_div(depth, kLanes) * kLanes, keys = item.keys,
                key_units = units<Math>(keys), key_panels = ceil_div(keys, kLanes), dim_panels = ceil_div(dim, kLanes),
                row = key_panels * kLanes, columns = dim_panels * kLanes;
  const bool whole = item.queries <= kChunk;
  Unit *k_columns, *v_columns, *k_rows, *q_rows, *grad_rows, *query, *grad, *weights, *slopes, *slope_rows;
  float *scores, *products, *dk_sum, *dv_sum, *gradient;
  T* room;  // for rows that are turned
  float lse[kRows];
  HeadRows<T> q;  // of the chunk

  template <class Take>
  void lay_out(Take take) {
    const int64_t chunk_units = units<Math>(whole ? item.queries : kChunk);
    take(k_columns, row * depth), take(v_columns, row * depth), take(k_rows, columns * key_units);
    take(q_rows, columns * chunk_units), take(grad_rows, columns * chunk_units);
    take(query, kRows * width), take(grad, kRows * width);
    take(weights, chunk_units * row), take(slopes, chunk_units * row), take(slope_rows, kRows * row / Math::kPair);
    take(scores, kRows * row), take(products, kRows * row);
    take(dk_sum, whole ? 0 : keys * columns), take(dv_sum, whole ? 0 : keys * columns);
    const int64_t turned_rows = p.rotation.cos ? std::max(keys, whole ? item.queries : kChunk) : 0;
    take(room, turned_rows * dim), take(gradient, turned_rows ? kRows * columns : 0);
  }

  Backward(const Problem<T>& problem, const Piece& item, Arena& scratch) : p(problem), item(item) {
    int64_t bytes = 0;
    lay_out(
        [&](auto*& piece, int64_t count) { bytes += Arena::bytes<std::remove_reference_t<decltype(*piece)>>(count); });
    scratch.reserve(bytes);
    lay_out(
        [&](auto*& piece, int64_t count) { piece = scratch.take<std::remove_reference_t<decltype(*piece)>>(count); });
  }

  void run() {
    const int64_t head = item.head;
    const HeadRows<T> k = turned(p, p.k, item.first_key, head, keys, room);
    pack_columns<Math>(k.data, k.stride, keys, dim, k_columns);
    pack_rows<Math>(k.data, k.stride, keys, dim, k_rows);
    pack_columns<Math>(p.v.at(item.first_key, head), p.v.token, keys, dim, v_columns);
    for (int64_t chunk = 0; chunk < item.queries; chunk += kChunk) {
      const int64_t queries = item.queries - chunk < kChunk ? item.queries - chunk : kChunk;
      const int64_t token = item.first_query + chunk;
      q = turned(p, p.q, token, head, queries, room);
      pack_rows<Math>(q.data, q.stride, queries, dim, q_rows);
      pack_rows<Math>(p.grad.at(token, head), p.grad.token, queries, dim, grad_rows);
      for (int64_t first = 0; first < queries; first += kRows) {
        const int64_t count = queries - first < kRows ? queries - first : kRows;
        if (count > 4) {
          if constexpr (kRows > 4) rows<6>(token, first, count);
        } else if (count > 2) {
          rows<4>(token, first, count);
        } else {
          rows<2>(token, first, count);
        }
      }
      const bool begin = chunk == 0, end = chunk + queries == item.queries;
      columns_of(weights, grad_rows, units<Math>(queries), 1.f, p.dv, dv_sum, begin, end, false);
      columns_of(slopes, q_rows, units<Math>(queries), p.scale, p.dk, dk_sum, begin, end, p.rotation.cos);
    }
  }

  // `count` rows of queries, padded to R: their weights and slopes (gradients of the scores), and their dq.
  template <int R>
  __attribute__((noinline)) void rows(int64_t chunk, int64_t first, int64_t count) {
    const int64_t token = chunk + first, head = item.head, stride = row;
    copy_rows<Math>(q.data + first * q.stride, q.stride, count, R, dim, query);
    copy_rows<Math>(p.grad.at(token, head), p.grad.token, count, R, dim, grad);
    for (int r = 0; r < R; ++r) {
      lse[r] = r < count ? p.lse[(token + r) * p.heads + head] * kLog2E : INFINITY;  // a row of padding weighs nothing
    }
    float *s = scores, *t = products;
    product<Math, R, false>(query, width, k_columns, depth, key_panels,
                            [=](int r, int64_t j, Floats x) INLINE_LAMBDA { write(s + r * stride + j, x); });
    product<Math, R, false>(grad, width, v_columns, depth, key_panels,
                            [=](int r, int64_t j, Floats x) INLINE_LAMBDA { write(t + r * stride + j, x); });
    for (int r = 0; r < R && r < (count + Math::kPair - 1) / Math::kPair * Math::kPair; r += Math::kPair)
      slopes_of(r, (first + r) / Math::kPair);
    T* dq = p.dq.at(token, head);
    float* unturned = p.rotation.cos ? gradient : nullptr;
    const int64_t dq_stride = p.dq.token, n = dim, width_of_row = columns;
    const float scale = p.scale;
    product<Math, R, false>(slope_rows, row / Math::kPair, k_rows, key_units, dim_panels,
                            [=](int r, int64_t c, Floats x) INLINE_LAMBDA {
                              if (unturned)
                                write(unturned + r * width_of_row + c, x * scale);
                              else if (r < count)
                                store(dq + r * dq_stride + c, x * scale, n - c);
                            });
    if (unturned) turn_back(token, count, p.dq);
  }

  // Stores `count` rows of gradients of what was turned as gradients of what came.
  INLINE void turn_back(int64_t token, int64_t count, const Strided<T>& to) {
    for (int64_t r = 0; r < count; ++r)
      rotate_row<true>(p.rotation, token + r, item.head, gradient + r * columns, dim, to.at(token + r, item.head));
  }

  // Turns the scores of a row into weights. Returns their mean of the products: summing it here, not as out * grad,
  // makes the slopes of a row add up to zero as exactly as fp32 can.
  INLINE float weigh(int r) {
    const Floats factor = splat(p.scale * kLog2E), shift = splat(-lse[r]);
    float *s = scores + r * row, *t = products + r * row;
    Floats sum{};
    for (int64_t j = 0; j < row; j += kLanes) {
      Floats w = exp2<Math::kShortExp>(fma(load(s + j), factor, shift));
      if (keys - j < kLanes) w = keep(w, Part{keys - j});
      write(s + j, w);
      sum = fma(w, load(t + j), sum);
    }
    return total(sum);
  }

  // The weights and slopes of the rows of one unit, stored for the products that sum over queries.
  INLINE void slopes_of(int r, int64_t unit) {
    float delta[Math::kPair];
    for (int i = 0; i < Math::kPair; ++i) delta[i] = weigh(r + i);
    for (int64_t j = 0; j < row; j += kLanes) {
      Floats w[Math::kPair], d[Math::kPair];
      for (int i = 0; i < Math::kPair; ++i) {
        w[i] = load(scores + (r + i) * row + j);
        d[i] = w[i] * (load(products + (r + i) * row + j) - delta[i]);
        Math::store_row(slope_rows + (r + i) * row / Math::kPair, j, d[i]);
      }
#ifdef BFLOAT16_INSTRUCTIONS
      if constexpr (Math::kPair == 2) {
        write(weights + unit * row + j, Math::pair(narrow(w[0]), narrow(w[1])));
        write(slopes + unit * row + j, Math::pair(narrow(d[0]), narrow(d[1])));
        continue;
      }
#endif
      write(weights + unit * row + j, w[0]);
      write(slopes + unit * row + j, d[0]);
    }
  }

  // left^T (keys, queries) @ right (queries, dim), added to what earlier chunks left and, at the end, stored in y.
  void columns_of(const Unit* left, const Unit* right, int64_t query_units, float scale, const Strided<T>& y,
                  float* sum, bool begin, bool end, bool back) {
    for (int64_t blocks = ceil_div(keys, kRows), first = 0; blocks; --blocks) {
      const int64_t count = ceil_div(keys - first, blocks);
      auto block = [&](auto rows) {
        column_rows<decltype(rows)::value>(left, right, query_units, scale, y, sum, begin, end, back, first);
      };
      switch (count) {
        case 1:
          block(std::integral_constant<int, 1>());
          break;
        case 2:
          block(std::integral_constant<int, 2>());
          break;
        case 3:
          block(std::integral_constant<int, 3>());
          break;
        case 4:
          block(std::integral_constant<int, 4>());
          break;
        case 5:
          if constexpr (kRows > 4) block(std::integral_constant<int, 5>());
          break;
        case 6:
          if constexpr (kRows > 4) block(std::integral_constant<int, 6>());
          break;
      }
      first += count;
    }
  }

  template <int R>
  __attribute__((noinline)) void column_rows(const Unit* left, const Unit* right, int64_t query_units, float scale,
                                             const Strided<T>& y, float* sum, bool begin, bool end, bool back,
                                             int64_t first) {
    T* to = y.at(item.first_key + first, item.head);
    float* partial = sum + first * columns;
    float* unturned = back && end ? gradient : nullptr;
    const int64_t stride = y.token, n = dim, partial_stride = columns;
    product<Math, R, true>(left + first, row, right, query_units, dim_panels,
                           [=](int r, int64_t c, Floats x) INLINE_LAMBDA {
                             if (!begin) x += load(partial + r * partial_stride + c);
                             if (unturned)
                               write(unturned + r * partial_stride + c, x * scale);
                             else if (end)
                               store(to + r * stride + c, x * scale, n - c);
                             else
                               write(partial + r * partial_stride + c, x);
                           });
    if (unturned) turn_back(item.first_key + first, R, y);
  }
};

template <class T>
void backward_item(const Problem<T>& problem, const Piece& item) {
  static thread_local Arena scratch;
  Backward<MathOf<T>, T>(problem, item, scratch).run();
}
