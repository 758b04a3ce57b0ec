// Pre-norm blocks of packed tokens on the CPU, at inference: norm, queries, keys and values; attention; then output
// projection, norm and MLP, with both residual adds. Tokens go through in rows that stay in a core's cache, against
// weights packed beforehand. A row's arithmetic does not depend on the rows beside it, nor on how rows are shared out.
//
// Many images: a thread takes a few of them through all blocks by itself, and waits for nobody. Else all threads share
// each block: rows, or where there are few, the columns of each product, so that each weight is read once.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <type_traits>
#include <vector>

#include "block/problem.h"
#include "block/weights.h"
#include "linear/linear.h"

#define KERNELS "block/rows.h"
#include "cpu/checks.h"
#include "cpu/isa.h"
// clang-format off: it calls the kernels
#include "block/call.h"
// clang-format on

namespace revit {
namespace {

constexpr int64_t kHeadTensors = 3;

bool is_bf16(const Tensor& x) { return x.scalar_type() == ScalarType::BFloat16; }

void zero_rows(Tensor& x, int64_t first, int64_t last) {
  const int64_t row = x.size(1) * x.element_size();
  if (last > first) std::memset(static_cast<char*>(x.data_ptr()) + first * row, 0, (last - first) * row);
}

// The logits of each image's first token in the blocks' result; zeros for an image without tokens.
void classify(const Call& call, const std::vector<Tensor>& head, double eps, Tensor& logits) {
  Problem problem = call.problems[0];
  const int64_t dim = problem.dim, kind = problem.is_bf16 ? 1 : 0, images = call.images;
  const Layout layout = revit::layout(kind);
  problem.x = problem.y, problem.kind = static_cast<Kind>(kind), problem.rms = false;
  problem.norm1 = norm_of(head[0], head[1], dim, eps);
  static thread_local Arena kept;
  char* line = room(kept, call.shape.line + aligned(images * dim * layout.unit));
  char* rows = line + call.shape.line;
  for (int64_t i = 0; i < images; ++i)  // a row is normalised to where the first of a block's rows are
    if (call.boundaries[i + 1] > call.boundaries[i])
      step_kernel()({problem, call.boundaries[i], 1, rows + i * dim * layout.unit}, Step::kNorm1, {0, 1}, {0, 0},
                    nullptr, reinterpret_cast<float*>(line));
  const int64_t classes = logits.size(1);
  const Linear product = packed_weight(head[2], kind, dim, classes);
  char* out = static_cast<char*>(logits.data_ptr());
  const int64_t panels = (classes + layout.panel - 1) / layout.panel;
  torch::stable::parallel_for(0, panels, 4, [&](int64_t begin, int64_t end) {
    multiply(product, kind, problem.is_bf16, rows, images,
             {begin * layout.panel, std::min(end * layout.panel, classes)}, nullptr, out);
  });
  for (int64_t i = 0; i < images; ++i)
    if (call.boundaries[i + 1] == call.boundaries[i]) zero_rows(logits, i, i + 1);
}

// What a call is given, but its weights. Returns where its images are.
Boundaries check_call(const Tensor& x, const Tensor& cu_seqlens, const std::optional<Tensor>& row, const Form& form) {
  check_rows("x", x, {kAny, kAny});
  check("x", x, {kAny, kAny}, x.scalar_type());
  check("row", row, {x.size(0)}, ScalarType::Int);
  for (const int64_t size : {form.dim, form.width})
    REVIT_CHECK(size > 0 && size % 4 == 0 && size <= kMostWidth, "widths must be multiples of 4, at least 4, got ",
                size);
  REVIT_CHECK(form.hidden > 0 && form.hidden <= kMostWidth, "the hidden layer must have at least 1 number, got ",
              form.hidden);
  REVIT_CHECK(form.heads > 0 && form.width % form.heads == 0, "proj must take heads * head_dim inputs, got ",
              form.width, " for ", form.heads, " heads");
  REVIT_CHECK(form.eps.size() == 6, "eps must be of 6 norms, got ", form.eps.size());
  REVIT_CHECK(form.activation >= 0 && form.activation <= static_cast<int64_t>(Activation::kSilu) &&
                  form.activation != static_cast<int64_t>(Activation::kNone),
              "there is no activation ", form.activation);
  REVIT_CHECK(form.kind == static_cast<int64_t>(Kind::kInt8) || form.kind == (is_bf16(x) ? 1 : 0),
              "weights must be of the dtype of x, or int8");
  return Boundaries("cu_seqlens", cu_seqlens, x.size(0));
}

// Of each block its own angles, or the same for all; none where there is no cos.
std::vector<Rotation> rotations_of(const std::vector<Tensor>& cos, const std::vector<Tensor>& sin,
                                   const std::optional<Tensor>& row, bool half, const Form& form, int64_t tokens) {
  REVIT_CHECK(cos.size() == sin.size() && cos.empty() == !row, "cos, sin and their row must be given together");
  std::vector<Rotation> rotations;
  for (size_t i = 0; i < cos.size(); ++i)
    rotations.push_back(rotation_of(cos[i], sin[i], row, half, tokens, form.heads, form.width / form.heads));
  return rotations;
}

// How many frames each clip has: its tokens are as many for each of them.
const int32_t* check_frames(const Tensor& frames, const Boundaries& boundaries) {
  check("frames", frames, {boundaries.images}, ScalarType::Int);
  const auto* counts = static_cast<const int32_t*>(frames.data_ptr());
  for (int64_t i = 0; i < boundaries.images; ++i)
    REVIT_CHECK(!boundaries.length(i) || (counts[i] > 0 && boundaries.length(i) % counts[i] == 0),
                "frames must share the ", boundaries.length(i), " tokens of their clip evenly, got ", counts[i]);
  return counts;
}

// Blocks of one form, from x to y.
Call call_of(std::vector<Problem> problems, const std::vector<Rotation>& rotations, const Tensor& x, Tensor& y,
             const Boundaries& boundaries, const int32_t* frames, const std::optional<Tensor>& row) {
  const auto blocks = static_cast<int64_t>(problems.size());
  REVIT_CHECK(rotations.size() <= 1 || rotations.size() == problems.size(), "there must be angles for each of ", blocks,
              " blocks, one for all, or none, got ", rotations.size());
  static const auto shape_of = EVERY_ISA_PICK(shape_of);
  const Shape shape = shape_of(problems.back());
  Call call{std::move(problems), shape, boundaries.at, boundaries.images, boundaries.tokens, frames};
  for (int64_t i = 0; i < blocks; ++i) {
    Problem& p = call.problems[i];
    p.x = i || frames ? y.data_ptr() : x.data_ptr(), p.y = y.data_ptr();
    p.row = row ? static_cast<const int32_t*>(row->data_ptr()) : nullptr;
    if (!rotations.empty()) p.rotation = rotations[rotations.size() == 1 ? 0 : i];
    p.next = &call.problems[std::min(i + 1, blocks - 1)].to_qkv;
  }
  return call;
}

// What is between the first image and the last, from x to y: of clips, time leaves some of it alone.
void copy_rows(const Call& call, const Tensor& x, Tensor& y) {
  const int64_t row = x.size(1) * x.element_size(), first = call.begin() * row;
  std::memcpy(static_cast<char*>(y.data_ptr()) + first, static_cast<const char*>(x.data_ptr()) + first,
              (call.end() - call.begin()) * row);
}

// Rows of no image.
void zero_tail(const Call& call, Tensor& y) {
  zero_rows(y, 0, call.begin());
  zero_rows(y, call.end(), call.tokens);
}

}  // namespace

// x: (tokens, dim) fp32 or bf16; row: (tokens,) int32
// weights: of each block those fields of BlockWeights: norms (lengths, dim) fp32, and products as pack_cpu made them
// cos, sin: none, one for all blocks, or one for each; rotary_row: (tokens,) int32
// head: none, or 3: the final norm's weight and bias, (lengths, dim) fp32, and the weight to the classes, made by
// pack_cpu of the dtype of x
// frames, time: none; or how many frames each clip has, (clips,) int32, and of each block 4 tensors, as problem_of_time
// takes them: blocks of divided attention, of clips in place of images, whose frames each begin with a copy of the
// class
// Returns (tokens, dim); or with a head, (images, classes): of each image's first token.
Tensor blocks_cpu(const Tensor& x, const Tensor& cu_seqlens, const std::optional<Tensor>& row,
                  std::vector<Tensor> weights, std::vector<int64_t> fields, std::vector<double> eps, bool rms,
                  int64_t heads, int64_t width, int64_t hidden, double scale, int64_t activation, int64_t kind,
                  std::vector<Tensor> cos, std::vector<Tensor> sin, const std::optional<Tensor>& rotary_row, bool half,
                  std::vector<Tensor> head, double head_eps, int64_t classes, const std::optional<Tensor>& frames,
                  std::vector<Tensor> time, double time_eps, double time_scale) {
  check_sizes("x", x, {kAny, kAny});
  const Form form{x.size(1), width, hidden, heads, std::move(eps), rms, activation, kind, is_bf16(x)};
  const Boundaries boundaries = check_call(x, cu_seqlens, row, form);
  const int64_t tokens = boundaries.tokens, images = boundaries.images;
  const auto each = static_cast<int64_t>(fields.size()), given = static_cast<int64_t>(weights.size());
  REVIT_CHECK(each && given && given % each == 0, "each block has ", each, " tensors, got ", given);
  REVIT_CHECK(head.empty() || head.size() == kHeadTensors, "a head has ", kHeadTensors, " tensors, got ", head.size());
  if (!head.empty())
    norm_of(head[0], head[1], form.dim, head_eps), packed_weight(head[2], form.is_bf16 ? 1 : 0, form.dim, classes);
  const int64_t blocks = given / each, of_time = static_cast<int64_t>(time.size());
  REVIT_CHECK(of_time == (frames ? blocks * kTimeTensors : 0), "blocks of clips have frames, and ", kTimeTensors,
              " tensors of time each, got ", of_time, " for ", blocks, " blocks");
  REVIT_CHECK(!frames || cos.empty(), "there is no rotation in blocks of clips");
  const int32_t* counts = frames ? check_frames(*frames, boundaries) : nullptr;
  std::vector<Problem> problems;
  for (int64_t i = 0; i < blocks; ++i) {
    if (frames) {
      problems.push_back(problem_of_time(form, time.data() + i * kTimeTensors, time_eps));
      problems.back().scale = static_cast<float>(time_scale);
    }
    problems.push_back(problem_of_packed(form, {weights.data() + i * each, fields}));
    problems.back().scale = static_cast<float>(scale);
  }
  Tensor y = torch::stable::new_empty(x, {tokens, x.size(1)});
  const std::vector<Rotation> rotations = rotations_of(cos, sin, rotary_row, half, form, tokens);
  Call call = call_of(std::move(problems), rotations, x, y, boundaries, counts, row);
  if (frames && call.end() > call.begin()) copy_rows(call, x, y);
  call.run();
  if (!head.empty()) {
    Tensor logits = torch::stable::new_empty(x, {images, classes});
    classify(call, head, head_eps, logits);
    return logits;
  }
  zero_tail(call, y);
  return y;
}

// One block, packing its weights in the call: those fields of BlockWeights, as they are there.
Tensor block_cpu(const Tensor& x, const Tensor& cu_seqlens, const std::optional<Tensor>& row,
                 std::vector<Tensor> weights, std::vector<int64_t> fields, std::vector<double> eps, bool rms,
                 int64_t heads, int64_t width, int64_t hidden, double scale, int64_t activation, int64_t kind,
                 const std::optional<Tensor>& cos, const std::optional<Tensor>& sin,
                 const std::optional<Tensor>& rotary_row, bool half) {
  check_sizes("x", x, {kAny, kAny});
  const Form form{x.size(1), width, hidden, heads, std::move(eps), rms, activation, kind, is_bf16(x)};
  const Boundaries boundaries = check_call(x, cu_seqlens, row, form);
  REVIT_CHECK(weights.size() == fields.size(), "there must be a tensor for each field, got ", weights.size(), " for ",
              fields.size());
  const Weights own(weights.data(), fields);
  static thread_local Arena kept;
  Arena once;
  Problem problem = problem_of_parameters(form, own, [&](int64_t bytes) -> Arena& {
    Arena& memory = bytes <= kMostKept ? kept : once;
    memory.reserve(bytes);
    return memory;
  });
  problem.scale = static_cast<float>(scale);
  std::vector<Tensor> cosines, sines;
  if (cos && sin) cosines.push_back(*cos), sines.push_back(*sin);
  const std::vector<Rotation> rotations = rotations_of(cosines, sines, rotary_row, half, form, boundaries.tokens);
  Tensor y = torch::stable::new_empty(x, {boundaries.tokens, form.dim});
  Call call = call_of({problem}, rotations, x, y, boundaries, nullptr, row);
  call.run();
  zero_tail(call, y);
  return y;
}

}  // namespace revit

STABLE_TORCH_LIBRARY_FRAGMENT(revit_kernels, m) {
  m.def(
      "blocks_cpu(Tensor x, Tensor cu_seqlens, Tensor? row, Tensor[] weights, int[] fields, float[] eps, bool rms,"
      " int heads, int width, int hidden, float scale, int activation, int kind, Tensor[] cos, Tensor[] sin,"
      " Tensor? rotary_row, bool half, Tensor[] head, float head_eps, int classes, Tensor? frames, Tensor[] time,"
      " float time_eps, float time_scale) -> Tensor");
  m.def(
      "block_cpu(Tensor x, Tensor cu_seqlens, Tensor? row, Tensor[] weights, int[] fields, float[] eps, bool rms,"
      " int heads, int width, int hidden, float scale, int activation, int kind, Tensor? cos, Tensor? sin,"
      " Tensor? rotary_row, bool half) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(revit_kernels, CPU, m) {
  m.impl("blocks_cpu", TORCH_BOX(&revit::blocks_cpu));
  m.impl("block_cpu", TORCH_BOX(&revit::block_cpu));
}
