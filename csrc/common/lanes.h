// Vectors of LANES fp32 numbers, loaded from and stored to fp32 or bf16. No include guard: every_isa.h includes this
// once per instruction set, each time in a namespace of its own, with LANES defined.

constexpr int64_t kLanes = LANES;
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

struct Full {};  // all lanes
struct Part {    // the first n lanes: the end of a row
  int64_t n;
};

// GCC 12 splits these two conversions in halves if left to __builtin_convertvector, which costs half of the speed in
// bf16.
inline Words extend(Halves half) {
#if LANES == 16
  return (Words)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)half);  // unmasked, GCC 12 warns of its own header
#elif LANES == 8
  return (Words)_mm256_cvtepu16_epi32((__m128i)half);
#else
  return __builtin_convertvector(half, Words);
#endif
}

inline Halves truncate(Words word) {
#if LANES == 16
  return (Halves)_mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)word);
#elif LANES == 8
  const __m256i packed = _mm256_packus_epi32((__m256i)word, (__m256i)word);  // both 128-bit lanes apart
  return (Halves)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
#else
  return __builtin_convertvector(word, Halves);
#endif
}

inline Floats widen(Halves half) { return (Floats)(extend(half) << 16); }

// To the nearest bf16, ties to even; NaN stays NaN. The AVX512-BF16 instruction makes subnormal numbers zero.
inline Halves narrow(Floats v) {
#ifdef BFLOAT16_INSTRUCTIONS
  return (Halves)_mm512_maskz_cvtneps_pbh(0xffff, (__m512)v);
#endif
  const Words bits = (Words)v;
  const Words nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return truncate(v == v ? nearest : (bits >> 16) | 0x40);
}

inline Floats load(const float* p, Full) {
  Floats v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline Floats load(const Bfloat16* p, Full) {
  Halves v;
  std::memcpy(&v, p, sizeof v);
  return widen(v);
}

// Returns what is stored: v rounded to the type of p.
inline Floats store(float* p, Floats v, Full) {
  std::memcpy(p, &v, sizeof v);
  return v;
}

inline Floats store(Bfloat16* p, Floats v, Full) {
  const Halves half = narrow(v);
  std::memcpy(p, &half, sizeof half);
  return widen(half);
}

// The lanes beyond the part are zero.
template <class T>
inline Floats load(const T* p, Part part) {
  T lanes[LANES] = {};
  std::memcpy(lanes, p, part.n * sizeof(T));
  return load(lanes, Full{});
}

template <class T>
inline Floats store(T* p, Floats v, Part part) {
  T lanes[LANES];
  v = store(lanes, v, Full{});
  std::memcpy(p, lanes, part.n * sizeof(T));
  return v;
}

inline Floats keep(Floats v, Full) { return v; }

inline Floats keep(Floats v, Part part) {
  for (int64_t i = part.n; i < kLanes; ++i) v[i] = 0;
  return v;
}

inline float total(Floats v) {
  typedef float Four __attribute__((vector_size(16)));
  Four quarters[LANES / 4];
  std::memcpy(quarters, &v, sizeof v);
  for (int64_t step = LANES / 8; step; step /= 2)
    for (int64_t i = 0; i < step; ++i) quarters[i] += quarters[i + step];
  return (quarters[0][0] + quarters[0][2]) + (quarters[0][1] + quarters[0][3]);
}

// f(column, Full or Part, k) for each vector of a row; k in 0..3 names one of four independent accumulators.
template <class F>
inline void each_vector(int64_t dim, F f) {
  int64_t i = 0;
  for (; i + 4 * kLanes <= dim; i += 4 * kLanes) {
    f(i, Full{}, 0);
    f(i + kLanes, Full{}, 1);
    f(i + 2 * kLanes, Full{}, 2);
    f(i + 3 * kLanes, Full{}, 3);
  }
  for (; i + kLanes <= dim; i += kLanes) f(i, Full{}, 0);
  if (i < dim) f(i, Part{dim - i}, 0);
}

inline Floats splat(float x) {
#if LANES == 16
  return (Floats)_mm512_set1_ps(x);
#elif LANES == 8
  return (Floats)_mm256_set1_ps(x);
#else
  return Floats{x, x, x, x};
#endif
}

inline Floats fma(Floats a, Floats b, Floats c) {
#if LANES == 16
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif LANES == 8
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}
