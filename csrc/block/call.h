// One call: all blocks on all tokens, and how threads share it. Included after block/rows.h, for each instruction set.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "block/problem.h"
#include "block/share.h"
#include "cpu/scratch.h"
#include "cpu/threads.h"
#include "temporal_attention/temporal_attention.h"

namespace revit {
namespace {

// Rows for each thread, below which threads share a product's columns instead: measured at 1 to 50 rows on 2 threads.
constexpr int64_t kFewRows = 24;
constexpr int64_t kPositions = 16;       // of a clip that a thread attends across its frames at a time
constexpr int64_t kMostKept = 64 << 20;  // bytes that a thread keeps from call to call: a huge batch gives its own back

// `bytes` of the arena, in which whatever it held before is lost.
inline char* room(Arena& arena, int64_t bytes) {
  arena.reserve(bytes);
  return arena.take<char>(bytes);
}

// What a step multiplies with; null where it is no product, or there is no such step.
inline const Linear* weight_of(const Problem& p, Step step) {
  auto given = [](const Linear& weight) { return weight.panels ? &weight : nullptr; };
  switch (step) {
    case Step::kQueriesKeysValues:
      return given(p.to_qkv);
    case Step::kProjection:
      return given(p.proj);
    case Step::kUp:
      return given(p.fc1);
    case Step::kGate:
      return given(p.fc1_x);
    case Step::kDown:
      return given(p.fc2);
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
  add(Step::kProjection);
  if (p.of_time) return steps;
  add(Step::kNorm2), add(Step::kUp), add(Step::kGate, p.fc1_x.panels);
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
  const int32_t* boundaries;  // of images; or of clips
  int64_t images, tokens;
  const int32_t* frames;  // of each clip; null for images
  std::vector<Span>
      sequences{};  // what attends within itself: images; or frames, each behind a copy of its clip's class
  int64_t threads = torch::stable::get_num_threads();

  int64_t begin() const { return boundaries[0]; }
  int64_t end() const { return boundaries[images]; }

  void run() {
    for (int64_t i = 0; i < images; ++i) {
      const Span all{boundaries[i], boundaries[i + 1]};
      const int64_t parts = frames ? patches_of(i).frames : 1;
      for (int64_t f = 0; f < parts; ++f) sequences.push_back(all.part(f, parts));
    }
    const Problem& p = problems.back();
    // multiplications of a token, and of a pair of them
    const int64_t ways = p.fc1_x.panels ? 3 : 2, attentions = frames ? 2 : 1;
    const double products = 4. * attentions * p.dim * p.attended_dim + static_cast<double>(ways) * p.dim * p.hidden;
    const std::vector<Group> groups = shares(boundaries, images, frames, 2. * p.attended_dim / products, threads);
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
    attend_piece(p.is_bf16, between.qkv, piece, p.heads, p.attended_dim / p.heads, p.scale, rotation, between.attended,
                 between.lse);
  }

  // The patches of a clip: what is behind the class in each frame.
  Clip patches_of(int64_t clip) const {
    const int64_t first = boundaries[clip], rows = boundaries[clip + 1] - first;
    return rows ? Clip{first + 1, rows / frames[clip] - 1, rows / frames[clip], frames[clip]} : Clip{first, 0, 0, 0};
  }

  // Across frames. patches: of a clip, or some of them
  void attend_time(const Problem& p, const Between& between, Clip patches) const {
    patches.first -= p.between_first;
    attend_frames(p.is_bf16, between.qkv, patches, p.heads, p.attended_dim / p.heads, p.scale, between.attended,
                  between.lse);
  }

  // What a clip's classes attended to becomes its mean: the same is then made of it for each of them.
  void average_classes(const Problem& p, const Between& between, const Clip& patches, char* line) const {
    static const auto average = EVERY_ISA_PICK(average_rows);
    const int64_t first = (patches.first - 1 - p.between_first) * p.attended_dim;
    average(p.is_bf16, between.attended + first * (p.is_bf16 ? 2 : 4), p.attended_dim, patches.frames,
            patches.stride * p.attended_dim, reinterpret_cast<float*>(line));
  }

  // f(sequence) for those that begin in these rows.
  template <class F>
  void each_sequence(Span rows, F f) const {
    auto next = std::lower_bound(sequences.begin(), sequences.end(), rows.begin,
                                 [](const Span& sequence, int64_t row) { return sequence.begin < row; });
    for (; next != sequences.end() && next->begin < rows.end; ++next) f(*next);
  }

  // Some rows through half a block, on the calling thread. What time adds to is patches alone.
  void run_half(const Problem& p, Half half, const std::vector<Step>& steps, Span rows, char* memory) const {
    if (!p.of_time || half == Half::kFirst) return run_steps(p, steps, shape, rows.begin, rows.size(), memory);
    int64_t first = rows.begin;
    auto run_to = [&](int64_t end) {
      if (end > first) run_steps(p, steps, shape, first, end - first, memory);
      first = end + 1;
    };
    each_sequence(rows, [&](const Span& frame) { run_to(frame.begin); });
    run_to(rows.end);
  }

  // Each thread takes the next images that are left through all blocks.
  void share_groups(const std::vector<Group>& groups) const {
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
          auto each_part = [&](Half half) {
            const std::vector<Step> steps = steps_of(half, problem, shape);
            for (int64_t i = 0; i < parts; ++i)
              run_half(problem, half, steps, Span{top, top + rows}.part(i, parts), memory);
          };
          each_part(Half::kFirst);
          if (!problem.of_time)
            each_sequence({top, top + rows}, [&](const Span& sequence) {
              const int64_t length = sequence.size(), at = sequence.begin - top;
              for (int64_t head = 0; length && head < problem.heads; ++head)
                attend(problem, between, {head, at, length, at, length});
            });
          for (int64_t clip = groups[g].first; frames && clip < groups[g].last; ++clip)
            if (problem.of_time)
              attend_time(problem, between, patches_of(clip));
            else
              average_classes(problem, between, patches_of(clip), memory);
          each_part(Half::kSecond);
        }
      }
    });
  }

  // All threads take one step after the other together.
  void share_steps() {
    static thread_local Arena kept, of_thread;
    Arena once;
    const int64_t rows = end() - begin(), of_between = Between::bytes(problems[0], tokens);
    const bool few = !frames && rows < threads * kFewRows;
    const int64_t bytes = of_between + (few ? shape.bytes(rows) : 0);
    char* memory = room(bytes <= kMostKept ? kept : once, bytes);
    const Between between(problems[0], tokens, memory);
    const std::vector<Piece> pieces = pieces_of_attention();
    const std::vector<Clip> across = pieces_of_time();
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
          phases.add(parts.size(),
                     [&, half, steps](int64_t i, char* memory) { run_half(problem, half, steps, parts[i], memory); });
        if (half == Half::kSecond) continue;
        if (problem.of_time) {
          phases.add(across.size(), [&](int64_t i, char*) { attend_time(problem, between, across[i]); });
          continue;
        }
        phases.add(pieces.size(), [&](int64_t i, char*) { attend(problem, between, pieces[i]); });
        if (frames)
          phases.add(images,
                     [&](int64_t clip, char* memory) { average_classes(problem, between, patches_of(clip), memory); });
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
    const int64_t heads = problems[0].heads, items = static_cast<int64_t>(sequences.size()) * heads;
    std::vector<Piece> pieces;
    for (const Span& all : sequences) {
      const int64_t fitting = (all.size() + kFewRows - 1) / kFewRows;
      const int64_t parts = std::min(fitting, (threads + items - 1) / items);
      for (int64_t i = 0; i < parts; ++i)
        for (int64_t head = 0; head < heads; ++head)
          pieces.push_back({head, all.part(i, parts).begin, all.part(i, parts).size(), all.begin, all.size()});
    }
    return pieces;
  }

  // A few positions of each clip.
  std::vector<Clip> pieces_of_time() const {
    std::vector<Clip> pieces;
    for (int64_t clip = 0; frames && clip < images; ++clip) {
      const Clip all = patches_of(clip);
      for (int64_t at = 0; at < all.positions; at += kPositions)
        pieces.push_back({all.first + at, std::min(kPositions, all.positions - at), all.stride, all.frames});
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
