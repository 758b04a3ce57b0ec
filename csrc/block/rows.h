// A block for a few rows of tokens, all in cache. No include guard: compiled once per instruction set.

#include "block/activation.h"
#include "cpu/matmul.h"

constexpr int64_t kHiddenBytes = 512 * 1024;  // of the hidden layer of the rows that a thread takes: half of an L2
constexpr int64_t kMostRows = 160;

// What of a row block lies between two products.
template <class Math, class T>
struct Rows {
  using Unit = typename Math::Unit;
  using Number = typename Math::Number;
  static constexpr bool kQuantized = std::is_same_v<Unit, uint8_t>;
  using Hidden = std::conditional_t<kQuantized, T, Unit>;

  const Problem& p;
  int64_t first, count;
  Unit* left;      // (count, inputs of the next product)
  Hidden* hidden;  // (count, hidden)
  float* scale;    // (count,), where quantized: a row of x is scale * (left - zero)
  int32_t* zero;
  float* line;  // one row, of this thread

  static int64_t widest(const Problem& p) {
    const int64_t inputs = std::max(p.dim, p.attended_dim);
    return kQuantized ? std::max(inputs, p.hidden) : inputs;
  }
  static Shape shape(const Problem& p) {
    const int64_t fitting = kHiddenBytes / (p.hidden * static_cast<int64_t>(sizeof(Hidden))) / kRows * kRows;
    const int64_t inputs = widest(p) * static_cast<int64_t>(sizeof(Unit));
    return {.rows = std::clamp<int64_t>(fitting, 2 * kRows, kMostRows / kRows * kRows),
            .panel = kWidth,
            .stages = {!std::is_same_v<T, Unit>, kQuantized},
            .per_row = inputs + p.hidden * static_cast<int64_t>(sizeof(Hidden)) + 8,  // scale and zero
            .line = aligned(std::max(widest(p), p.hidden) * 4)};
  }

