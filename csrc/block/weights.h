// What a block multiplies and normalises with: from tensors that were packed, or packing them in the call.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <optional>
#include <vector>

#include "block/problem.h"
#include "cpu/checks.h"
#include "cpu/scratch.h"
#include "linear/linear.h"

namespace revit {
namespace {

// The fields of BlockWeights (revit_kernels/ops/block), in their order.
enum class Field : int64_t {
  kNorm1,
  kQkv,
  kProj,
  kNorm2,
  kFc1,
  kFc2,
  kNorm1Bias,
  kQkvBias,
  kQNorm,
  kQNormBias,
  kKNorm,
  kKNormBias,
  kAttendedNorm,
  kAttendedNormBias,
  kProjBias,
  kGamma1,
  kNorm2Bias,
  kFc1Bias,
  kFc1X,
  kFc1XBias,
  kHiddenNorm,
  kHiddenNormBias,
  kFc2Bias,
  kGamma2,
  kNone,
};
constexpr int64_t kFields = static_cast<int64_t>(Field::kNone), kRequired = 6;

// One block's tensors by field; null for those there are not.
class Weights {
 public:
  Weights(const Tensor* tensors, const std::vector<int64_t>& fields) {
    for (size_t i = 0; i < fields.size(); ++i) {
      REVIT_CHECK(fields[i] >= 0 && fields[i] < kFields, "there is no field ", fields[i], " of a block's weights");
      of_[fields[i]] = tensors + i;
    }
    for (int64_t i = 0; i < kRequired; ++i) REVIT_CHECK(of_[i], "a block needs field ", i, " of its weights");
  }
  const Tensor* operator[](Field field) const { return of_[static_cast<int64_t>(field)]; }
  std::optional<Tensor> optional(Field field) const {
    return (*this)[field] ? std::optional<Tensor>(*(*this)[field]) : std::nullopt;
  }

