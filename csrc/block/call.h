// One call: all blocks on all tokens, and how threads share it. Included after block/rows.h, for each instruction set.
#pragma once

#include <algorithm>
#include <atomic>
#include <vector>

#include "block/problem.h"
#include "block/share.h"
#include "cpu/scratch.h"
#include "cpu/threads.h"

namespace revit {
namespace {

// Rows for each thread, below which threads share a product's columns instead: measured at 1 to 50 rows on 2 threads.
constexpr int64_t kFewRows = 24;
constexpr int64_t kMostKept = 64 << 20;  // bytes that a thread keeps from call to call: a huge batch gives its own back

// `bytes` of the arena, in which whatever it held before is lost.
inline char* room(Arena& arena, int64_t bytes) {
  arena.reserve(bytes);
  return arena.take<char>(bytes);
}

// What a step multiplies with; null where it is no product.
inline const Linear* weight_of(const Problem& p, Step step) {
  switch (step) {
    case Step::kQueriesKeysValues:
      return &p.to_qkv;
    case Step::kProjection:
      return &p.proj;
    case Step::kUp:
      return &p.fc1;
    case Step::kGate:
      return p.fc1_x.panels ? &p.fc1_x : nullptr;
    case Step::kDown:
      return &p.fc2;
    default:
      return nullptr;
  }
}

// What will be multiplied with after that.
inline const Linear& weight_after(const Problem& p, Step step) {
  for (auto next = static_cast<int64_t>(step) + 1; next < kSteps; ++next)
    if (const Linear* weight = weight_of(p, static_cast<Step>(next))) return *weight;
  return *p.next;
}

enum class Half { kFirst, kSecond };

// Those of a half of a block that there is something to do for.
inline std::vector<Step> steps_of(Half half, const Problem& p, const Shape& shape) {
  std::vector<Step> steps;
  auto add = [&](Step step, bool needed = true) {
    if (needed) steps.push_back(step);
  };
  if (half == Half::kFirst) {
    add(Step::kNorm1), add(Step::kQueriesKeysValues);
    add(Step::kNormQueriesKeys, p.q_norm.weight || p.k_norm.weight);
    return steps;
  }
  add(Step::kNormAttended, p.attended_norm.weight),
      add(Step::kStageAttended, !p.attended_norm.weight && shape.stages[0]);
  add(Step::kProjection), add(Step::kNorm2), add(Step::kUp), add(Step::kGate, p.fc1_x.panels);
  add(Step::kNormHidden, p.hidden_norm.weight), add(Step::kStageHidden, !p.hidden_norm.weight && shape.stages[1]);
  add(Step::kDown);
  return steps;
}

using RunStep = void (*)(const Block&, Step, Span, Span, const char*, float*);

inline RunStep step_kernel() {
  static const RunStep kernel = EVERY_ISA_PICK(run_step);
  return kernel;
}

// Some rows through these steps, on the calling thread. memory: of the shape's line, and then of the rows
inline void run_steps(const Problem& p, const std::vector<Step>& steps, const Shape& shape, int64_t first,
                      int64_t count, char* memory) {
  const Block block{p, first, count, memory + shape.line};
  for (const Step step : steps) {
    const Linear* weight = weight_of(p, step);
    step_kernel()(block, step, {0, count}, {0, weight ? weight->out : 0}, weight_after(p, step).panels,
                  reinterpret_cast<float*>(memory));
  }
}

// The memory of what lies between the halves of a block, for `rows` tokens.
struct Between {
  char *qkv, *attended;
  float* lse;

  static int64_t bytes(const Problem& p, int64_t rows) {
    const int64_t number = p.is_bf16 ? 2 : 4;
    return aligned(rows * 3 * p.attended_dim * number) + aligned(rows * p.attended_dim * number) +
           aligned(rows * p.heads * 4);
  }
  Between(const Problem& p, int64_t rows, char* memory) {
    const int64_t number = p.is_bf16 ? 2 : 4;
    qkv = memory;
    attended = qkv + aligned(rows * 3 * p.attended_dim * number);
    lse = reinterpret_cast<float*>(attended + aligned(rows * p.attended_dim * number));
  }
};

struct Call {
  std::vector<Problem> problems;
  Shape shape;
  const int32_t* boundaries;
  int64_t images, tokens;
  float scale;
  int64_t threads = torch::stable::get_num_threads();

  int64_t begin() const { return boundaries[0]; }
  int64_t end() const { return boundaries[images]; }

  void run() {
    const Problem& p = problems[0];
    // multiplications of a token, and of a pair of them
    const int64_t ways = p.fc1_x.panels ? 3 : 2;
    const double products = 4. * p.dim * p.attended_dim + static_cast<double>(ways) * p.dim * p.hidden;
    const std::vector<Group> groups = shares(boundaries, images, 2. * p.attended_dim / products, threads);
    if (!groups.empty())
      share_groups(groups);
    else if (end() > begin())
      share_steps();
  }

 private:
  // piece: of the tokens from the problem's first on
  void attend(const Problem& p, const Between& between, const Piece& piece) const {
    Rotation rotation = p.rotation;
    rotation.row += rotation.cos ? p.between_first : 0;
    attend_piece(p.is_bf16, between.qkv, piece, p.heads, p.attended_dim / p.heads, scale, rotation, between.attended,
                 between.lse);
  }

  // Each thread takes the next images that are left through all blocks.
  void share_groups(const std::vector<Group>& groups) const {
    const std::vector<Step> first = steps_of(Half::kFirst, problems[0], shape);
    const std::vector<Step> second = steps_of(Half::kSecond, problems[0], shape);
    std::atomic<size_t> next{0};
    torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
      static thread_local Arena of_rows, of_group;
      char* memory = room(of_rows, shape.line + shape.bytes(shape.rows));
      for (size_t g; (g = next.fetch_add(1, std::memory_order_relaxed)) < groups.size();) {
        const int64_t top = boundaries[groups[g].first], rows = boundaries[groups[g].last] - top;
        const Between between(problems[0], rows, room(of_group, Between::bytes(problems[0], rows)));
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
            for (int64_t head = 0; length && head < problem.heads; ++head)
              attend(problem, between, {head, at, length, at, length});
          }
          each_part(second);
        }
      }
    });
  }

  // All threads take one step after the other together.
  void share_steps() {
    static thread_local Arena kept, of_thread;
    Arena once;
    const int64_t rows = end() - begin(), of_between = Between::bytes(problems[0], tokens);
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
        const std::vector<Step> steps = steps_of(half, problem, shape);
        if (few)
          for (const Step step : steps) share_step(block, step, phases);
        else
          phases.add(parts.size(), [&, steps](int64_t i, char* memory) {
            run_steps(problem, steps, shape, parts[i].begin, parts[i].size(), memory);
          });
        if (half == Half::kFirst)
          phases.add(pieces.size(), [&](int64_t i, char*) { attend(problem, between, pieces[i]); });
      }
    }
    const int64_t own = shape.line + (few ? 0 : shape.bytes(shape.rows));
    torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) { phases.work(room(of_thread, own)); });
  }

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
    const int64_t heads = problems[0].heads;
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

}  // namespace
}  // namespace revit