  Rows(const Block& block, float* line) : p(block.problem), first(block.first), count(block.count), line(line) {
    char* memory = block.memory;
    auto take = [&](int64_t bytes) {
      char* piece = memory;
      memory += aligned(bytes);
      return piece;
    };
    left = reinterpret_cast<Unit*>(take(count * widest(p) * sizeof(Unit)));
    hidden = reinterpret_cast<Hidden*>(take(count * p.hidden * sizeof(Hidden)));
    scale = reinterpret_cast<float*>(take(count * 4));
    zero = reinterpret_cast<int32_t*>(take(count * 4));
  }

#ifdef BFLOAT16_INSTRUCTIONS
  // The row in 256 steps from its least to its largest number, of which zero is one exactly; all of it NaN where one
  // of them is not finite.
  template <class From>
  void quantize(const From* x, int64_t n, int64_t r) {
    Floats least[4] = {}, most[4] = {}, not_finite[4] = {};
    each_vector(n, [&](int64_t i, auto part, int k) {
      const Floats v = load(x + i, part);
      least[k] = v < least[k] ? v : least[k];
      most[k] = v > most[k] ? v : most[k];
      not_finite[k] = fma(v, Floats{}, not_finite[k]);
    });
    for (int k = 1; k < 4; ++k) {
      least[0] = least[k] < least[0] ? least[k] : least[0];
      most[0] = most[k] > most[0] ? most[k] : most[0];
      not_finite[0] += not_finite[k];
    }
    const float low = _mm512_reduce_min_ps((__m512)least[0]), high = _mm512_reduce_max_ps((__m512)most[0]);
    scale[r] = (high - low) / 255 + total(not_finite[0]);
    const bool divides = scale[r] >= std::numeric_limits<float>::min() && scale[r] < INFINITY;
    const float inverse = divides ? 1 / scale[r] : 0;
    zero[r] = divides ? static_cast<int32_t>(-low * inverse + 0.5f) : 0;
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

  // The rows of x as a product takes them, where it does not take x itself.
  void stage(const T* x, int64_t inputs, Span rows) {
    for (int64_t r = rows.begin; r < rows.end; ++r) {
#ifdef BFLOAT16_INSTRUCTIONS
      if constexpr (kQuantized) {
        quantize(x + r * inputs, inputs, r);
        continue;
      }
#endif
      if constexpr (!kQuantized)
        each_vector(inputs,
                    [&](int64_t i, auto n, int) { store(left + r * inputs + i, load(x + r * inputs + i, n), n); });
    }
  }

  // One row of x with its affine: keep_value(column, Full or Part, value). token: whose affine it uses
  template <class X, class F>
  void normalise_row(const X* x, int64_t dim, const Norm& norm, int64_t token, F keep_value) {
    Floats sums[4] = {}, squares[4] = {};
    each_vector(dim, [&](int64_t i, auto n, int k) { sums[k] += store(line + i, load(x + i, n), n); });
    const float mean = p.rms ? 0 : total((sums[0] + sums[1]) + (sums[2] + sums[3])) / dim;
    const Floats shift = splat(-mean);
    each_vector(dim, [&](int64_t i, auto n, int k) {
      const Floats centred = keep(load(line + i, n) + shift, n);
      squares[k] = fma(centred, centred, squares[k]);
    });
    const float rstd = 1 / std::sqrt(total((squares[0] + squares[1]) + (squares[2] + squares[3])) / dim + norm.eps);
    const int64_t affine = p.row ? std::clamp<int64_t>(p.row[token], 0, norm.lengths - 1) * dim : 0;
    const float *weight = norm.weight + affine, *bias = norm.bias + affine;
    const Floats inverse = splat(rstd);
    each_vector(dim, [&](int64_t i, auto n, int) {
      keep_value(i, n, fma((load(line + i, n) + shift) * inverse, load(weight + i, n), load(bias + i, n)));
    });
  }

  // The first `dim` numbers of rows of x as the next product takes them; it takes zeros behind them.
  // to: (count, stride) as x, for a product that does not take them quantized
  template <class X>
  void normalise(const X* x, int64_t stride, int64_t dim, const Norm& norm, Span rows, Unit* to) {
    for (int64_t r = rows.begin; r < rows.end; ++r) {
#ifdef BFLOAT16_INSTRUCTIONS
      if constexpr (kQuantized) {
        normalise_row(x + r * stride, dim, norm, first + r,
                      [&](int64_t i, auto n, Floats y) { store(line + i, y, n); });
        std::fill(line + dim, line + stride, 0.f);
        quantize(line, stride, r);
        continue;
      }
#endif
      if constexpr (!kQuantized) {
        Unit* out = to + r * stride;
        normalise_row(x + r * stride, dim, norm, first + r, [&](int64_t i, auto n, Floats y) { store(out + i, y, n); });
        std::fill(out + dim, out + stride, Unit{});
      }
    }
  }

  // Queries and keys of each head, where they lie.
  void normalise_heads(Span rows) {
    const int64_t head_dim = p.attended_dim / p.heads;
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      T* at = qkv() + r * 3 * p.attended_dim;
      for (const Norm* norm : {&p.q_norm, &p.k_norm})
        for (int64_t head = 0; head < p.heads; ++head, at += head_dim)
          if (norm->weight)
            normalise_row(at, head_dim, *norm, first + r, [&](int64_t i, auto n, Floats y) { store(at + i, y, n); });
    }
  }

