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
#include <atomic>
#include <cmath>
#include <optional>
#include <type_traits>
#include <vector>

#include "attention/attention.h"
#include "block/problem.h"
#include "block/share.h"
#include "linear/linear.h"

#define KERNELS "block/rows.h"
#include "cpu/checks.h"
#include "cpu/isa.h"
#include "cpu/scratch.h"
#include "cpu/threads.h"

namespace revit {
namespace {

// Rows for each thread, below which threads share a product's columns instead: measured at 1 to 50 rows on 2 threads.
constexpr int64_t kFewRows = 24;
constexpr int64_t kMostKept = 64 << 20;  // bytes that a thread keeps from call to call: a huge batch gives its own back

bool is_bf16(const Tensor& x) { return x.scalar_type() == ScalarType::BFloat16; }

// `bytes` of the arena, in which whatever it held before is lost.
char* room(revit::Arena& arena, int64_t bytes) {
  arena.reserve(bytes);
  return arena.take<char>(bytes);
}

// What a step multiplies with; null where it is no product.
const Linear* weight_of(const Problem& p, Step step) {
  switch (step) {
    case Step::kQueriesKeysValues:
      return &p.to_qkv;
    case Step::kProjection:
      return &p.proj;
    case Step::kUp:
      return &p.fc1;
    case Step::kDown:
      return &p.fc2;
    default:
      return nullptr;
  }
}

// What will be multiplied with after that.
const Linear& weight_after(const Problem& p, Step step) {
  for (auto next = static_cast<int64_t>(step) + 1; next < kSteps; ++next)
    if (const Linear* weight = weight_of(p, static_cast<Step>(next))) return *weight;
  return *p.next;
}

enum class Half { kFirst, kSecond };

// Those of a half of a block that there is something to do for.
std::vector<Step> steps_of(Half half, const Shape& shape) {
  if (half == Half::kFirst) return {Step::kNorm1, Step::kQueriesKeysValues};
  std::vector<Step> steps;
  if (shape.stages[0]) steps.push_back(Step::kStageAttended);
  for (const Step step : {Step::kProjection, Step::kNorm2, Step::kUp}) steps.push_back(step);
  if (shape.stages[1]) steps.push_back(Step::kStageHidden);
  steps.push_back(Step::kDown);
  return steps;
}

using RunStep = void (*)(const Block&, Step, Span, Span, const char*, float*);

RunStep step_kernel() {
  static const RunStep kernel = EVERY_ISA_PICK(run_step);
  return kernel;
}

// Some rows through these steps, on the calling thread. memory: of the shape's line, and then of the rows
void run_steps(const Problem& p, const std::vector<Step>& steps, const Shape& shape, int64_t first, int64_t count,
               char* memory) {
  const Block block{p, first, count, memory + shape.line};
  for (const Step step : steps) {
    const Linear* weight = weight_of(p, step);
    step_kernel()(block, step, {0, count}, {0, weight ? weight->out : 0}, weight_after(p, step).panels,
                  reinterpret_cast<float*>(memory));
  }
}

// What one block reads: its norms' affines, and its weights as pack_cpu made them.
constexpr int64_t kTensors = 8, kHeadTensors = 3;

Norm norm_of(const Tensor& weight, const Tensor& bias, int64_t dim, double eps) {
  check("a norm's weight", weight, {kAny, dim}, ScalarType::Float);
  const int64_t lengths = weight.size(0);
  REVIT_CHECK(lengths > 0, "a norm's weight must be (lengths, ", dim, "), at least one");
  check("a norm's bias", bias, {lengths, dim}, ScalarType::Float);
  return {static_cast<const float*>(weight.data_ptr()), static_cast<const float*>(bias.data_ptr()), lengths,
          static_cast<float>(eps)};
}

// The memory of what lies between the halves of a block, for `rows` tokens.
struct Between {
  char *qkv, *attended;
  float* lse;

  static int64_t bytes(const Problem& p, int64_t rows, int64_t heads) {
    const int64_t number = p.is_bf16 ? 2 : 4;
    return aligned(rows * 3 * p.attended_dim * number) + aligned(rows * p.attended_dim * number) +
           aligned(rows * heads * 4);
  }
  Between(const Problem& p, int64_t rows, char* memory) {
    const int64_t number = p.is_bf16 ? 2 : 4;
    qkv = memory;
    attended = qkv + aligned(rows * 3 * p.attended_dim * number);
    lse = reinterpret_cast<float*>(attended + aligned(rows * p.attended_dim * number));
  }
};

void zero_rows(Tensor& x, int64_t first, int64_t last) {
  const int64_t row = x.size(1) * x.element_size();
  if (last > first) std::memset(static_cast<char*>(x.data_ptr()) + first * row, 0, (last - first) * row);
}

// One call: all blocks on all tokens.
struct Call {
  std::vector<Problem> problems;
  Shape shape;
  const int32_t* boundaries;
  int64_t images, tokens, heads, head_dim;
  float scale;
  int64_t threads = torch::stable::get_num_threads();

