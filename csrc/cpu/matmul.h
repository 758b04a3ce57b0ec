// x W^T, row tiles against panels. No include guard: compiled once per instruction set.
//
// W^T is cut into panels of kVectors vectors of columns. A panel holds, for each step of kDepth inputs, the weights of
// its columns side by side, so that a tile of kRows rows and one panel is kept in registers over all inputs: each
// output is added up in one order, whatever rows stand beside it.

template <class To>
inline To convert(float x) {
  if constexpr (std::is_same_v<To, float>) return x;
  To y;
  store(&y, splat(x), Part{1});
  return y;
}
template <class To>
inline To convert(Bfloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return convert<To>(y);
}

#if LANES == 16
constexpr int kRows = 8, kVectors = 3;  // 24 sums, 3 weights, and a number of x that is a memory operand
#else
constexpr int kRows = 6, kVectors = 2;  // of 16 registers
#endif

// fp32
struct Singles {
  using Unit = float;
  using Number = float;
  using Sum = Floats;
  static constexpr int64_t kDepth = 1;
  static Floats right(const Unit* p) { return load(p, Full{}); }
  static Floats left(const Unit* p) { return splat(*p); }
  static Floats step(Floats sum, Floats right, Floats left) { return fma(right, left, sum); }
};

#ifdef BFLOAT16_INSTRUCTIONS

// bf16, two inputs at a time
struct Pairs {
  using Unit = Bfloat16;
  using Number = float;
  using Sum = __m512;
  static constexpr int64_t kDepth = 2;
  static __m512bh right(const Unit* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static __m512bh left(const Unit* p) {
    int32_t pair;
    std::memcpy(&pair, p, 4);
    return (__m512bh)_mm512_set1_epi32(pair);
  }
  static __m512 step(__m512 sum, __m512bh right, __m512bh left) { return _mm512_dpbf16_ps(sum, right, left); }
};

// Activations 0 to 255, weights -127 to 127, four inputs at a time; exact.
struct Quads {
  using Unit = uint8_t;
  using Number = int32_t;
  using Sum = __m512i;
  static constexpr int64_t kDepth = 4;
  static __m512i right(const Unit* p) { return _mm512_loadu_si512(p); }
  static __m512i left(const Unit* p) {
    int32_t four;
    std::memcpy(&four, p, 4);
    return _mm512_set1_epi32(four);
  }
  static __m512i step(__m512i sum, __m512i right, __m512i left) { return _mm512_dpbusd_epi32(sum, left, right); }
};

#endif

// R rows of x times one panel of V vectors. stride: units from row to row of x; sums: (R, V * kLanes).
// ahead: what is needed next, fetched a line per step.
template <class Math, int R, int V>
__attribute__((noinline)) void tile(const typename Math::Unit* x, int64_t stride, const typename Math::Unit* panel,
                                    int64_t steps, const char* ahead, typename Math::Number* sums) {
  typename Math::Sum sum[R][V] = {};
  for (int64_t k = 0; k < steps; ++k) {
    decltype(Math::right(panel)) right[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) right[v] = Math::right(panel + (k * V + v) * kLanes * Math::kDepth);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const auto left = Math::left(x + r * stride + k * Math::kDepth);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[r][v] = Math::step(sum[r][v], right[v], left);
    }
    __builtin_prefetch(ahead + k * 64, 0, 2);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) std::memcpy(sums + (r * V + v) * kLanes, &sum[r][v], sizeof(sum[r][v]));
}

template <class Math>
using Tile = void (*)(const typename Math::Unit*, int64_t, const typename Math::Unit*, int64_t, const char*,
                      typename Math::Number*);

template <class Math, int V>
constexpr Tile<Math> tile_of(int64_t rows) {
  switch (rows) {
    case 1:
      return tile<Math, 1, V>;
    case 2:
      return tile<Math, 2, V>;
    case 3:
      return tile<Math, 3, V>;
    case 4:
      return tile<Math, 4, V>;
    case 5:
      return tile<Math, 5, V>;
#if LANES == 16
    case 7:
      return tile<Math, 7, V>;
    case 8:
      return tile<Math, 8, V>;
#endif
    default:
      return tile<Math, 6, V>;
  }
}

template <class Math>
Tile<Math> tile_of(int64_t rows, int64_t vectors) {
#if LANES == 16
  if (vectors == 3) return tile_of<Math, 3>(rows);
#endif
  return vectors == 2 ? tile_of<Math, 2>(rows) : tile_of<Math, 1>(rows);
}

// soon(first, rows, column), then done(first, rows, column, vectors, sums) for each tile of x W^T, of kWidth columns or
// the rest. x: from row 0 on; sums: (rows, vectors * kLanes). What `soon` prefetches has a tile's time to come.
// columns: from a panel's first to a panel's last; next: the panel that will be read after these.
constexpr int64_t kWidth = kVectors * kLanes;

// How many steps are added up in one row: of fp32 no more, or the rounding of long sums shows.
template <class Math>
constexpr int64_t kMostSteps = std::is_same_v<Math, Singles> ? 512 : INT64_MAX / 2;

