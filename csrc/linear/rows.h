// Packing, and the product by itself. No include guard: compiled once per instruction set.

#include "block/activation.h"
#include "cpu/matmul.h"

// Bytes of a weight in its panels, and the lanes that its columns are rounded up to; 0 for a kind there is not here.
inline Layout layout_of(Kind kind) {
#ifdef BFLOAT16_INSTRUCTIONS
  if (kind == Kind::kInt8) return {1, kLanes, kWidth};
  if (kind == Kind::kBfloat16) return {2, kLanes, kWidth};
#endif
  return {kind == Kind::kInt8 ? 0 : 4, kLanes, kWidth};
}

template <class From>
inline void pack_as(Kind kind, const From* weight, const Linear& to, Span columns) {
#ifdef BFLOAT16_INSTRUCTIONS
  if (kind == Kind::kInt8) return pack_int8(weight, to, columns);
  if (kind == Kind::kBfloat16) {
    if constexpr (sizeof(From) == 2) return pack_words<Pairs>(weight, to, columns);
    return pack<Pairs>(to, columns, [&](int64_t n, int64_t k) { return convert<Bfloat16>(weight[n * to.in + k]); });
  }
#endif
  if constexpr (sizeof(From) == 4) return pack_words<Singles>(weight, to, columns);
  pack<Singles>(to, columns, [&](int64_t n, int64_t k) { return convert<float>(weight[n * to.in + k]); });
}

// Some columns of the product, from a panel's first to a panel's last.
inline void pack_weight(Kind kind, bool is_bf16, const void* weight, const Linear& to, Span columns) {
  if (is_bf16)
    pack_as(kind, static_cast<const Bfloat16*>(weight), to, columns);
  else
    pack_as(kind, static_cast<const float*>(weight), to, columns);
}

inline void widen_row(const void* x, int64_t count, float* y) {
  for (int64_t i = 0; i < count; ++i) y[i] = convert<float>(static_cast<const Bfloat16*>(x)[i]);
}

template <class T>
inline Floats activated(Activation activation, Floats x) {
  constexpr bool kShort = !std::is_same_v<T, float>;
  switch (activation) {
    case Activation::kGelu:
      return activate<Activation::kGelu, kShort>(x);
    case Activation::kGeluTanh:
      return activate<Activation::kGeluTanh, kShort>(x);
    case Activation::kQuickGelu:
      return activate<Activation::kQuickGelu, kShort>(x);
    case Activation::kSilu:
      return activate<Activation::kSilu, kShort>(x);
    default:
      return x;
  }
}

// y = activation(x W^T + bias (+ add)). x: (rows, in) of the numbers that layout_of names; add, y: (rows, out) bf16 or
// fp32
inline void multiply(const Linear& weight, Kind kind, bool is_bf16, const void* x, int64_t rows, Span columns,
                     const void* add, void* y, Activation activation) {
  with_types(kind, is_bf16, [&](auto math, auto type) {
    using Math = std::remove_pointer_t<decltype(math)>;
    using T = std::remove_pointer_t<decltype(type)>;
    if constexpr (std::is_same_v<typename Math::Number, float>) {
      const T* added = static_cast<const T*>(add);
      T* out = static_cast<T*>(y);
      const int64_t stride = weight.out;
      const float* bias = weight.bias;
      product<Math>(
          weight, static_cast<const typename Math::Unit*>(x), {0, rows}, columns, weight.panels,
          [](int64_t, int64_t, int64_t) {},
          [&](int64_t top, int64_t rows, int64_t left, int64_t vectors, const float* sums) {
            for (int64_t r = top; r < top + rows; ++r)
              for (int64_t v = 0; v < vectors; ++v, sums += kLanes) {
                const int64_t column = left + v * kLanes, at = r * stride + column;
                const Floats sum = load(sums, Full{}) + load(bias + column, Full{});
                auto put = [&](auto n) {
                  store(out + at, activated<T>(activation, added ? sum + load(added + at, n) : sum), n);
                };
                if (column + kLanes <= stride)
                  put(Full{});
                else
                  put(Part{stride - column});
              }
          });
    }
  });
}