  int64_t begin() const { return boundaries[0]; }
  int64_t end() const { return boundaries[images]; }

  void attend(const Between& between, const Piece& piece) const {
    revit::attend_piece(problems[0].is_bf16, between.qkv, piece, heads, head_dim, scale, between.attended, between.lse);
  }

  // Each thread takes the next images that are left through all blocks.
  void share_groups(const std::vector<Group>& groups) const {
    const std::vector<Step> first = steps_of(Half::kFirst, shape), second = steps_of(Half::kSecond, shape);
    std::atomic<size_t> next{0};
    torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
      static thread_local revit::Arena of_rows, of_group;
      char* memory = room(of_rows, shape.line + shape.bytes(shape.rows));
      for (size_t g; (g = next.fetch_add(1, std::memory_order_relaxed)) < groups.size();) {
        const int64_t top = boundaries[groups[g].first], rows = boundaries[groups[g].last] - top;
        const Between between(problems[0], rows, room(of_group, Between::bytes(problems[0], rows, heads)));
        const int64_t parts = (rows + shape.rows - 1) / shape.rows;
        for (Problem problem : problems) {
          problem.qkv = between.qkv, problem.attended = between.attended, problem.between_first = top;
          auto each_part = [&](const std::vector<Step>& steps) {
            for (int64_t i = 0; i < parts; ++i) {
              const Span part = Span{top, top + rows}.part(i, parts);
              run_steps(problem, steps, shape, part.begin, part.size(), memory);
            }
          };
          each_part(first);
          for (int64_t image = groups[g].first; image < groups[g].last; ++image) {
            const int64_t length = boundaries[image + 1] - boundaries[image], at = boundaries[image] - top;
            for (int64_t head = 0; length && head < heads; ++head) attend(between, {head, at, length, at, length});
          }
          each_part(second);
        }
      }
    });
  }

  // All threads take one step after the other together.
  void share_steps() {
    static thread_local revit::Arena kept, of_thread;
    revit::Arena once;
    const int64_t rows = end() - begin(), of_between = Between::bytes(problems[0], tokens, heads);
    const bool few = rows < threads * kFewRows;
    const int64_t bytes = of_between + (few ? shape.bytes(rows) : 0);
    char* memory = room(bytes <= kMostKept ? kept : once, bytes);
    const Between between(problems[0], tokens, memory);
    const std::vector<Piece> pieces = pieces_of_attention();
    const std::vector<Span> parts = parts_of_rows();
    Phases phases;
    for (Problem& problem : problems) {
      problem.qkv = between.qkv, problem.attended = between.attended;
      const Block block{problem, begin(), rows, memory + of_between};
      for (const Half half : {Half::kFirst, Half::kSecond}) {
        const std::vector<Step> steps = steps_of(half, shape);
        if (few)
          for (const Step step : steps) share_step(block, step, phases);
        else
          phases.add(parts.size(), [&, steps](int64_t i, char* memory) {
            run_steps(problem, steps, shape, parts[i].begin, parts[i].size(), memory);
          });
        if (half == Half::kFirst) phases.add(pieces.size(), [&](int64_t i, char*) { attend(between, pieces[i]); });
      }
    }
    const int64_t own = shape.line + (few ? 0 : shape.bytes(shape.rows));
    torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) { phases.work(room(of_thread, own)); });
  }

 private:
  // The rows that a thread takes at a time: an even share of a few; of many, in the end fewer and fewer, so that none
  // waits long for another.
  std::vector<Span> parts_of_rows() const {
    std::vector<Span> parts;
    for (int64_t at = begin(), left; (left = end() - at) > 0; at = parts.back().end) {
      const int64_t rows = end() - begin();
      const int64_t fair = rows <= threads * shape.rows ? (rows + threads - 1) / threads : left / (2 * threads);
      parts.push_back({at, at + std::min(left, std::clamp(fair, std::min(kFewRows, shape.rows), shape.rows))});
    }
    return parts;
  }

  // Heads, and of few long images parts of them.
  std::vector<Piece> pieces_of_attention() const {
    std::vector<Piece> pieces;
    for (int64_t image = 0; image < images; ++image) {
      const Span all{boundaries[image], boundaries[image + 1]};
      const int64_t fitting = (all.size() + kFewRows - 1) / kFewRows;
      const int64_t parts = std::min(fitting, (threads + images * heads - 1) / (images * heads));
      for (int64_t i = 0; i < parts; ++i)
        for (int64_t head = 0; head < heads; ++head)
          pieces.push_back({head, all.part(i, parts).begin, all.part(i, parts).size(), all.begin, all.size()});
    }
    return pieces;
  }

  // Of a product a thread takes the next panel that is left, so that every weight is read once; else rows.
  void share_step(const Block& block, Step step, Phases& phases) const {
    const Problem& problem = block.problem;
    const int64_t rows = block.count;
    const Linear* weight = weight_of(problem, step);
    if (!weight) {
      const int64_t parts = std::clamp<int64_t>(rows / 4, 1, threads);
      return phases.add(parts, [=](int64_t i, char* line) {
        step_kernel()(block, step, Span{0, rows}.part(i, parts), {0, 0}, nullptr, reinterpret_cast<float*>(line));
      });
    }
    const int64_t wide = shape.panel, panels = (weight->out + wide - 1) / wide;
    const int64_t parts = std::min((2 * threads + panels - 1) / panels, (rows + 7) / 8);
    const int64_t apart = std::max<int64_t>(1, threads / parts);  // panels that are read at the same time
    phases.add(panels * parts, [=, &problem](int64_t i, char*) {
      const int64_t column = i / parts * wide, next = i / parts + apart;
      const Linear& then = next < panels ? *weight : weight_after(problem, step);
      step_kernel()(block, step, Span{0, rows}.part(i % parts, parts), {column, std::min(column + wide, weight->out)},
                    then.panels + next % panels * wide * then.in * then.unit, nullptr);
    });
  }
};