  Floats value(const Linear& weight, const Number* sums, int64_t r, int64_t column) const {
    const Floats bias = load(weight.bias + column, Full{});
    if constexpr (kQuantized) {
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
  void multiply(const Linear& weight, const Unit* x, Span rows, Span columns, const char* next, G soon, F keep_value) {
    product<Math>(weight, x, rows, columns, next, soon,
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

  template <Activation kind>
  void up(Span rows, Span columns, const char* next) {
    Hidden* out = hidden;
    const int64_t stride = p.hidden;
    multiply(p.fc1, left, rows, columns, next, near(out, stride), [=](int64_t r, int64_t column, auto n, Floats y) {
      store(out + r * stride + column, activate<kind, !std::is_same_v<Hidden, float>>(y), n);
    });
  }

  void gate(Span rows, Span columns, const char* next) {
    Hidden* out = hidden;
    const int64_t stride = p.hidden;
    multiply(p.fc1_x, left, rows, columns, next, near(out, stride), [=](int64_t r, int64_t column, auto n, Floats y) {
      Hidden* at = out + r * stride + column;
      store(at, y * load(at, n), n);
    });
  }

  // before + gamma * (x W^T + bias)
  void add_product(const Linear& weight, const Unit* x, const T* before, Span rows, Span columns, const char* next) {
    const int64_t dim = p.dim;
    T* y = output();
    const float* gamma = weight.gamma;
    multiply(
        weight, x, rows, columns, next,
        [=, to = near(y, dim), from = near(const_cast<T*>(before), dim)](int64_t first, int64_t rows, int64_t column) {
          to(first, rows, column);
          if (before != y) from(first, rows, column);
        },
        [=](int64_t r, int64_t column, auto n, Floats branch) {
          const int64_t at = r * dim + column;
          store(y + at, fma(branch, load(gamma + column, Full{}), load(before + at, n)), n);
        });
  }

  T* qkv() const { return static_cast<T*>(p.qkv) + (first - p.between_first) * 3 * p.attended_dim; }
  const T* input() const { return static_cast<const T*>(p.x) + first * p.dim; }
  T* output() const { return static_cast<T*>(p.y) + first * p.dim; }
  const T* attended() const { return static_cast<const T*>(p.attended) + (first - p.between_first) * p.attended_dim; }

  // What the output projection takes: what attention left, or another step made of it.
  const Unit* projected() const {
    return std::is_same_v<T, Unit> && !p.attended_norm.weight ? reinterpret_cast<const Unit*>(attended()) : left;
  }

  void run(Step step, Span rows, Span columns, const char* next) {
    switch (step) {
      case Step::kNorm1:
        return normalise(input(), p.dim, p.dim, p.norm1, rows, left);
      case Step::kQueriesKeysValues: {
        const int64_t stride = p.to_qkv.out;
        T* out = qkv();
        return multiply(p.to_qkv, left, rows, columns, next, near(out, stride),
                        [=](int64_t r, int64_t column, auto n, Floats y) { store(out + r * stride + column, y, n); });
      }
      case Step::kNormQueriesKeys:
        return normalise_heads(rows);
      case Step::kNormAttended:
        return normalise(attended(), p.attended_dim, p.attended_dim, p.attended_norm, rows, left);
      case Step::kStageAttended:
        return stage(attended(), p.attended_dim, rows);
      case Step::kProjection:
        return add_product(p.proj, projected(), input(), rows, columns, next);
      case Step::kNorm2:
        return normalise(output(), p.dim, p.dim, p.norm2, rows, left);
      case Step::kUp:
        switch (p.activation) {
          case Activation::kGelu:
            return up<Activation::kGelu>(rows, columns, next);
          case Activation::kGeluTanh:
            return up<Activation::kGeluTanh>(rows, columns, next);
          case Activation::kQuickGelu:
            return up<Activation::kQuickGelu>(rows, columns, next);
          case Activation::kSilu:
            return up<Activation::kSilu>(rows, columns, next);
          default:
            return;
        }
      case Step::kGate:
        return gate(rows, columns, next);
      case Step::kNormHidden:
        if constexpr (kQuantized)
          return normalise(hidden, p.hidden, p.normed, p.hidden_norm, rows, left);
        else
          return normalise(hidden, p.hidden, p.normed, p.hidden_norm, rows, hidden);
      case Step::kStageHidden:
        if constexpr (kQuantized) stage(hidden, p.hidden, rows);
        return;
      case Step::kDown:
        if constexpr (kQuantized)
          return add_product(p.fc2, left, output(), rows, columns, next);
        else
          return add_product(p.fc2, hidden, output(), rows, columns, next);
    }
  }
};

inline Shape shape_of(const Problem& p) {
  return with_types(p.kind, p.is_bf16, [&](auto math, auto type) {
    return Rows<std::remove_pointer_t<decltype(math)>, std::remove_pointer_t<decltype(type)>>::shape(p);
  });
}

// Each of `count` rows of x, `stride` numbers apart, becomes their mean. mean: room for a row, (width,)
template <class T>
inline void average(T* x, int64_t width, int64_t count, int64_t stride, float* mean) {
  each_vector(width, [&](int64_t i, auto n, int) {
    Floats sum{};
    for (int64_t r = 0; r < count; ++r) sum += load(x + r * stride + i, n);
    store(mean + i, sum / splat(count), n);
  });
  for (int64_t r = 0; r < count; ++r) copy(x + r * stride, mean, width);
}
inline void average_rows(bool is_bf16, void* x, int64_t width, int64_t count, int64_t stride, float* mean) {
  is_bf16 ? average(static_cast<Bfloat16*>(x), width, count, stride, mean)
          : average(static_cast<float*>(x), width, count, stride, mean);
}

// One step of some of a block's rows, which are counted from its first. columns, next: see matmul.h.
inline void run_step(const Block& block, Step step, Span rows, Span columns, const char* next, float* line) {
  with_types(block.problem.kind, block.problem.is_bf16, [&](auto math, auto type) {
    Rows<std::remove_pointer_t<decltype(math)>, std::remove_pointer_t<decltype(type)>>(block, line)
        .run(step, rows, columns, next);
  });
}