 private:
  const Tensor* of_[kFields + 1] = {};
};

// What blocks of one form have in common.
struct Form {
  int64_t dim, width, hidden, heads;
  std::vector<double> eps;  // of norm1, q_norm, k_norm, attended_norm, norm2, hidden_norm
  bool rms;
  int64_t activation, kind;
  bool is_bf16;
};

// product(weight, bias, gamma, in, out) gives a Linear, norm(weight, bias, dim, eps) a Norm, of fields of Weights.
template <class P, class N>
Problem problem_of(const Form& form, P product, N norm) {
  const int64_t dim = form.dim, width = form.width, head_dim = width / form.heads;
  const int64_t hidden = (form.hidden + 3) / 4 * 4;  // zeros in what is more: a product takes 4 inputs at a time
  Problem p{};
  p.dim = dim, p.attended_dim = width, p.hidden = hidden, p.normed = form.hidden, p.heads = form.heads,
  p.rms = form.rms;
  p.activation = static_cast<Activation>(form.activation), p.kind = static_cast<Kind>(form.kind);
  p.is_bf16 = form.is_bf16;
  p.norm1 = norm(Field::kNorm1, Field::kNorm1Bias, dim, form.eps[0]);
  p.to_qkv = product(Field::kQkv, Field::kQkvBias, Field::kNone, dim, 3 * width);
  p.q_norm = norm(Field::kQNorm, Field::kQNormBias, head_dim, form.eps[1]);
  p.k_norm = norm(Field::kKNorm, Field::kKNormBias, head_dim, form.eps[2]);
  p.attended_norm = norm(Field::kAttendedNorm, Field::kAttendedNormBias, width, form.eps[3]);
  p.proj = product(Field::kProj, Field::kProjBias, Field::kGamma1, width, dim);
  p.norm2 = norm(Field::kNorm2, Field::kNorm2Bias, dim, form.eps[4]);
  p.fc1 = product(Field::kFc1, Field::kFc1Bias, Field::kNone, dim, hidden);
  p.fc1_x = product(Field::kFc1X, Field::kFc1XBias, Field::kNone, dim, hidden);
  p.hidden_norm = norm(Field::kHiddenNorm, Field::kHiddenNormBias, form.hidden, form.eps[5]);
  p.fc2 = product(Field::kFc2, Field::kFc2Bias, Field::kGamma2, hidden, dim);
  return p;
}

inline Norm norm_of(const Tensor& weight, const Tensor& bias, int64_t dim, double eps) {
  check("a norm's weight", weight, {kAny, dim}, ScalarType::Float);
  const int64_t lengths = weight.size(0);
  REVIT_CHECK(lengths > 0, "a norm's weight must be (lengths, ", dim, "), at least one");
  check("a norm's bias", bias, {lengths, dim}, ScalarType::Float);
  return {static_cast<const float*>(weight.data_ptr()), static_cast<const float*>(bias.data_ptr()), lengths,
          static_cast<float>(eps)};
}

// Of norms in float32, and products that pack_cpu packed.
inline Problem problem_of_packed(const Form& form, const Weights& weights) {
  auto product = [&](Field weight, Field, Field, int64_t in, int64_t out) {
    return weights[weight] ? packed_weight(*weights[weight], form.kind, in, out) : Linear{};
  };
  auto norm = [&](Field weight, Field bias, int64_t dim, double eps) {
    if (!weights[weight]) return Norm{};
    REVIT_CHECK(weights[bias], "a norm's weight and bias must be packed together");
    return norm_of(*weights[weight], *weights[bias], dim, eps);
  };
  return problem_of(form, product, norm);
}

// The part of a divided block before that: a norm's weight and bias, the product to queries, keys and values, and the
// one behind attention, packed alike.
constexpr int64_t kTimeTensors = 4;
inline Problem problem_of_time(const Form& form, const Tensor* tensors, double eps) {
  Problem p = problem_of(form, [](auto...) { return Linear{}; }, [](auto...) { return Norm{}; });
  p.norm1 = norm_of(tensors[0], tensors[1], form.dim, eps);
  p.to_qkv = packed_weight(tensors[2], form.kind, form.dim, 3 * form.width);
  p.proj = packed_weight(tensors[3], form.kind, form.width, form.dim);
  p.of_time = true;
  return p;
}

// Of a block's parameters, fp32 or bf16, packed into memory that `reserve(bytes)` gives: an Arena's.
template <class F>
Problem problem_of_parameters(const Form& form, const Weights& weights, F reserve) {
  const char* none = nullptr;
  int64_t bytes = 0;
  problem_of(
      form,
      [&](Field weight, Field, Field, int64_t in, int64_t out) {
        const Linear product = linear(nullptr, form.kind, in, out);
        bytes += weights[weight] ? Arena::bytes<char>(product.end - none) : 0;
        return product;
      },
      [&](Field weight, Field bias, int64_t dim, double) {
        if (!weights[weight]) return Norm{};
        const int64_t count = weights[weight]->numel();
        REVIT_CHECK(count && count % dim == 0 && (!weights[bias] || weights[bias]->numel() == count),
                    "a norm's weight and bias must be (lengths, ", dim, ")");
        bytes += 2 * Arena::bytes<float>(count);
        return Norm{};
      });
  Arena& memory = reserve(bytes);
  return problem_of(
      form,
      [&](Field weight, Field bias, Field gamma, int64_t in, int64_t out) {
        if (!weights[weight]) return Linear{};
        const int64_t size = linear(nullptr, form.kind, in, out).end - none;
        const Linear product = linear(memory.take<char>(size), form.kind, in, out);
        pack(*weights[weight], weights.optional(bias), weights.optional(gamma), form.kind, product);
        return product;
      },
      [&](Field weight, Field bias, int64_t dim, double eps) {
        if (!weights[weight]) return Norm{};
        const int64_t count = weights[weight]->numel();
        float *scale = memory.take<float>(count), *shift = memory.take<float>(count);
        read_floats(*weights[weight], scale);
        if (weights[bias])
          read_floats(*weights[bias], shift);
        else
          std::memset(shift, 0, count * sizeof(float));
        return Norm{scale, shift, count / dim, static_cast<float>(eps)};
      });
}

}  // namespace
}  // namespace revit
