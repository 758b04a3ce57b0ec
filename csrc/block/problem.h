// What one call of a block computes.
#pragma once

#include <cstdint>

#include "attention/attention.h"
#include "cpu/packed.h"

namespace revit {
namespace {

// Of LayerNorm or, without a mean, of RmsNorm. No weight: there is no such norm.
struct Norm {
  const float *weight = nullptr, *bias = nullptr;  // (lengths, dim)
  int64_t lengths = 0;
  float eps = 0;
};

// x, qkv, attended, y are of the activations' type: fp32 or bf16.
struct Problem {
  const void *x, *attended;
  void *qkv, *y;
  int64_t between_first;  // the token that qkv and attended begin with
  const int32_t* row;     // which affine each token uses; null: the first
  int64_t dim, attended_dim, hidden, heads;
  int64_t normed;  // of the hidden layer; the rest is zeros
  Norm norm1, q_norm, k_norm, attended_norm, norm2, hidden_norm;
  bool rms;
  Linear to_qkv, proj, fc1, fc1_x, fc2;  // fc1_x without panels: the MLP has no gate
  Activation activation;
  Rotation rotation;
  float scale;         // of attention
  bool of_time;        // attention is across a clip's frames, and leaves its classes alone; there is no norm2, no MLP
  Kind kind;           // of the weights
  bool is_bf16;        // the activations
  const Linear* next;  // what is multiplied with after these
};

// What a block does to some rows of tokens, in this order, with attention after kNormQueriesKeys. The products take
// some of their columns, all else whole rows.
enum class Step : int64_t {
  kNorm1,
  kQueriesKeysValues,
  kNormQueriesKeys,
  kNormAttended,
  kStageAttended,  // for the product; nothing to do where attention, or its norm, gives what it takes
  kProjection,
  kNorm2,
  kUp,
  kGate,
  kNormHidden,
  kStageHidden,
  kDown,
};
constexpr int64_t kSteps = 12;

// How the kernels for a problem want it.
struct Shape {
  int64_t rows;           // how many a thread takes through all steps at a time
  int64_t panel;          // columns: of a product
  bool stages[2];         // kStageAttended, kStageHidden
  int64_t per_row, line;  // memory: of each row; and a thread's own

  int64_t bytes(int64_t rows) const { return aligned(per_row * rows) + 8 * kAlign; }
};

// Some rows of tokens on their way through a block.
struct Block {
  const Problem& problem;
  int64_t first, count;
  char* memory;
};

}  // namespace
}  // namespace revit
