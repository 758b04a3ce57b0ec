// The kernels for one instruction set: included once for each, inside a namespace of its own.
// clang-format off: each file needs those before it
#include "vector.h"
#include "product.h"
#include "forward.h"
#include "backward.h"
// clang-format on
