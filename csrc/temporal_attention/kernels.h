// Attention among the few tokens of a sequence, many sequences side by side: each lane of a vector has one of its own,
// so that no lane's numbers meet another's. No include guard: compiled once for each instruction set.

inline int64_t lanes() { return kLanes; }

// The row in frame 0, and the head, of each lane.
struct Lanes {
  int64_t token[LANES], head[LANES], count, stride, frames;

  Lanes(const Item& item, int64_t heads) : count(item.count), stride(item.clip.stride), frames(item.clip.frames) {
    for (int64_t l = 0; l < count; ++l) {
      token[l] = item.clip.first + (item.begin + l) / heads;
      head[l] = (item.begin + l) % heads;
    }
  }
};

// Rows of one tensor, for the lanes: where each lane's head begins in frame 0.
template <class T>
struct Rows {
  T* at[LANES];
  int64_t frame;  // from frame to frame

  Rows(const Strided<T>& x, const Lanes& own) : frame(own.stride * x.token) {
    for (int64_t l = 0; l < LANES; ++l) at[l] = x.at(own.token[l < own.count ? l : 0], own.head[l < own.count ? l : 0]);
  }
};

// Columns that are gathered at a time: as many as 32 bits of each lane hold of.
template <class T>
constexpr int64_t kColumns = LANES * 4 / sizeof(T);
template <class T>
constexpr int64_t kBlock = kColumns<T> * LANES;  // numbers of so many columns of a frame

INLINE void widen_columns(Words (&v)[LANES], float*, float* to) {
#pragma GCC unroll 16
  for (int d = 0; d < LANES; ++d) write(to + d * LANES, v[d]);
}
INLINE void widen_columns(Words (&v)[LANES], Bfloat16*, float* to) {
#pragma GCC unroll 16
  for (int d = 0; d < LANES; ++d) {
    write(to + 2 * d * LANES, v[d] << 16);
    write(to + (2 * d + 1) * LANES, v[d] & 0xffff0000);
  }
}

// Some columns of the rows in one frame: to (columns, lanes); zeros past the last column. Lanes that are none have the
// first one's.
template <class T>
INLINE void gather(const Rows<const T>& x, int64_t frame, int64_t column, int64_t dim, float* to) {
  Words v[LANES];
  const int64_t at = frame * x.frame + column;
  if (column + kColumns<T> <= dim) {
#pragma GCC unroll 16
    for (int l = 0; l < LANES; ++l) v[l] = read<Words>(x.at[l] + at);
  } else {
    for (int l = 0; l < LANES; ++l) {
      v[l] = Words{};
      std::memcpy(&v[l], x.at[l] + at, (dim - column) * sizeof(T));
    }
  }
  transpose(v);
  widen_columns(v, static_cast<T*>(nullptr), to);
}

// LANES columns.
template <class T>
INLINE void scatter(Floats (&v)[LANES], const Rows<T>& y, int64_t count, int64_t frame, int64_t column, int64_t dim) {
  const int64_t at = frame * y.frame + column, rest = dim - column;
  transpose(v);
  if (count == LANES && rest >= LANES) {
#pragma GCC unroll 16
    for (int l = 0; l < LANES; ++l) store(y.at[l] + at, v[l], Full{});
    return;
  }
  for (int64_t l = 0; l < count; ++l) store(y.at[l] + at, v[l], rest);
}

// m[i, j] += the products of some columns of R frames of a from i on, and of C frames of b from j on.
template <class T, int R, int C>
INLINE void add_products(const float* a, const float* b, float* m, int64_t frames) {
  Floats sums[R][C];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) sums[r][c] = load(m + (r * frames + c) * LANES);
  for (int64_t d = 0; d < kBlock<T>; d += LANES) {
    Floats right[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) right[c] = load(b + c * kBlock<T> + d);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Floats left = load(a + r * kBlock<T> + d);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) sums[r][c] = fma(left, right[c], sums[r][c]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) write(m + (r * frames + c) * LANES, sums[r][c]);
}

// m (frames, frames, lanes) = x y^T. a, b: room for the columns of all frames
template <class T>
inline void products(const Strided<const T>& x, const Strided<const T>& y, const Lanes& own, int64_t dim, float* a,
                     float* b, float* m) {
  const int64_t frames = own.frames;
  const Rows<const T> left_rows(x, own), right_rows(y, own);
  std::memset(m, 0, frames * frames * LANES * sizeof(float));
  for (int64_t column = 0; column < dim; column += kColumns<T>) {
    for (int64_t f = 0; f < frames; ++f) {
      gather(left_rows, f, column, dim, a + f * kBlock<T>);
      gather(right_rows, f, column, dim, b + f * kBlock<T>);
    }
    for (int64_t i = 0; i < frames;) {
      const bool tall = i + 4 <= frames;
      for (int64_t j = 0; j < frames;) {
        const bool wide = j + 4 <= frames;
        const float *left = a + i * kBlock<T>, *right = b + j * kBlock<T>;
        float* to = m + (i * frames + j) * LANES;
        if (tall && wide)
          add_products<T, 4, 4>(left, right, to, frames);
        else if (tall)
          add_products<T, 4, 1>(left, right, to, frames);
        else if (wide)
          add_products<T, 1, 4>(left, right, to, frames);
        else
          add_products<T, 1, 1>(left, right, to, frames);
        j += wide ? 4 : 1;
      }
      i += tall ? 4 : 1;
    }
  }
}

