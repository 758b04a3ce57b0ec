// GELU and its kin on vectors. No include guard: compiled once per instruction set.

template <size_t N>
inline Floats polynomial(Floats x, const float (&coefficients)[N]) {
  Floats p = splat(coefficients[N - 1]);
  for (size_t i = N - 1; i--;) p = fma(p, x, splat(coefficients[i]));
  return p;
}

// 2^x for any x, clamped to [2^-127, 2^126].
template <bool kShort = false>
inline Floats power_of_two(Floats x) {
  x = minimum(splat(126), x);
#if LANES == 16
  x = maximum(splat(-127), x);  // elsewhere exp2 itself does that
#endif
  return exp2<kShort>(x);
}

// 1 / x, within 2^-14 of it.
inline Floats short_inverse(Floats x) {
#if LANES == 16
  return (Floats)_mm512_rcp14_ps((__m512)x);
#else
  return splat(1) / x;
#endif
}

constexpr float kToBase2 = 1.44269504088896341f;

// x / (1 + exp(-u)); what a float cannot tell from 0 is 0. kShort: for a result that is rounded to bf16 or coarser
template <bool kShort>
inline Floats gated(Floats x, Floats u) {
  const Floats sum = splat(1) + power_of_two<kShort>(u * splat(-kToBase2));
  const Floats share = kShort ? short_inverse(sum) : splat(1) / sum;
  return x * (u < splat(-87) ? splat(0) : share);
}

// x Phi(x) by erf as in Abramowitz and Stegun 7.1.26, whose error is at most 1.5e-7.
inline Floats gelu(Floats x) {
  const Floats z = x * splat(0.70710678118654752f), size = z < splat(0) ? -z : z;
  const Floats t = splat(1) / fma(splat(0.3275911f), size, splat(1));
  static constexpr float kSeries[] = {0.254829592f, -0.284496736f, 1.421413741f, -1.453152027f, 1.061405429f};
  const Floats tail =
      polynomial(t, kSeries) * t * power_of_two(size * size * splat(-kToBase2)) * splat(0.5f);  // 1 - Phi(|x|)
  return x * (x < splat(0) ? tail : splat(1) - tail);
}

// x Phi(x) for a result that is rounded to bf16 or coarser: Phi - 1/2 as x times a polynomial in x^2, fitted on
// [-4.2, 4.2] to the least |x| error. Where the polynomial ends within a millionth of 0, Phi is 0: what is far from
// zero is multiplied with it. Off by at most 8e-5, and a millionth of x.
inline Floats short_gelu(Floats x) {
  static constexpr float kFit[] = {0.3992001712322235f,    -0.06685450673103333f,   0.01012105867266655f,
                                   -0.001198110170662403f, 0.00010810770618263632f, -7.0407750172307715e-06f,
                                   3.049644021757558e-07f, -7.735308393819196e-09f, 8.60899962429329e-11f};
  const Floats inside = minimum(splat(4.2f), maximum(splat(-4.2f), x));
  return x * maximum(splat(0), fma(inside, polynomial(inside * inside, kFit), splat(0.5f - 1e-6f)));
}

template <Activation kind, bool kShort>
inline Floats activate(Floats x) {
  if constexpr (kind == Activation::kSilu) return gated<kShort>(x, x);
  if constexpr (kind == Activation::kQuickGelu) return gated<kShort>(x, x * splat(1.702f));
  if constexpr (kind == Activation::kGeluTanh)
    return gated<kShort>(x, splat(1.5957691216057308f) * x * fma(x * x, splat(0.044715f), splat(1)));
  return kShort ? short_gelu(x) : gelu(x);
}
