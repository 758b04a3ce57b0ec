// Pre-norm blocks of packed tokens on the CPU, at inference: norm, queries, keys and values; attention; then output
// projection, norm and MLP, with both residual adds. Tokens go through in rows that stay in a core's cache, against
// weights packed beforehand. A row's arithmetic does not depend on the rows beside it, nor on how rows are shared out.
//
// Many images: a thread takes a few of them through all blocks by itself, and waits for nobody. Few images: all threads
// share the rows of each half of a block, and the heads of its attention.

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

#pragma GCC diagnostic ignored "-Wuninitialized"  // of g++ 12, in its own intrinsics
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#define KERNELS "block/rows.h"
#include "common/arena.h"
#include "common/every_isa.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

constexpr int64_t kFewestRows = 24;  // that are worth reading all weights of half a block for
// Tokens of small images that go through the blocks together: the more, the seldomer weights are read; the fewer, the
// more evenly they are shared out. Measured on 32 images of ViT-S/16: 256 is 3 % faster than 128.
constexpr int64_t kGroupRows[] = {256, 192, 128, 96};
constexpr int64_t kMostKept = 64 << 20;  // bytes that a thread keeps from call to call: a huge batch gives its own back
constexpr double kImbalance = 1.03, kMostImbalance = 1.10;  // of the longest share to the mean; beyond, rows are shared

bool is_bf16(const Tensor& x) { return x.scalar_type() == ScalarType::BFloat16; }

Layout layout(int64_t kind) {
  static const auto layout_of = EVERY_ISA_PICK(layout_of);
  return layout_of(static_cast<Kind>(kind));
}

Linear linear(char* packed, int64_t kind, int64_t in, int64_t out) {
  const Layout how = layout(kind);
  return Linear(packed, in, out, how.lanes, how.unit);
}

// `bytes` of the arena, in which whatever it held before is lost.
char* room(revit::Arena& arena, int64_t bytes) {
  arena.reserve(bytes);
  return arena.take<char>(bytes);
}

// f(first, count, arena) on rows of [begin, end). Few rows: a part for each thread. Many: each thread takes the next
// ones that are left, in the end fewer and fewer, so that none waits long for another.
template <class F>
void share_rows(int64_t begin, int64_t end, const Shape& shape, F f) {
  const int64_t rows = end - begin, most = torch::stable::get_num_threads();
  if (rows <= 0) return;
  const int64_t threads = std::min(most, (rows + kFewestRows - 1) / kFewestRows);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    static thread_local revit::Arena arena;
    char* memory = room(arena, shape.bytes);
    for (int64_t at = next.load();;) {
      const int64_t left = rows - at;
      if (left <= 0) return;
      const int64_t fair = rows <= threads * shape.rows ? (rows + threads - 1) / threads : left / (2 * threads);
      const int64_t count = std::min(left, std::clamp(fair, std::min(kFewestRows, shape.rows), shape.rows));
      if (!next.compare_exchange_weak(at, at + count)) continue;
      f(begin + at, count, memory);
      at = next.load();
    }
  });
}

// Images [first, last), and what they cost, in rows' worth of products.
struct Group {
  int64_t first, last;
  double cost;
};

// Neighbouring images together, up to `most` tokens; those that cost most first.
std::vector<Group> groups_of(const int32_t* boundaries, int64_t images, double cost_of_pair, int64_t most) {
  std::vector<Group> groups;
  for (int64_t i = 0; i < images;) {
    Group group{i, i, 0};
    do {
      const double length = boundaries[group.last + 1] - boundaries[group.last];
      group.cost += length + cost_of_pair * length * length;
      ++group.last;
    } while (group.last < images && boundaries[group.last + 1] - boundaries[i] <= most);
    groups.push_back(group);
    i = group.last;
  }
  std::stable_sort(groups.begin(), groups.end(), [](const Group& a, const Group& b) { return a.cost > b.cost; });
  return groups;
}

// The longest share of a thread to the mean, where each takes the next group that is left.
double imbalance(const std::vector<Group>& groups, int64_t threads) {
  std::vector<double> load(threads, 0.);
  double total = 0;
  for (const Group& group : groups) *std::min_element(load.begin(), load.end()) += group.cost, total += group.cost;
  return total ? *std::max_element(load.begin(), load.end()) * threads / total : 1;
}

