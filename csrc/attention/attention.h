// Attention on the CPU, for other ops of this library.
#pragma once

#include <cstdint>

namespace revit_attention {

// qkv: (tokens, 3, heads, head_dim), bf16 (as its bits) or fp32; y: (tokens, heads, head_dim) of the same type
// cu_seqlens: (images + 1,), each within the tokens; lse: (tokens, heads)
// Rows of no image are left as they are.
void attend(bool is_bf16, const void* qkv, const int32_t* cu_seqlens, int64_t images, int64_t tokens, int64_t heads,
            int64_t head_dim, float scale, void* y, float* lse);

// The same for one image, on the calling thread: its tokens are [first, first + length).
void attend_image(bool is_bf16, const void* qkv, int64_t first, int64_t length, int64_t heads, int64_t head_dim,
                  float scale, void* y, float* lse);

}  // namespace revit_attention
