// Attention on the CPU, for other ops of this library.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

namespace revit {

// Angles by which pairs of channels of queries and keys are turned; no cos where none are.
struct Rotation {
  const float *cos = nullptr, *sin = nullptr;  // (positions, pairs), or (positions, heads, pairs)
  const int32_t* row = nullptr;                // (tokens,), negative for a token that stays as it is
  int64_t position = 0, head = 0;              // strides; that of heads is 0 where they share their angles
  int64_t pairs = 0;
  bool half = false;  // channel c belongs to c + pairs, not to its neighbour
};

// What these say of queries and keys (tokens, heads, head_dim), checked; nothing without cos.
Rotation rotation_of(const std::optional<torch::stable::Tensor>& cos, const std::optional<torch::stable::Tensor>& sin,
                     const std::optional<torch::stable::Tensor>& row, bool half, int64_t tokens, int64_t heads,
                     int64_t head_dim);

// One head of some queries of one image, with all its keys.
struct Piece {
  int64_t head, first_query, queries, first_key, keys;
};

// Attention of one piece, on the calling thread.
// qkv: (tokens, 3, heads, head_dim), bf16 (as its bits) or fp32; y: (tokens, heads, head_dim) of the same type
// lse: (tokens, heads)
void attend_piece(bool is_bf16, const void* qkv, const Piece& piece, int64_t heads, int64_t head_dim, float scale,
                  const Rotation& rotation, void* y, float* lse);

}  // namespace revit