template <class Math, class G, class F>
inline void product(const Linear& weight, const typename Math::Unit* x, Span rows, Span columns, const char* next,
                    G soon, F done) {
  alignas(64) typename Math::Number sums[kRows * kWidth];
  const int64_t tiles = (rows.size() + kRows - 1) / kRows, steps = weight.in / Math::kDepth;
  const auto* panels = reinterpret_cast<const typename Math::Unit*>(weight.panels);
  for (int64_t column = columns.begin; column < columns.end; column += kWidth) {
    const int64_t vectors = std::min<int64_t>(kVectors, (columns.end - column + kLanes - 1) / kLanes);
    const auto* panel = panels + column * weight.in;
    const char* then = column + kWidth < columns.end ? reinterpret_cast<const char*>(panel + kWidth * weight.in) : next;
    for (int64_t t = 0; t < tiles; ++t) {
      const Span part = rows.part(t, tiles);
      const char* ahead = then + std::min<int64_t>(t, kVectors) * steps * 64;
      soon(part.begin, part.size(), column);
      const auto* rows_of_x = x + part.begin * weight.in;
      const auto multiply = tile_of<Math>(part.size(), vectors);
      multiply(rows_of_x, weight.in, panel, std::min(steps, kMostSteps<Math>), ahead, sums);
      for (int64_t k = kMostSteps<Math>; k < steps; k += kMostSteps<Math>) {
        alignas(64) typename Math::Number more[kRows * kWidth];
        multiply(rows_of_x + k * Math::kDepth, weight.in, panel + k * vectors * kLanes * Math::kDepth,
                 std::min(steps - k, kMostSteps<Math>), ahead + k * 64, more);
        for (int64_t i = 0; i < part.size() * vectors * kLanes; ++i) sums[i] += more[i];
      }
      done(part.begin, part.size(), column, vectors, sums);
    }
  }
}

// weight(n, k): of output n and input k, as it is kept
template <class Math, class F>
inline void pack(const Linear& to, Span columns, F weight) {
  auto* panels = reinterpret_cast<typename Math::Unit*>(to.panels);
  constexpr int64_t kDepth = Math::kDepth;
  for (int64_t column = columns.begin; column < columns.end; column += kWidth) {
    const int64_t width = std::min<int64_t>(kWidth, (to.out - column + kLanes - 1) / kLanes * kLanes);
    auto* panel = panels + column * to.in;
    for (int64_t n = 0; n < width; ++n)
      for (int64_t k = 0; k < to.in; ++k)
        panel[(k / kDepth * width + n) * kDepth + k % kDepth] =
            column + n < to.out ? weight(column + n, k) : typename Math::Unit{};
  }
}

// The same where the weight (out, in) is kept as it is, and a step of the product takes 4 bytes of it: a transpose of
// words, a square of registers at a time.
template <class Math>
inline void pack_words(const void* weight, const Linear& to, Span columns) {
  static_assert(sizeof(typename Math::Unit) * Math::kDepth == sizeof(float));
  const int64_t words = to.in / Math::kDepth;
  const auto* rows = static_cast<const float*>(weight);
  auto* panels = reinterpret_cast<float*>(to.panels);
  for (int64_t column = columns.begin; column < columns.end; column += kWidth) {
    const int64_t width = std::min<int64_t>(kWidth, (to.out - column + kLanes - 1) / kLanes * kLanes);
    float* panel = panels + column * words;
    for (int64_t left = 0; left < width; left += kLanes) {
      for (int64_t first = 0; first < words; first += kLanes) {  // along few rows, as fetching ahead wants it
        const int64_t count = std::min<int64_t>(kLanes, words - first);
        const float* corner = rows + (column + left) * words + first;
        Floats square[kLanes];
        for (int64_t n = 0; n < kLanes; ++n) {
          if (column + left + n >= to.out)
            square[n] = Floats{};
          else
            square[n] = count == kLanes ? load(corner + n * words, Full{}) : load(corner + n * words, Part{count});
          __builtin_prefetch(corner + (kLanes + n) * words, 0, 2);  // of the rows after these
        }
        transpose(square);
        for (int64_t i = 0; i < count; ++i) store(panel + (first + i) * width + left, square[i], Full{});
      }
    }
  }
}

#ifdef BFLOAT16_INSTRUCTIONS
// Each output's weights in steps of a 127th of the largest; a step that is NaN where one of them is not finite.
template <class From>
inline void pack_int8(const From* weight, const Linear& to, Span columns) {
  for (int64_t n = columns.begin; n < columns.end; ++n) {
    float most = 0, not_finite = 0;
    for (int64_t k = 0; k < to.in; ++k) {
      const float w = convert<float>(weight[n * to.in + k]);
      most = std::max(most, std::fabs(w));
      not_finite += w * 0;
    }
    to.scale[n] = most / 127 + not_finite;
    to.sums[n] = 0;
  }
  pack<Quads>(to, columns, [&](int64_t n, int64_t k) {
    const float step = to.scale[n];
    const bool divides = step >= std::numeric_limits<float>::min();
    const auto w = static_cast<int8_t>(divides ? std::lrint(convert<float>(weight[n * to.in + k]) / step) : 0);
    to.sums[n] += w;
    return static_cast<uint8_t>(w);
  });
}
#endif

// f(Math, T) for the kind of weights and the type of activations, as null pointers.
template <class F>
inline auto with_types(Kind kind, bool is_bf16, F f) {
#ifdef BFLOAT16_INSTRUCTIONS
  if (kind == Kind::kInt8)
    return is_bf16 ? f((Quads*)nullptr, (Bfloat16*)nullptr) : f((Quads*)nullptr, (float*)nullptr);
  if (is_bf16) return f((Pairs*)nullptr, (Bfloat16*)nullptr);
#endif
  return is_bf16 ? f((Singles*)nullptr, (Bfloat16*)nullptr) : f((Singles*)nullptr, (float*)nullptr);
}
