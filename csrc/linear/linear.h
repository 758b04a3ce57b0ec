// The matrix product on packed weights, for other ops of this library.
#pragma once

#include "cpu/packed.h"

namespace revit {

// How weights of a kind are laid out on this machine.
Layout layout(int64_t kind);

// A weight as pack_cpu made it.
Linear linear(char* packed, int64_t kind, int64_t in, int64_t out);

// y = activation(x W^T + bias (+ add)), on the calling thread. x: (rows, in) bf16 where the layout's unit has two
// bytes, else fp32; add, y: (rows, out) bf16 or fp32; add may be null; columns: of y, from a multiple of the layout's
// panel on
void multiply(const Linear& weight, int64_t kind, bool is_bf16, const void* x, int64_t rows, Span columns,
              const void* add, void* y, Activation activation = Activation::kNone);

}  // namespace revit

