// Vectors of REVIT_LANES floats, and the two kinds of arithmetic on them. Included once per instruction set, inside a
// namespace of its own, under the compiler flags of that set: no include guard.

constexpr int kLanes = REVIT_LANES;
typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t Int __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Bits __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Half __attribute__((vector_size(kLanes * 2)));

template <class To, class From>
INLINE To read(const From* p) {
  To value;
  __builtin_memcpy(&value, p, sizeof value);
  return value;
}
INLINE Vec load(const float* p) { return read<Vec>(p); }
template <class V, class T>
INLINE void write(T* p, V v) {
  __builtin_memcpy(p, &v, sizeof v);
}
INLINE Vec splat(float x) { return Vec{} + x; }

INLINE Int iota() {
  Int lanes;
  for (int i = 0; i < kLanes; ++i) lanes[i] = i;
  return lanes;
}

// The first `count` lanes of v, `other` beyond.
INLINE Vec keep(Vec v, int64_t count, float other) { return iota() < static_cast<int32_t>(count) ? v : splat(other); }

template <int kStep, size_t... I>
INLINE Vec exchange(Vec v, std::index_sequence<I...>) {
  return __builtin_shufflevector(v, v, (I ^ kStep)...);
}
// NaN in the second argument comes through.
INLINE Vec maximum(Vec a, Vec b) {
#if REVIT_LANES == 16
  return _mm512_max_ps(a, b);
#elif REVIT_LANES == 8
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

struct Add {
  static INLINE Vec of(Vec a, Vec b) { return a + b; }
};
struct Maximum {
  static INLINE Vec of(Vec a, Vec b) { return maximum(a, b); }
};
template <class Op, int kStep = kLanes / 2>
INLINE float reduce(Vec v) {
  v = Op::of(v, exchange<kStep>(v, std::make_index_sequence<kLanes>()));
  if constexpr (kStep == 1)
    return v[0];
  else
    return reduce<Op, kStep / 2>(v);
}

INLINE Vec fma(Vec a, Vec b, Vec c) {
#if REVIT_LANES == 16
  return _mm512_fmadd_ps(a, b, c);
#elif REVIT_LANES == 8
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

// 2^x, zero below the smallest normal number. Minimax polynomials of 2^f on [-1/2, 1/2], exact at 0: the longer one is
// within 2e-9, the shorter (for results that will be rounded to bf16) within 3e-6.
template <bool kShort>
INLINE Vec exp2(Vec x) {
#if REVIT_LANES == 16
  const Vec n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif REVIT_LANES == 8
  x = maximum(splat(-127.f), x);
  const Vec n = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  x = maximum(splat(-127.f), x);
  const Vec n = (x + 12582912.f) - 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer
#endif
  const Vec f = x - n;
  Vec p;
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
#if REVIT_LANES == 16
  return _mm512_scalef_ps(p, n);
#else
  const Int power = (__builtin_convertvector(n, Int) + 127) << 23;  // 0 for n = -127
  return p * read<Vec>(&power);
#endif
}

// Memory in the tensors' dtype: the first `count` elements, zero beyond.
INLINE Vec load(const float* p, int64_t count) {
  if (count >= kLanes) return load(p);
#if REVIT_LANES == 16
  return _mm512_maskz_loadu_ps((1u << count) - 1, p);
#elif REVIT_LANES == 8
  return _mm256_maskload_ps(p, (__m256i)(iota() < static_cast<int32_t>(count)));
#else
  Vec v{};
  for (int64_t i = 0; i < count; ++i) v[i] = p[i];
  return v;
#endif
}
INLINE Half load_half(const bf16* p, int64_t count) {
  if (count >= kLanes) return read<Half>(p);
#if REVIT_LANES == 16
  return (Half)_mm256_maskz_loadu_epi16((1u << count) - 1, p);
#else
  Half v{};
  for (int64_t i = 0; i < count; ++i) v[i] = p[i].bits;
  return v;
#endif
}
INLINE Vec load(const bf16* p, int64_t count) {
  const Bits wide = __builtin_convertvector(load_half(p, count), Bits) << 16;
  return read<Vec>(&wide);
}

INLINE Half round_to_bf16(Vec v) {
#if REVIT_BF16
  return (Half)_mm512_cvtneps_pbh(v);
#else
  const Bits bits = read<Bits>(&v);
  const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return __builtin_convertvector(v == v ? rounded : Bits{} + 0x7fc0, Half);
#endif
}
INLINE void store(float* p, Vec v, int64_t count) {
  if (count >= kLanes) return write(p, v);
#if REVIT_LANES == 16
  _mm512_mask_storeu_ps(p, (1u << count) - 1, v);
#elif REVIT_LANES == 8
  _mm256_maskstore_ps(p, (__m256i)(iota() < static_cast<int32_t>(count)), v);
#else
  for (int64_t i = 0; i < count; ++i) p[i] = v[i];
#endif
}
INLINE void store(bf16* p, Vec v, int64_t count) {
  const Half half = round_to_bf16(v);
  if (count >= kLanes) return write(p, half);
#if REVIT_LANES == 16
  _mm256_mask_storeu_epi16(p, (1u << count) - 1, (__m256i)half);
#else
  for (int64_t i = 0; i < count; ++i) p[i].bits = half[i];
#endif
}

// A unit is what one lane multiplies at a time: here a float, whatever the tensors' dtype.
struct FloatMath {
  using Unit = float;
  using Units = Vec;
  static constexpr int kPair = 1;
  static constexpr bool kShortExp = false;
  static INLINE Units broadcast(const Unit* p) { return splat(*p); }
  static INLINE Vec madd(Units a, Units b, Vec c) { return fma(a, b, c); }
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
  static INLINE void store_row(Unit* p, int64_t lane, Vec v) { write(p + lane, v); }
};

#if REVIT_BF16
// A unit is a pair of bf16, multiplied and added in fp32 by one instruction.
struct PairMath {
  using Unit = uint32_t;
  using Units = __m512i;
  static constexpr int kPair = 2;
  static constexpr bool kShortExp = true;
  static INLINE Units broadcast(const Unit* p) { return _mm512_set1_epi32(static_cast<int>(*p)); }
  static INLINE Vec madd(Units a, Units b, Vec c) { return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b); }
  static INLINE Units load_units(const bf16* p, int64_t count) {
    if (count >= 32) return _mm512_loadu_si512(p);
    return _mm512_maskz_loadu_epi16((1u << count) - 1, p);
  }
  static INLINE Units pair(Half first, Half second) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32((__m256i)first),
                           _mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)second), 16));
  }
  static INLINE Units load_rows(const bf16* first, const bf16* second, int64_t count) {
    return pair(load_half(first, count), second ? load_half(second, count) : Half{});
  }
  static INLINE void store_row(Unit* p, int64_t lane, Vec v) {
    write(reinterpret_cast<uint16_t*>(p) + lane, round_to_bf16(v));
  }
};
#endif