// The logits of each image's first token in the blocks' result; zeros for an image without tokens.
void classify(const Call& call, const std::vector<Tensor>& head, double eps, Tensor& logits) {
  Problem problem = call.problems[0];
  const int64_t dim = problem.dim, kind = problem.is_bf16 ? 1 : 0, images = call.images;
  const Layout layout = revit::layout(kind);
  problem.x = problem.y, problem.kind = static_cast<Kind>(kind);
  problem.norm1 = norm_of(head[0], head[1], dim, eps);
  static thread_local revit::Arena kept;
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
    revit::multiply(product, kind, problem.is_bf16, rows, images,
                    {begin * layout.panel, std::min(end * layout.panel, classes)}, nullptr, out);
  });
  for (int64_t i = 0; i < images; ++i)
    if (call.boundaries[i + 1] == call.boundaries[i]) zero_rows(logits, i, i + 1);
}

// What a call is given, but its weights. Returns where its images are.
Boundaries check_call(const Tensor& x, const Tensor& cu_seqlens, const std::optional<Tensor>& row, int64_t heads,
                      int64_t width, int64_t hidden, int64_t activation, int64_t kind) {
  check_rows("x", x, {kAny, kAny});
  check("x", x, {kAny, kAny}, x.scalar_type());
  check("row", row, {x.size(0)}, ScalarType::Int);
  for (const int64_t size : {x.size(1), width, hidden})
    REVIT_CHECK(size > 0 && size % 4 == 0 && size <= kMostWidth, "widths must be multiples of 4, at least 4, got ",
                size);
  REVIT_CHECK(heads > 0 && width % heads == 0, "proj must take heads * head_dim inputs, got ", width, " for ", heads,
              " heads");
  REVIT_CHECK(activation >= 0 && activation < static_cast<int64_t>(Activation::kNone), "there is no activation ",
              activation);
  REVIT_CHECK(kind == static_cast<int64_t>(Kind::kInt8) || kind == (is_bf16(x) ? 1 : 0),
              "weights must be of the dtype of x, or int8");
  return Boundaries("cu_seqlens", cu_seqlens, x.size(0));
}

// Blocks alike in all but their weights, from x to y.
Call call_of(std::vector<Problem> problems, const Boundaries& boundaries, int64_t heads, double scale) {
  const auto blocks = static_cast<int64_t>(problems.size());
  static const auto shape_of = EVERY_ISA_PICK(shape_of);
  const Shape shape = shape_of(problems[0]);
  const int64_t head_dim = problems[0].attended_dim / heads;
  Call call{std::move(problems), shape, boundaries.at, boundaries.images,
            boundaries.tokens,   heads, head_dim,      static_cast<float>(scale)};
  for (int64_t i = 0; i < blocks; ++i) call.problems[i].next = &call.problems[std::min(i + 1, blocks - 1)].to_qkv;
  return call;
}

