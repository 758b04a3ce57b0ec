// The kernels, for one instruction set. No include guard: compiled once for each.
// clang-format off: each file needs those before it
#include "attention/product.h"
#include "attention/rotary.h"
#include "attention/forward.h"
#include "attention/backward.h"
// clang-format on
