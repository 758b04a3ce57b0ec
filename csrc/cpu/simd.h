// Vectors of LANES fp32 numbers, loaded from and stored to fp32 or bf16. No include guard: isa.h includes this once per
// instruction set, each time in a namespace of its own, with LANES defined.

constexpr int kLanes = LANES;
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

struct Full {};  // all lanes
struct Part {    // the first n lanes, n < LANES: the end of a row
  int64_t n;
};

template <class To, class From>
INLINE To read(const From* p) {
  To value;
  __builtin_memcpy(&value, p, sizeof value);
  return value;
}
template <class T, class V>
INLINE void write(T* p, V v) {
  __builtin_memcpy(p, &v, sizeof v);
}

INLINE Ints iota() {
  Ints lanes;
  for (int i = 0; i < LANES; ++i) lanes[i] = i;
  return lanes;
}

INLINE Floats splat(float x) {
#if LANES == 16
  return (Floats)_mm512_set1_ps(x);
#elif LANES == 8
  return (Floats)_mm256_set1_ps(x);
#else
  return Floats{x, x, x, x};
#endif
}

INLINE Floats fma(Floats a, Floats b, Floats c) {
#if LANES == 16
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif LANES == 8
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// NaN in the second argument comes through.
INLINE Floats maximum(Floats a, Floats b) {
#if LANES == 16
  return (Floats)_mm512_max_ps((__m512)a, (__m512)b);
#elif LANES == 8
  return (Floats)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}
INLINE Floats minimum(Floats a, Floats b) {
#if LANES == 16
  return (Floats)_mm512_min_ps((__m512)a, (__m512)b);
#elif LANES == 8
  return (Floats)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}

// GCC 12 splits these two conversions in halves if left to __builtin_convertvector, which costs half of the speed in
// bf16.
INLINE Words extend(Halves half) {
#if LANES == 16
  return (Words)_mm512_cvtepu16_epi32((__m256i)half);
#elif LANES == 8
  return (Words)_mm256_cvtepu16_epi32((__m128i)half);
#else
  return __builtin_convertvector(half, Words);
#endif
}
INLINE Halves truncate(Words word) {
#if LANES == 16
  return (Halves)_mm512_cvtepi32_epi16((__m512i)word);
#elif LANES == 8
  const __m256i packed = _mm256_packus_epi32((__m256i)word, (__m256i)word);  // both 128-bit lanes apart
  return (Halves)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
#else
  return __builtin_convertvector(word, Halves);
#endif
}

INLINE Floats widen(Halves half) { return (Floats)(extend(half) << 16); }

// To the nearest bf16, ties to even; NaN stays NaN. The AVX512-BF16 instruction makes subnormal numbers zero.
INLINE Halves narrow(Floats v) {
#ifdef BFLOAT16_INSTRUCTIONS
  return (Halves)_mm512_cvtneps_pbh((__m512)v);
#else
  const Words bits = (Words)v;
  const Words nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return truncate(v == v ? nearest : (bits >> 16) | 0x40);
#endif
}

INLINE Halves load_halves(const Bfloat16* p, Full) { return read<Halves>(p); }
INLINE Halves load_halves(const Bfloat16* p, Part part) {
#if LANES == 16
  return (Halves)_mm256_maskz_loadu_epi16((1u << part.n) - 1, p);
#else
  Halves v{};
  std::memcpy(&v, p, part.n * sizeof(Bfloat16));
  return v;
#endif
}

// The lanes beyond a part are zero.
INLINE Floats load(const float* p, Full = {}) { return read<Floats>(p); }
INLINE Floats load(const float* p, Part part) {
#if LANES == 16
  return (Floats)_mm512_maskz_loadu_ps((1u << part.n) - 1, p);
#elif LANES == 8
  return (Floats)_mm256_maskload_ps(p, (__m256i)(iota() < static_cast<int32_t>(part.n)));
#else
  Floats v{};
  for (int64_t i = 0; i < part.n; ++i) v[i] = p[i];
  return v;
#endif
}
INLINE Floats load(const Bfloat16* p, Full) { return widen(load_halves(p, Full{})); }
INLINE Floats load(const Bfloat16* p, Part part) { return widen(load_halves(p, part)); }

// Returns what is stored: v rounded to the type of p.
INLINE Floats store(float* p, Floats v, Full) {
  write(p, v);
  return v;
}
INLINE Floats store(float* p, Floats v, Part part) {
#if LANES == 16
  _mm512_mask_storeu_ps(p, (1u << part.n) - 1, (__m512)v);
#elif LANES == 8
  _mm256_maskstore_ps(p, (__m256i)(iota() < static_cast<int32_t>(part.n)), (__m256)v);
#else
  for (int64_t i = 0; i < part.n; ++i) p[i] = v[i];
#endif
  return v;
}
INLINE Floats store(Bfloat16* p, Floats v, Full) {
  const Halves half = narrow(v);
  write(p, half);
  return widen(half);
}
INLINE Floats store(Bfloat16* p, Floats v, Part part) {
  const Halves half = narrow(v);
#if LANES == 16
  _mm256_mask_storeu_epi16(p, (1u << part.n) - 1, (__m256i)half);
#else
  std::memcpy(p, &half, part.n * sizeof(Bfloat16));
#endif
  return widen(half);
}

// The first `count` numbers, of which there may be more than lanes.
template <class T>
INLINE Floats load(const T* p, int64_t count) {
  return count >= LANES ? load(p, Full{}) : load(p, Part{count});
}
INLINE Halves load_halves(const Bfloat16* p, int64_t count) {
  return count >= LANES ? load_halves(p, Full{}) : load_halves(p, Part{count});
}
template <class T>
INLINE Floats store(T* p, Floats v, int64_t count) {
  return count >= LANES ? store(p, v, Full{}) : store(p, v, Part{count});
}

// `other` in the lanes beyond a part.
INLINE Floats keep(Floats v, Full, float = 0) { return v; }
INLINE Floats keep(Floats v, Part part, float other = 0) {
  return iota() < static_cast<int32_t>(part.n) ? v : splat(other);
}

template <int kStep, size_t... I>
INLINE Floats exchange(Floats v, std::index_sequence<I...>) {
  return __builtin_shufflevector(v, v, (I ^ kStep)...);
}
// All lanes together, in the same order whatever their number.
template <int kStep = LANES / 2, class F>
INLINE float reduce(Floats v, F f) {
  v = f(v, exchange<kStep>(v, std::make_index_sequence<LANES>()));
  if constexpr (kStep == 1)
    return v[0];
  else
    return reduce<kStep / 2>(v, f);
}
INLINE float total(Floats v) {
  return reduce(v, [&](Floats a, Floats b) INLINE_LAMBDA { return a + b; });  // [&]: no function to call it by
}
INLINE float largest(Floats v) {
  return reduce(v, [&](Floats a, Floats b) INLINE_LAMBDA { return maximum(a, b); });
}

// f(column, Full or Part, k) for each vector of a row; k in 0..3 names one of four independent accumulators.
template <class F>
INLINE void each_vector(int64_t dim, F f) {
  int64_t i = 0;
  for (; i + 4 * LANES <= dim; i += 4 * LANES) {
    f(i, Full{}, 0);
    f(i + LANES, Full{}, 1);
    f(i + 2 * LANES, Full{}, 2);
    f(i + 3 * LANES, Full{}, 3);
  }
  for (; i + LANES <= dim; i += LANES) f(i, Full{}, 0);
  if (i < dim) f(i, Part{dim - i}, 0);
}

template <class To, class From>
INLINE void copy(To* y, const From* x, int64_t n) {
  each_vector(n, [&](int64_t i, auto part, int) { store(y + i, load(x + i, part), part); });
}

// 2^x for x up to 127, zero below the smallest normal number; on AVX512, x must be finite. Minimax polynomials of 2^f
// on [-1/2, 1/2], exact at 0: the longer one is within 2e-9, the shorter (for results that will be rounded to bf16)
// within 3e-6.
template <bool kShort>
INLINE Floats exp2(Floats x) {
#if LANES == 16
  const Floats n = (Floats)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif LANES == 8
  x = maximum(splat(-127.f), x);
  const Floats n = (Floats)_mm256_round_ps((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  x = maximum(splat(-127.f), x);
  const Floats n = (x + 12582912.f) - 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer
#endif
  const Floats f = x - n;
  Floats p;
  if constexpr (kShort) {
    p = fma(splat(0.009582852994f), f, splat(0.05590642474f));
    p = fma(p, f, splat(0.2402409861f));
    p = fma(p, f, splat(0.6931241934f));
  } else {
    p = fma(splat(0.0001535336189f), f, splat(0.001339887442f));
    p = fma(p, f, splat(0.009618437358f));
    p = fma(p, f, splat(0.05550332471f));
    p = fma(p, f, splat(0.2402264791f));
    p = fma(p, f, splat(0.6931472029f));
  }
  p = fma(p, f, splat(1.f));
#if LANES == 16
  return (Floats)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  const Ints power = (__builtin_convertvector(n, Ints) + 127) << 23;  // 0 for n = -127
  return p * (Floats)power;
#endif
}

// Swaps lanes and vectors: LANES vectors of LANES numbers of 32 bits, by log2(LANES) perfect shuffles.
template <class V, size_t... I>
INLINE V low_halves(V a, V b, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, (I % 2 * LANES + I / 2)...);
}
template <class V, size_t... I>
INLINE V high_halves(V a, V b, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, (I % 2 * LANES + LANES / 2 + I / 2)...);
}
template <class V>
INLINE void transpose(V (&v)[LANES]) {
  constexpr auto kAll = std::make_index_sequence<LANES>();
#pragma GCC unroll 4
  for (int step = 1; step < LANES; step *= 2) {
    V next[LANES];
#pragma GCC unroll 8
    for (int i = 0; i < LANES / 2; ++i) {
      next[2 * i] = low_halves(v[i], v[i + LANES / 2], kAll);
      next[2 * i + 1] = high_halves(v[i], v[i + LANES / 2], kAll);
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) v[i] = next[i];
  }
}
