// A block for a few rows of tokens, all in cache. No include guard: compiled once per instruction set.

#include "block/activation.h"

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

#include "block/product.h"

constexpr int64_t kHiddenBytes = 512 * 1024;  // of the hidden layer of the rows that a thread takes: half of an L2
constexpr int64_t kMostRows = 160;

// What of a row block lies between two products.
template <class Math, class T>
struct Rows {
  using Unit = typename Math::Unit;
  using Number = typename Math::Number;
  static constexpr bool kQuantised = std::is_same_v<Unit, uint8_t>;
  using Hidden = std::conditional_t<kQuantised, T, Unit>;

  const Problem& p;
  int64_t first, count;
  Unit* left;      // (count, inputs of the next product)
  Hidden* hidden;  // (count, hidden)
  float* line;     // one row
  float* scale;    // (count,), where quantised: a row of x is scale * (left - zero)
  int32_t* zero;

  static int64_t widest(const Problem& p) {
    const int64_t inputs = std::max(p.dim, p.attended_dim);
    return kQuantised ? std::max(inputs, p.hidden) : inputs;
  }
  static int64_t bytes(const Problem& p, int64_t rows) {
    return aligned(rows * widest(p) * sizeof(Unit)) + aligned(rows * p.hidden * sizeof(Hidden)) +
           aligned(std::max(widest(p), p.hidden) * 4) + 2 * aligned(rows * 4);
  }
  static int64_t most_rows(const Problem& p) {
    const int64_t rows = kHiddenBytes / (p.hidden * static_cast<int64_t>(sizeof(Hidden))) / kRows * kRows;
    return std::clamp<int64_t>(rows, 2 * kRows, kMostRows / kRows * kRows);
  }

  Rows(const Problem& p, int64_t first, int64_t count, char* arena) : p(p), first(first), count(count) {
    auto take = [&](int64_t bytes) {
      char* piece = arena;
      arena += aligned(bytes);
      return piece;
    };
    left = reinterpret_cast<Unit*>(take(count * widest(p) * sizeof(Unit)));
    hidden = reinterpret_cast<Hidden*>(take(count * p.hidden * sizeof(Hidden)));
    line = reinterpret_cast<float*>(take(std::max(widest(p), p.hidden) * 4));
    scale = reinterpret_cast<float*>(take(count * 4));
    zero = reinterpret_cast<int32_t*>(take(count * 4));
  }

#ifdef BFLOAT16_INSTRUCTIONS
  // The row in 256 steps from its least to its largest number, of which zero is one exactly.
  template <class From>
  void quantise(const From* x, int64_t n, int64_t r) {
    Floats least[4] = {}, most[4] = {};
    each_vector(n, [&](int64_t i, auto part, int k) {
      const Floats v = load(x + i, part);
      least[k] = v < least[k] ? v : least[k];
      most[k] = v > most[k] ? v : most[k];
    });
    for (int k = 1; k < 4; ++k) {
      least[0] = least[k] < least[0] ? least[k] : least[0];
      most[0] = most[k] > most[0] ? most[k] : most[0];
    }
    const float low = _mm512_reduce_min_ps((__m512)least[0]), high = _mm512_reduce_max_ps((__m512)most[0]);
    const float step = (high - low) / 255, inverse = step > 0 ? 1 / step : 0;
    scale[r] = step;
    zero[r] = static_cast<int32_t>(-low * inverse + 0.5f);
    const Floats factor = splat(inverse), shift = splat(zero[r]);
    Unit* to = left + r * n;
    each_vector(n, [&](int64_t i, auto part, int) {
      const __m512 q = (__m512)fma(load(x + i, part), factor, shift);
      const __m128i packed = _mm512_maskz_cvtusepi32_epi8(
          0xffff, _mm512_maskz_max_epi32(0xffff, _mm512_maskz_cvtps_epi32(0xffff, q), _mm512_setzero_si512()));
      if constexpr (std::is_same_v<decltype(part), Full>)
        std::memcpy(to + i, &packed, 16);
      else
        std::memcpy(to + i, &packed, part.n);
    });
  }
#endif