// The groups that threads take through all blocks by themselves; none where they would wait for one another too long.
std::vector<Group> shares(const int32_t* boundaries, int64_t images, double cost_of_pair, int64_t threads) {
  std::vector<Group> best;
  double least = kMostImbalance;
  for (const int64_t rows : kGroupRows) {
    std::vector<Group> groups = groups_of(boundaries, images, cost_of_pair, rows);
    const double found = imbalance(groups, threads);
    if (found < least) best = std::move(groups), least = found;
    if (least <= kImbalance) break;
  }
  return best;
}

void zero_rows(Tensor& x, int64_t first, int64_t last) {
  const int64_t row = x.size(1) * x.element_size();
  if (last > first) std::memset(static_cast<char*>(x.data_ptr()) + first * row, 0, (last - first) * row);
}

}  // namespace

// Which kinds of weights there are kernels for here: 0 fp32, 1 bf16, 2 int8.
bool block_takes_cpu(int64_t kind) { return layout(kind).unit > 0; }

// weight: (out, in) fp32 or bf16; bias, gamma: (out,) fp32. Returns bytes, for this process alone to read.
Tensor block_pack_cpu(const Tensor& weight, const std::optional<Tensor>& bias, const std::optional<Tensor>& gamma,
                      int64_t kind) {
  const int64_t out = weight.size(0), in = weight.size(1);
  const Layout how = layout(kind);
  STD_TORCH_CHECK(how.unit > 0, "no kernel here for weights of kind ", kind);
  const Linear sizes(nullptr, in, out, how.lanes, how.unit);
  Tensor packed = torch::stable::new_empty(weight, {sizes.end - static_cast<char*>(nullptr)}, ScalarType::Byte);
  std::memset(packed.data_ptr(), 0, packed.numel());
  const Linear to = linear(static_cast<char*>(packed.data_ptr()), kind, in, out);
  for (int64_t n = 0; n < out; ++n) {
    to.bias[n] = bias ? static_cast<const float*>(bias->data_ptr())[n] : 0;
    to.gamma[n] = gamma ? static_cast<const float*>(gamma->data_ptr())[n] : 1;
  }
  static const auto pack_weight = EVERY_ISA_PICK(pack_weight);
  pack_weight(static_cast<Kind>(kind), is_bf16(weight), weight.data_ptr(), to);
  return packed;
}

namespace {

// What one block reads, as `addresses` lists it.
struct BlockAddresses {
  const float *norm1_weight, *norm1_bias, *norm2_weight, *norm2_bias;
  char *to_qkv, *proj, *fc1, *fc2;
  int64_t lengths1, lengths2;
};
static_assert(sizeof(BlockAddresses) == 10 * sizeof(int64_t));

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

using Half = void (*)(const Problem&, int64_t, int64_t, char*);

}  // namespace

