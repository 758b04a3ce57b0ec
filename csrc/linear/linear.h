// The matrix product on packed weights, for other ops of this library.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "cpu/packed.h"

namespace revit {

// How weights of a kind are laid out on this machine.
Layout layout(int64_t kind);

constexpr int64_t kMostWidth = 1 << 28;  // of a weight: no product of two of them and a size overflows

// A weight as pack_cpu makes it, in memory at `packed`.
Linear linear(char* packed, int64_t kind, int64_t in, int64_t out);

// The weight that pack_cpu made.
Linear packed_weight(const torch::stable::Tensor& packed, int64_t kind, int64_t in, int64_t out);

// Packs a weight (out, in) fp32 or bf16, and what is added to and multiplied with its product, (out,) fp32 or bf16
// each. All threads share it.
void pack(const torch::stable::Tensor& weight, const std::optional<torch::stable::Tensor>& bias,
          const std::optional<torch::stable::Tensor>& gamma, int64_t kind, const Linear& to);

// The numbers of a contiguous tensor, fp32 or bf16.
void read_floats(const torch::stable::Tensor& from, float* to);

// y = activation(x W^T + bias (+ add)), on the calling thread. x: (rows, in) bf16 where the layout's unit has two
// bytes, else fp32; add, y: (rows, out) bf16 or fp32; add may be null; columns: of y, from a multiple of the layout's
// panel on
void multiply(const Linear& weight, int64_t kind, bool is_bf16, const void* x, int64_t rows, Span columns,
              const void* add, void* y, Activation activation = Activation::kNone);

}  // namespace revit
