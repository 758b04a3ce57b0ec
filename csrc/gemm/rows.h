// Packing, and the product by itself. No include guard: compiled once per instruction set.

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

// y = x W^T + bias (+ add). x: (rows, in) of the numbers that layout_of names; add, y: (rows, out) bf16 or fp32
inline void multiply(const Linear& weight, Kind kind, bool is_bf16, const void* x, int64_t rows, Span columns,
                     const void* add, void* y) {
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
                auto put = [&](auto n) { store(out + at, added ? sum + load(added + at, n) : sum, n); };
                if (column + kLanes <= stride)
                  put(Full{});
                else
                  put(Part{stride - column});
              }
          });
    }
  });
}