  // The rows of x as the product takes them; their stride is `inputs`.
  const Unit* staged(const T* x, int64_t inputs) {
    if constexpr (std::is_same_v<T, Unit>) return x;
    for (int64_t r = 0; r < count; ++r) {
#ifdef BFLOAT16_INSTRUCTIONS
      if constexpr (kQuantised) {
        quantise(x + r * inputs, inputs, r);
        continue;
      }
#endif
      if constexpr (!kQuantised)
        each_vector(inputs, [&](int64_t i, auto n, int) {
          store(left + r * inputs + i, load(x + r * inputs + i, n), n);
        });
    }
    return left;
  }

  void normalise(const T* x, const Norm& norm) {
    const int64_t dim = p.dim;
    for (int64_t r = 0; r < count; ++r) {
      const T* in = x + r * dim;
      Floats sums[4] = {}, squares[4] = {};
      each_vector(dim, [&](int64_t i, auto n, int k) { sums[k] += store(line + i, load(in + i, n), n); });
      const float mean = total((sums[0] + sums[1]) + (sums[2] + sums[3])) / dim;
      const Floats shift = splat(-mean);
      each_vector(dim, [&](int64_t i, auto n, int k) {
        const Floats centred = keep(load(line + i, n) + shift, n);
        squares[k] = fma(centred, centred, squares[k]);
      });
      const float rstd = 1 / std::sqrt(total((squares[0] + squares[1]) + (squares[2] + squares[3])) / dim + norm.eps);
      const int64_t affine = p.row ? std::clamp<int64_t>(p.row[first + r], 0, norm.lengths - 1) * dim : 0;
      const float *weight = norm.weight + affine, *bias = norm.bias + affine;
      const Floats inverse = splat(rstd);
      each_vector(dim, [&](int64_t i, auto n, int) {
        const Floats y = fma((load(line + i, n) + shift) * inverse, load(weight + i, n), load(bias + i, n));
        if constexpr (kQuantised)
          store(line + i, y, n);
        else
          store(left + r * dim + i, y, n);
      });
#ifdef BFLOAT16_INSTRUCTIONS
      if constexpr (kQuantised) quantise(line, dim, r);
#endif
    }
  }

  Floats value(const Linear& weight, const Number* sums, int64_t r, int64_t column) const {
    const Floats bias = load(weight.bias + column, Full{});
    if constexpr (kQuantised) {
      typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
      Ints exact, of_weights;
      std::memcpy(&exact, sums, sizeof exact);
      std::memcpy(&of_weights, weight.sums + column, sizeof of_weights);
      const Floats wide = __builtin_convertvector(exact - of_weights * zero[r], Floats);
      return fma(wide, load(weight.scale + column, Full{}) * splat(scale[r]), bias);
    } else {
      return load(sums, Full{}) + bias;
    }
  }

  // Asks for the columns of a tile of `data`, (rows, stride), to be brought near for a write.
  template <class U>
  static auto near(U* data, int64_t stride) {
    return [=](int64_t first, int64_t rows, int64_t column) {
      for (int64_t r = first; r < first + rows; ++r)
        for (int64_t byte = 0; byte < kWidth * static_cast<int64_t>(sizeof(U)); byte += 64)
          __builtin_prefetch(reinterpret_cast<const char*>(data + r * stride + column) + byte, 1, 3);
    };
  }

  // keep_value(row, column, Full or Part, value) for each vector of x W^T + bias.
  template <class G, class F>
  void multiply(const Linear& weight, const Unit* x, G soon, F keep_value) {
    product<Math>(weight, x, weight.in, count, soon,
                  [&](int64_t top, int64_t rows, int64_t left_column, int64_t vectors, const Number* sums) {
                    for (int64_t r = top; r < top + rows; ++r)
                      for (int64_t v = 0; v < vectors; ++v, sums += kLanes) {
                        const int64_t column = left_column + v * kLanes;
                        const Floats y = value(weight, sums, r, column);
                        if (column + kLanes <= weight.out)
                          keep_value(r, column, Full{}, y);
                        else
                          keep_value(r, column, Part{weight.out - column}, y);
                      }
                  });
  }

  void queries_keys_values() {
    normalise(static_cast<const T*>(p.x) + first * p.dim, p.norm1);
    T* out = static_cast<T*>(p.qkv) + (first - p.between_first) * p.to_qkv.out;
    const int64_t stride = p.to_qkv.out;
    multiply(p.to_qkv, left, near(out, stride),
             [=](int64_t r, int64_t column, auto n, Floats y) { store(out + r * stride + column, y, n); });
  }

