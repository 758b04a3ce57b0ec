// Matrix products of small operands: the right one packed, the left one in rows or across. No include guard: compiled
// once per instruction set.

// A unit is what one lane multiplies at a time: here a float, whatever the tensors' dtype.
struct FloatMath {
  using Unit = float;
  using Units = Floats;
  static constexpr int kPair = 1;
  static constexpr bool kShortExp = false;
  static INLINE Units broadcast(const Unit* p) { return splat(*p); }
  static INLINE Floats madd(Units a, Units b, Floats c) { return fma(a, b, c); }
  template <class T>
  static INLINE Units load_units(const T* p, int64_t count) {
    return load(p, count);
  }
  // Row `first` of an operand whose rows are summed over.
  template <class T>
  static INLINE Units load_rows(const T* first, const T*, int64_t count) {
    return load(first, count);
  }
  // One row of the left operand.
  static INLINE void store_row(Unit* p, int64_t lane, Floats v) { write(p + lane, v); }
};

#ifdef BFLOAT16_INSTRUCTIONS
// A unit is a pair of bf16, multiplied and added in fp32 by one instruction.
struct PairMath {
  using Unit = uint32_t;
  using Units = __m512i;
  static constexpr int kPair = 2;
  static constexpr bool kShortExp = true;
  static INLINE Units broadcast(const Unit* p) { return _mm512_set1_epi32(static_cast<int>(*p)); }
  static INLINE Floats madd(Units a, Units b, Floats c) {
    return (Floats)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
  }
  static INLINE Units load_units(const Bfloat16* p, int64_t count) {
    if (count >= 32) return _mm512_loadu_si512(p);
    return _mm512_maskz_loadu_epi16((1u << count) - 1, p);
  }
  static INLINE Units pair(Halves first, Halves second) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32((__m256i)first),
                           _mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)second), 16));
  }
  static INLINE Units load_rows(const Bfloat16* first, const Bfloat16* second, int64_t count) {
    return pair(load_halves(first, count), second ? load_halves(second, count) : Halves{});
  }
  static INLINE void store_row(Unit* p, int64_t lane, Floats v) {
    write(reinterpret_cast<uint16_t*>(p) + lane, narrow(v));
  }
};
template <class T>
using MathOf = std::conditional_t<std::is_same_v<T, Bfloat16>, PairMath, FloatMath>;
#else
template <class T>
using MathOf = FloatMath;
#endif

template <class Math>
INLINE int64_t units(int64_t elements) {
  return ceil_div(elements, Math::kPair);
}

// Asks for the row that the next head will read: heads of a token lie side by side, tokens far apart.
template <class T>
INLINE void expect(const T* next, int64_t dim) {
  for (int64_t c = 0; c < dim; c += 64 / sizeof(T)) __builtin_prefetch(next + c);
}

// Packs rows (rows, dim) as the right operand whose columns they are: [panel of kLanes rows][units of dim][kLanes].
template <class Math, class T>
void pack_columns(const T* x, int64_t stride, int64_t rows, int64_t dim, typename Math::Unit* packed) {
  const int64_t depth = units<Math>(dim);
  for (int64_t row = 0; row < rows; ++row) expect(x + row * stride + dim, dim);
  for (int64_t row = 0; row < rows; row += kLanes, packed += depth * kLanes)
    for (int64_t first = 0; first < depth; first += kLanes) {
      Ints v[kLanes];
      const int64_t count = dim - first * Math::kPair;
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i)
        v[i] = row + i < rows ? (Ints)Math::load_units(x + (row + i) * stride + first * Math::kPair, count) : Ints{};
      transpose(v);
      if (depth - first >= kLanes) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) write(packed + (first + i) * kLanes, v[i]);
      } else {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i)
          if (i < depth - first) write(packed + (first + i) * kLanes, v[i]);
      }
    }
}

// Packs rows (rows, dim) as the right operand whose rows they are: [panel of kLanes of dim][units of rows][kLanes].
template <class Math, class T>
void pack_rows(const T* x, int64_t stride, int64_t rows, int64_t dim, typename Math::Unit* packed) {
  const int64_t depth = units<Math>(rows);
  for (int64_t j = 0; j < depth; ++j) {
    const T* first = x + j * Math::kPair * stride;
    const T* second = j * Math::kPair + 1 < rows ? first + stride : nullptr;
    expect(first + dim, dim);
    if (second) expect(second + dim, dim);
    for (int64_t c = 0; c < dim; c += kLanes)
      write(packed + (c * depth + j * kLanes), Math::load_rows(first + c, second ? second + c : second, dim - c));
  }
}

// Copies rows (rows, dim) as the left operand: (kRows, units of dim), zeros beyond `rows`.
template <class Math, class T>
INLINE void copy_rows(const T* x, int64_t stride, int64_t rows, int64_t padded, int64_t dim,
                      typename Math::Unit* copied) {
  const int64_t width = ceil_div(units<Math>(dim), kLanes) * kLanes;
  for (int64_t r = 0; r < rows; ++r) expect(x + r * stride + dim, dim);
  for (int64_t r = 0; r < padded; ++r)
    for (int64_t u = 0; u < width; u += kLanes)
      write(copied + r * width + u, r < rows ? Math::load_units(x + r * stride + u * Math::kPair, dim - u * Math::kPair)
                                             : typename Math::Units{});
}

// R rows by C panels, in registers. The left operand is at a[row * stride + unit], or a[unit * stride + row] if it
// lies across. What one row becomes depends on neither R nor C.
template <class Math, int R, int C, bool kAcross, class Epilogue>
INLINE void tile(const typename Math::Unit* a, int64_t stride, const typename Math::Unit* b, int64_t depth,
                 int64_t panel, Epilogue epilogue) {
  Floats sum[R][C] = {};
  b += panel * depth * kLanes;
  for (int64_t k = 0; k < depth; ++k) {
    typename Math::Units y[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) y[c] = read<typename Math::Units>(b + (c * depth + k) * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const typename Math::Units x = Math::broadcast(kAcross ? a + k * stride + r : a + r * stride + k);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) sum[r][c] = Math::madd(x, y[c], sum[r][c]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) epilogue(r, (panel + c) * kLanes, sum[r][c]);
}

// R rows by all panels, in tiles of nearly equal width, so that no tile has too few sums to hide the latency.
template <class Math, int R, bool kAcross, class Epilogue>
INLINE void product(const typename Math::Unit* a, int64_t stride, const typename Math::Unit* b, int64_t depth,
                    int64_t panels, Epilogue epilogue) {
  constexpr int kWidest = kLanes == 16 ? 4 : 2;
  for (int64_t tiles = ceil_div(panels, kWidest), panel = 0; tiles; --tiles) {
    const int64_t width = ceil_div(panels - panel, tiles);
    if (width == 1)
      tile<Math, R, 1, kAcross>(a, stride, b, depth, panel, epilogue);
    else if (width == 2)
      tile<Math, R, 2, kAcross>(a, stride, b, depth, panel, epilogue);
    else if constexpr (kWidest == 4) {
      if (width == 3)
        tile<Math, R, 3, kAcross>(a, stride, b, depth, panel, epilogue);
      else
        tile<Math, R, 4, kAcross>(a, stride, b, depth, panel, epilogue);
    }
    panel += width;
  }
}
