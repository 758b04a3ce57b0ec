// Attention across the frames of clips on the CPU, for other ops of this library.
#pragma once

#include <cstdint>

namespace revit {

// Positions of a clip: each has a row in each frame, `stride` rows apart. first: the row of the first one in frame 0
struct Clip {
  int64_t first, positions, stride, frames;
};

// Attention of each of these positions across its frames, on the calling thread.
// qkv: (tokens, 3, heads, head_dim), bf16 (as its bits) or fp32; y: (tokens, heads, head_dim) of the same type
// lse: (tokens, heads)
void attend_frames(bool is_bf16, const void* qkv, const Clip& clip, int64_t heads, int64_t head_dim, float scale,
                   void* y, float* lse);

}  // namespace revit