  template <Activation kind>
  void up() {
    Hidden* out = hidden;
    const int64_t stride = p.hidden;
    multiply(p.fc1, left, near(out, stride), [=](int64_t r, int64_t column, auto n, Floats y) {
      store(out + r * stride + column, activate<kind, !std::is_same_v<Hidden, float>>(y), n);
    });
  }

  void projection_and_mlp() {
    const int64_t dim = p.dim;
    const T* x = static_cast<const T*>(p.x) + first * dim;
    T* y = static_cast<T*>(p.y) + first * dim;
    auto add_to = [=](const T* before, const float* gamma) {
      return [=](int64_t r, int64_t column, auto n, Floats branch) {
        const int64_t at = r * dim + column;
        store(y + at, fma(branch, load(gamma + column, Full{}), load(before + at, n)), n);
      };
    };
    const T* attended = static_cast<const T*>(p.attended) + (first - p.between_first) * p.attended_dim;
    auto both = [to = near(y, dim), from = near(const_cast<T*>(x), dim)](int64_t first, int64_t rows, int64_t column) {
      to(first, rows, column);
      from(first, rows, column);
    };
    multiply(p.proj, staged(attended, p.attended_dim), both, add_to(x, p.proj.gamma));
    normalise(y, p.norm2);
    switch (p.activation) {
      case Activation::kGelu:
        up<Activation::kGelu>();
        break;
      case Activation::kGeluTanh:
        up<Activation::kGeluTanh>();
        break;
      case Activation::kQuickGelu:
        up<Activation::kQuickGelu>();
        break;
    }
    if constexpr (kQuantised)
      multiply(p.fc2, staged(hidden, p.hidden), near(y, dim), add_to(y, p.fc2.gamma));
    else
      multiply(p.fc2, hidden, near(y, dim), add_to(y, p.fc2.gamma));
  }
};

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

inline Shape shape_of(const Problem& p) {
  return with_types(p.kind, p.is_bf16, [&](auto math, auto type) {
    using R = Rows<std::remove_pointer_t<decltype(math)>, std::remove_pointer_t<decltype(type)>>;
    return Shape{R::most_rows(p), R::bytes(p, R::most_rows(p))};
  });
}

inline void first_half(const Problem& p, int64_t first, int64_t count, char* arena) {
  with_types(p.kind, p.is_bf16, [&](auto math, auto type) {
    using R = Rows<std::remove_pointer_t<decltype(math)>, std::remove_pointer_t<decltype(type)>>;
    R(p, first, count, arena).queries_keys_values();
  });
}

inline void second_half(const Problem& p, int64_t first, int64_t count, char* arena) {
  with_types(p.kind, p.is_bf16, [&](auto math, auto type) {
    using R = Rows<std::remove_pointer_t<decltype(math)>, std::remove_pointer_t<decltype(type)>>;
    R(p, first, count, arena).projection_and_mlp();
  });
}

// Bytes of a weight in its panels, and the lanes that its columns are rounded up to; 0 for a kind there is not here.
inline Layout layout_of(Kind kind) {
#ifdef BFLOAT16_INSTRUCTIONS
  if (kind == Kind::kInt8) return {1, kLanes};
  if (kind == Kind::kBfloat16) return {2, kLanes};
#endif
  return {kind == Kind::kInt8 ? 0 : 4, kLanes};
}

template <class From>
inline void pack_as(Kind kind, const From* weight, const Linear& to) {
#ifdef BFLOAT16_INSTRUCTIONS
  if (kind == Kind::kInt8) return pack_int8(weight, to);
  if (kind == Kind::kBfloat16) return pack<Pairs>(to, [&](int64_t n, int64_t k) {
    return convert<Bfloat16>(weight[n * to.in + k]);
  });
#endif
  pack<Singles>(to, [&](int64_t n, int64_t k) { return convert<float>(weight[n * to.in + k]); });
}

inline void pack_weight(Kind kind, bool is_bf16, const void* weight, const Linear& to) {
  if (is_bf16)
    pack_as(kind, static_cast<const Bfloat16*>(weight), to);
  else
    pack_as(kind, static_cast<const float*>(weight), to);
}