void run(Call& call) {
  const Problem& p = call.problems[0];
  // multiplications of a token, and of a pair of them
  const double products = 4. * p.dim * p.attended_dim + 2. * p.dim * p.hidden;
  const std::vector<Group> groups = shares(call.boundaries, call.images, 2. * p.attended_dim / products, call.threads);
  if (!groups.empty())
    call.share_groups(groups);
  else if (call.end() > call.begin())
    call.share_steps();
}

// Rows of no image.
void zero_tail(const Call& call, Tensor& y) {
  zero_rows(y, 0, call.begin());
  zero_rows(y, call.end(), call.tokens);
}

}  // namespace

// x: (tokens, dim) fp32 or bf16; row: (tokens,) int32
// weights: of each block 8: the weight and bias of both norms, (lengths, dim) fp32; and as pack_cpu made them the
// weights to queries, keys and values, of proj, fc1 and fc2
// head: none, or 3: the final norm's weight and bias, (lengths, dim) fp32, and the weight to the classes, made by
// pack_cpu of the dtype of x
// Returns (tokens, dim); or with a head, (images, classes): of each image's first token.
Tensor blocks_cpu(const Tensor& x, const Tensor& cu_seqlens, const std::optional<Tensor>& row,
                  std::vector<Tensor> weights, double eps1, double eps2, int64_t heads, int64_t head_dim,
                  int64_t hidden, double scale, int64_t activation, int64_t kind, std::vector<Tensor> head,
                  double head_eps, int64_t classes) {
  REVIT_CHECK(heads > 0 && heads <= kMostWidth && head_dim > 0 && head_dim <= kMostWidth,
              "heads and head_dim must be at least 1, got ", heads, " and ", head_dim);
  const int64_t width = heads * head_dim;
  const Boundaries boundaries = check_call(x, cu_seqlens, row, heads, width, hidden, activation, kind);
  const int64_t tokens = boundaries.tokens, dim = x.size(1), images = boundaries.images;
  Tensor y = torch::stable::new_empty(x, {tokens, dim});
  const int64_t blocks = static_cast<int64_t>(weights.size()) / kTensors;
  REVIT_CHECK(blocks && static_cast<int64_t>(weights.size()) == blocks * kTensors, "each block has ", kTensors,
              " tensors, got ", weights.size());
  REVIT_CHECK(head.empty() || head.size() == kHeadTensors, "a head has ", kHeadTensors, " tensors, got ", head.size());
  if (!head.empty()) norm_of(head[0], head[1], dim, head_eps), packed_weight(head[2], is_bf16(x) ? 1 : 0, dim, classes);
  std::vector<Problem> problems;
  for (int64_t i = 0; i < blocks; ++i) {
    const Tensor* own = weights.data() + i * kTensors;
    problems.push_back({
        .x = i ? y.data_ptr() : x.data_ptr(),
        .y = y.data_ptr(),
        .row = row ? static_cast<const int32_t*>(row->data_ptr()) : nullptr,
        .dim = dim,
        .attended_dim = width,
        .hidden = hidden,
        .norm1 = norm_of(own[0], own[1], dim, eps1),
        .norm2 = norm_of(own[2], own[3], dim, eps2),
        .to_qkv = packed_weight(own[4], kind, dim, 3 * width),
        .proj = packed_weight(own[5], kind, width, dim),
        .fc1 = packed_weight(own[6], kind, dim, hidden),
        .fc2 = packed_weight(own[7], kind, hidden, dim),
        .activation = static_cast<Activation>(activation),
        .kind = static_cast<Kind>(kind),
        .is_bf16 = is_bf16(x),
    });
  }
  Call call = call_of(std::move(problems), boundaries, heads, scale);
  run(call);
  if (!head.empty()) {
    Tensor logits = torch::stable::new_empty(x, {images, classes});
    classify(call, head, head_eps, logits);
    return logits;
  }
  zero_tail(call, y);
  return y;
}

