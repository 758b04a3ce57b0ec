// Attention on the CPU, for other ops of this library.
#pragma once

#include <cstdint>

namespace revit {

// One head of some queries of one image, with all its keys.
struct Piece {
  int64_t head, first_query, queries, first_key, keys;
};

// Attention of one piece, on the calling thread. qkv: (tokens, 3, heads, head_dim), bf16 (as its bits) or fp32;
// y: (tokens, heads, head_dim) of the same type; lse: (tokens, heads)
void attend_piece(bool is_bf16, const void* qkv, const Piece& piece, int64_t heads, int64_t head_dim, float scale,
                  void* y, float* lse);

}  // namespace revit