// y_i = factor_i * the sum over j of m[i, j] x_j, or with kTurned of m[j, i] x_j. factor: (frames, lanes), null for
// ones
template <bool kTurned, class T>
inline void mix(const float* m, const Strided<const T>& x, const float* factor, const Strided<T>& y, const Lanes& own,
                int64_t dim, float* b) {
  const int64_t frames = own.frames;
  const int64_t along = kTurned ? frames * LANES : LANES, across = kTurned ? LANES : frames * LANES;
  const Rows<const T> from(x, own);
  const Rows<T> to(y, own);
  for (int64_t column = 0; column < dim; column += kColumns<T>) {
    for (int64_t f = 0; f < frames; ++f) gather(from, f, column, dim, b + f * kBlock<T>);
    for (int64_t i = 0; i < frames; ++i)
      for (int64_t part = 0; part < kColumns<T> && column + part < dim; part += LANES) {
        Floats sums[LANES] = {};
        for (int64_t j = 0; j < frames; ++j) {
          const Floats weight = load(m + i * across + j * along);
          const float* right = b + j * kBlock<T> + part * LANES;
#pragma GCC unroll 16
          for (int d = 0; d < LANES; ++d) sums[d] = fma(weight, load(right + d * LANES), sums[d]);
        }
        if (factor) {
          const Floats scale = load(factor + i * LANES);
#pragma GCC unroll 16
          for (int d = 0; d < LANES; ++d) sums[d] *= scale;
        }
        scatter(sums, to, own.count, i, column + part, dim);
      }
  }
}

// Scores to weights before they are divided by their sum: the largest is 1. Returns the largest score, and the sum.
template <bool kShort>
INLINE void softmax(float* m, int64_t frames, float factor, Floats* top, Floats* sum) {
  Floats most = load(m);
  for (int64_t j = 1; j < frames; ++j) most = maximum(most, load(m + j * LANES));
  const Floats f = splat(factor), shift = -(most * f);
  Floats sums{};
  for (int64_t j = 0; j < frames; ++j) {
    const Floats p = exp2<kShort>(fma(load(m + j * LANES), f, shift));
    write(m + j * LANES, p);
    sums += p;
  }
  *top = most, *sum = sums;
}

template <class T>
constexpr bool kShortExp = !std::is_same<T, float>::value;  // for results that will be rounded to bf16

template <class T>
inline void forward_item(const Problem<T>& p, const Item& item) {
  static thread_local Arena memory;
  const Lanes own(item, p.heads);
  const int64_t frames = own.frames;
  memory.reserve(2 * Arena::bytes<float>(frames * kBlock<T>) + Arena::bytes<float>(frames * frames * LANES) +
                 Arena::bytes<float>(frames * LANES));
  float *a = memory.take<float>(frames * kBlock<T>), *b = memory.take<float>(frames * kBlock<T>);
  float *m = memory.take<float>(frames * frames * LANES), *inverse = memory.take<float>(frames * LANES);
  products(p.q, p.k, own, p.dim, a, b, m);
  for (int64_t i = 0; i < frames; ++i) {
    Floats top, sum;
    softmax<kShortExp<T>>(m + i * frames * LANES, frames, p.scale * kLog2E, &top, &sum);
    write(inverse + i * LANES, 1.f / sum);
    for (int64_t l = 0; l < own.count; ++l)
      p.lse[(own.token[l] + i * own.stride) * p.heads + own.head[l]] = top[l] * p.scale + std::log(sum[l]);
  }
  mix<false>(m, p.v, inverse, p.y, own, p.dim, b);
}

template <class T>
inline void backward_item(const Problem<T>& p, const Item& item) {
  static thread_local Arena memory;
  const Lanes own(item, p.heads);
  const int64_t frames = own.frames, size = frames * frames * LANES;
  memory.reserve(2 * Arena::bytes<float>(frames * kBlock<T>) + 2 * Arena::bytes<float>(size) +
                 Arena::bytes<float>(frames * LANES));
  float *a = memory.take<float>(frames * kBlock<T>), *b = memory.take<float>(frames * kBlock<T>);
  float *weights = memory.take<float>(size), *slopes = memory.take<float>(size);
  float* scales = memory.take<float>(frames * LANES);
  products(p.q, p.k, own, p.dim, a, b, weights);
  products(p.grad, p.v, own, p.dim, a, b, slopes);
  for (int64_t i = 0; i < frames; ++i) {
    float *w = weights + i * frames * LANES, *s = slopes + i * frames * LANES;
    Floats top, sum, delta{};
    softmax<kShortExp<T>>(w, frames, p.scale * kLog2E, &top, &sum);
    const Floats inverse = 1.f / sum;
    for (int64_t j = 0; j < frames * LANES; j += LANES) {
      const Floats weight = load(w + j) * inverse;
      write(w + j, weight);
      delta = fma(weight, load(s + j), delta);
    }
    for (int64_t j = 0; j < frames * LANES; j += LANES) write(s + j, load(w + j) * (load(s + j) - delta));
    write(scales + i * LANES, splat(p.scale));
  }
  mix<false>(slopes, p.k, scales, p.dq, own, p.dim, b);
  mix<true>(slopes, p.q, scales, p.dk, own, p.dim, b);
  mix<true>(weights, p.grad, nullptr, p.dv, own, p.dim, b);
}