// One block, packing its weights in the call. norm1, norm2 and their biases: (lengths, dim) or (dim,) fp32 or bf16
Tensor block_cpu(const Tensor& x, const Tensor& cu_seqlens, const std::optional<Tensor>& row, const Tensor& norm1,
                 const Tensor& norm1_bias, const Tensor& qkv, const std::optional<Tensor>& qkv_bias, const Tensor& proj,
                 const std::optional<Tensor>& proj_bias, const std::optional<Tensor>& gamma1, const Tensor& norm2,
                 const Tensor& norm2_bias, const Tensor& fc1, const std::optional<Tensor>& fc1_bias, const Tensor& fc2,
                 const std::optional<Tensor>& fc2_bias, const std::optional<Tensor>& gamma2, double eps1, double eps2,
                 int64_t heads, double scale, int64_t activation, int64_t kind) {
  for (const Tensor* weight : {&proj, &fc1}) check_sizes("proj and fc1", *weight, {kAny, kAny});
  const int64_t width = proj.size(1), hidden = fc1.size(0);
  const Boundaries boundaries = check_call(x, cu_seqlens, row, heads, width, hidden, activation, kind);
  const int64_t tokens = boundaries.tokens, dim = x.size(1);
  const Tensor* norms[] = {&norm1, &norm1_bias, &norm2, &norm2_bias};
  Linear products[] = {linear(nullptr, kind, dim, 3 * width), linear(nullptr, kind, width, dim),
                       linear(nullptr, kind, dim, hidden), linear(nullptr, kind, hidden, dim)};
  const char* none = nullptr;
  int64_t bytes = 0;
  for (const Tensor* norm : norms) bytes += Arena::bytes<float>(norm->numel());
  for (const Linear& product : products) bytes += Arena::bytes<char>(product.end - none);
  static thread_local Arena kept;
  Arena once;
  Arena& memory = bytes <= kMostKept ? kept : once;
  memory.reserve(bytes);
  float* affine[4];
  for (int i = 0; i < 4; ++i) {
    REVIT_CHECK(norms[i]->numel() && norms[i]->numel() % dim == 0 && norms[i]->numel() == norms[i & 2]->numel(),
                "a norm's weight and bias must be (lengths, ", dim, ")");
    read_floats(*norms[i], affine[i] = memory.take<float>(norms[i]->numel()));
  }
  for (Linear& product : products)
    product = linear(memory.take<char>(product.end - none), kind, product.in, product.out);
  pack(qkv, qkv_bias, std::nullopt, kind, products[0]);
  pack(proj, proj_bias, gamma1, kind, products[1]);
  pack(fc1, fc1_bias, std::nullopt, kind, products[2]);
  pack(fc2, fc2_bias, gamma2, kind, products[3]);
  Tensor y = torch::stable::new_empty(x, {tokens, dim});
  Call call = call_of({{
                          .x = x.data_ptr(),
                          .y = y.data_ptr(),
                          .row = row ? static_cast<const int32_t*>(row->data_ptr()) : nullptr,
                          .dim = dim,
                          .attended_dim = width,
                          .hidden = hidden,
                          .norm1 = {affine[0], affine[1], norm1.numel() / dim, static_cast<float>(eps1)},
                          .norm2 = {affine[2], affine[3], norm2.numel() / dim, static_cast<float>(eps2)},
                          .to_qkv = products[0],
                          .proj = products[1],
                          .fc1 = products[2],
                          .fc2 = products[3],
                          .activation = static_cast<Activation>(activation),
                          .kind = static_cast<Kind>(kind),
                          .is_bf16 = is_bf16(x),
                      }},
                      boundaries, heads, scale);
  run(call);
  zero_tail(call, y);
  return y;
}

}  // namespace revit

STABLE_TORCH_LIBRARY_FRAGMENT(revit_kernels, m) {
  m.def(
      "blocks_cpu(Tensor x, Tensor cu_seqlens, Tensor? row, Tensor[] weights, float eps1, float eps2, int heads,"
      " int head_dim, int hidden, float scale, int activation, int kind, Tensor[] head, float head_eps, int classes)"
      " -> Tensor");
  m.def(
      "block_cpu(Tensor x, Tensor cu_seqlens, Tensor? row, Tensor norm1, Tensor norm1_bias, Tensor qkv,"
      " Tensor? qkv_bias, Tensor proj, Tensor? proj_bias, Tensor? gamma1, Tensor norm2, Tensor norm2_bias, Tensor fc1,"
      " Tensor? fc1_bias, Tensor fc2, Tensor? fc2_bias, Tensor? gamma2, float eps1, float eps2, int heads, float scale,"
      " int activation, int kind) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(revit_kernels, CPU, m) {
  m.impl("blocks_cpu", TORCH_BOX(&revit::blocks_cpu));
  m.impl("block_cpu", TORCH_BOX(&revit::block_cpu));
}