// x: (tokens, dim) fp32 or bf16; row: (tokens,) int32
// addresses: (blocks, 10) int64: of the norms' weights and biases, (lengths, dim) fp32; of the weights to queries, keys
// and values, of proj, fc1 and fc2, made by block_pack_cpu; and the lengths of both norms. The caller keeps them alive.
// Returns (tokens, dim).
Tensor blocks_cpu(const Tensor& x, const Tensor& cu_seqlens, const std::optional<Tensor>& row, const Tensor& addresses,
                  double eps1, double eps2, int64_t heads, int64_t head_dim, int64_t hidden, double scale,
                  int64_t activation, int64_t kind) {
  const int64_t tokens = x.size(0), dim = x.size(1), width = heads * head_dim, images = cu_seqlens.size(0) - 1;
  const auto* boundaries = static_cast<const int32_t*>(cu_seqlens.data_ptr());
  const int64_t begin = boundaries[0], end = boundaries[images], blocks = addresses.size(0);
  for (int64_t i = 0, last = 0; i <= images; last = boundaries[i++])
    STD_TORCH_CHECK(boundaries[i] >= last && boundaries[i] <= tokens, "cu_seqlens must not decrease and must stay ",
                    "within the ", tokens, " tokens, got ", boundaries[i], " after ", last);
  Tensor y = torch::stable::new_empty(x, {tokens, dim});
  const auto* at = static_cast<const BlockAddresses*>(addresses.data_ptr());
  std::vector<Problem> problems;
  for (int64_t i = 0; i < blocks; ++i)
    problems.push_back({
        .x = i ? y.data_ptr() : x.data_ptr(),
        .y = y.data_ptr(),
        .row = row ? static_cast<const int32_t*>(row->data_ptr()) : nullptr,
        .dim = dim,
        .attended_dim = width,
        .hidden = hidden,
        .norm1 = {at[i].norm1_weight, at[i].norm1_bias, at[i].lengths1, static_cast<float>(eps1)},
        .norm2 = {at[i].norm2_weight, at[i].norm2_bias, at[i].lengths2, static_cast<float>(eps2)},
        .to_qkv = linear(at[i].to_qkv, kind, dim, 3 * width),
        .proj = linear(at[i].proj, kind, width, dim),
        .fc1 = linear(at[i].fc1, kind, dim, hidden),
        .fc2 = linear(at[i].fc2, kind, hidden, dim),
        .activation = static_cast<Activation>(activation),
        .kind = static_cast<Kind>(kind),
        .is_bf16 = is_bf16(x),
    });
  static const auto shape_of = EVERY_ISA_PICK(shape_of);
  static const Half first_half = EVERY_ISA_PICK(first_half), second_half = EVERY_ISA_PICK(second_half);
  const Shape shape = shape_of(problems[0]);
  const bool bf16 = problems[0].is_bf16;
  const auto factor = static_cast<float>(scale);
  const double products = 4. * dim * width + 2. * dim * hidden;  // multiplications of a token, and of a pair of them
  const int64_t threads = torch::stable::get_num_threads();
  const std::vector<Group> groups = shares(boundaries, images, 2. * width / products, threads);

  if (!groups.empty()) {
    std::atomic<size_t> next{0};
    torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
      static thread_local revit::Arena of_rows, of_group;
      char* memory = room(of_rows, shape.bytes);
      for (size_t g; (g = next.fetch_add(1, std::memory_order_relaxed)) < groups.size();) {
        const int64_t top = boundaries[groups[g].first], rows = boundaries[groups[g].last] - top;
        const Between between(problems[0], rows, room(of_group, Between::bytes(problems[0], rows, heads)));
        for (Problem problem : problems) {
          problem.qkv = between.qkv, problem.attended = between.attended, problem.between_first = top;
          const int64_t parts = (rows + shape.rows - 1) / shape.rows;
          for (int64_t i = 0; i < parts; ++i)
            first_half(problem, top + rows * i / parts, rows * (i + 1) / parts - rows * i / parts, memory);
          for (int64_t image = groups[g].first; image < groups[g].last; ++image)
            revit_attention::attend_image(bf16, between.qkv, boundaries[image] - top,
                                          boundaries[image + 1] - boundaries[image], heads, head_dim, factor,
                                          between.attended, between.lse);
          for (int64_t i = 0; i < parts; ++i)
            second_half(problem, top + rows * i / parts, rows * (i + 1) / parts - rows * i / parts, memory);
        }
      }
    });
  } else {
    static thread_local revit::Arena kept;
    revit::Arena once;
    const int64_t bytes = Between::bytes(problems[0], tokens, heads);
    const Between between(problems[0], tokens, room(bytes <= kMostKept ? kept : once, bytes));
    for (Problem& problem : problems) {
      problem.qkv = between.qkv, problem.attended = between.attended;
      share_rows(begin, end, shape,
                 [&](int64_t first, int64_t count, char* memory) { first_half(problem, first, count, memory); });
      revit_attention::attend(bf16, between.qkv, boundaries, images, tokens, heads, head_dim, factor, between.attended,
                              between.lse);
      share_rows(begin, end, shape,
                 [&](int64_t first, int64_t count, char* memory) { second_half(problem, first, count, memory); });
    }
  }
  zero_rows(y, 0, begin);
  zero_rows(y, end, tokens);
  return y;
}

STABLE_TORCH_LIBRARY_FRAGMENT(revit_kernels, m) {
  m.def("block_takes_cpu(int kind) -> bool");
  m.def("block_pack_cpu(Tensor weight, Tensor? bias, Tensor? gamma, int kind) -> Tensor");
  m.def(
      "blocks_cpu(Tensor x, Tensor cu_seqlens, Tensor? row, Tensor addresses, float eps1, float eps2, int heads,"
      " int head_dim, int hidden, float scale, int activation, int kind) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(revit_kernels, CPU, m) {
  m.impl("block_pack_cpu", TORCH_BOX(&block_pack_cpu));
  m.impl("blocks_cpu", TORCH_BOX(&blocks_cpu));
}
STABLE_TORCH_LIBRARY_IMPL(revit_kernels, CompositeExplicitAutograd, m) {
  m.impl("block_takes_cpu", TORCH_BOX(&block_takes_cpu));
}
