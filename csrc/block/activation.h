// GELU and its kin on vectors. No include guard: compiled once per instruction set.

// NaN in `a` stays NaN: these instructions return their second argument then.
inline Floats at_least(Floats a, float b) {
#if LANES == 16
  return (Floats)_mm512_maskz_max_ps(0xffff, (__m512)splat(b), (__m512)a);
#elif LANES == 8
  return (Floats)_mm256_max_ps((__m256)splat(b), (__m256)a);
#else
  return a < splat(b) ? splat(b) : a;
#endif
}
inline Floats at_most(Floats a, float b) {
#if LANES == 16
  return (Floats)_mm512_maskz_min_ps(0xffff, (__m512)splat(b), (__m512)a);
#elif LANES == 8
  return (Floats)_mm256_min_ps((__m256)splat(b), (__m256)a);
#else
  return a > splat(b) ? splat(b) : a;
#endif
}

template <size_t N>
inline Floats polynomial(Floats x, const float (&coefficients)[N]) {
  Floats p = splat(coefficients[N - 1]);
  for (size_t i = N - 1; i--;) p = fma(p, x, splat(coefficients[i]));
  return p;
}

// 2^x for x in [-126, 126], clamped to that; relative error below 2e-7.
inline Floats exp2(Floats x) {
  x = at_most(at_least(x, -126), 126);
  const Floats magic = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
  const Floats shifted = x + magic, f = x - (shifted - magic);
  static constexpr float kSeries[] = {1.f,           0.693147180f,  0.240226507f,  0.0555041087f,
                                      0.00961812911f, 0.00133335581f, 0.000154353139f};
  const Words exponent = ((Words)shifted << 23) + (Words)splat(1.f);
  const Floats power = (Floats)exponent;
  return polynomial(f, kSeries) * power;
}

constexpr float kToBase2 = 1.44269504088896341f;

// x / (1 + exp(-u))
inline Floats gated(Floats x, Floats u) { return x / (splat(1) + exp2(u * splat(-kToBase2))); }

// x Phi(x) by erf as in Abramowitz and Stegun 7.1.26, whose error is at most 1.5e-7.
inline Floats gelu(Floats x) {
  const Floats z = x * splat(0.70710678118654752f), size = z < splat(0) ? -z : z;
  const Floats t = splat(1) / fma(splat(0.3275911f), size, splat(1));
  static constexpr float kSeries[] = {0.254829592f, -0.284496736f, 1.421413741f, -1.453152027f, 1.061405429f};
  const Floats tail = polynomial(t, kSeries) * t * exp2(size * size * splat(-kToBase2)) * splat(0.5f);  // 1 - Phi(|x|)
  return x * (x < splat(0) ? tail : splat(1) - tail);
}

// x Phi(x) for a result that is rounded to bf16 or coarser: Phi - 1/2 as x times a polynomial in x^2, fitted on
// [-4.2, 4.2] to the least |x| error with 1/2 at the end, so that nothing needs clamping beyond. Off by at most 7e-5.
inline Floats short_gelu(Floats x) {
  static constexpr float kFit[] = {0.3992001712322235f,      -0.06685450673103333f,   0.01012105867266655f,
                                   -0.001198110170662403f,   0.00010810770618263632f, -7.0407750172307715e-06f,
                                   3.049644021757558e-07f,   -7.735308393819196e-09f, 8.60899962429329e-11f};
  const Floats inside = at_most(at_least(x, -4.2f), 4.2f);
  return x * fma(inside, polynomial(inside * inside, kFit), splat(0.5f));
}

template <Activation kind, bool kShort>
inline Floats activate(Floats x) {
  if constexpr (kind == Activation::kQuickGelu) return gated(x, x * splat(1.702f));
  if constexpr (kind == Activation::kGeluTanh)
    return gated(x, splat(1.5957691216057308f) * x * fma(x * x, splat(0.044715f), splat(1)));
  return kShort ? short_gelu(x) : gelu(x);
}
