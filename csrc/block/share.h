// Which images a thread takes through the blocks by itself.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

namespace revit {
namespace {

// Tokens of small images that go through the blocks together: the more, the less often weights are read; the fewer, the
// more evenly they are shared out. Measured on 32 images of ViT-S/16: 256 is 3 % faster than 128.
constexpr int64_t kGroupRows[] = {256, 192, 128, 96};
// Of the longest share to the mean: as good as even; and beyond which all threads share each block instead.
constexpr double kImbalance = 1.015, kMostImbalance = 1.02;

// Images [first, last), and what they cost, in rows' worth of products.
struct Group {
  int64_t first, last;
  double cost;
};

// Neighbouring images together, up to `most` tokens; those that cost most first.
// frames: of each; null where each attends to all of itself
inline std::vector<Group> groups_of(const int32_t* boundaries, int64_t images, const int32_t* frames,
                                    double cost_of_pair, int64_t most) {
  std::vector<Group> groups;
  for (int64_t i = 0; i < images;) {
    Group group{i, i, 0};
    do {
      const double length = boundaries[group.last + 1] - boundaries[group.last];
      const double keys = frames ? length / std::max(frames[group.last], 1) : length;
      group.cost += length + cost_of_pair * length * keys;
      ++group.last;
    } while (group.last < images && boundaries[group.last + 1] - boundaries[i] <= most);
    groups.push_back(group);
    i = group.last;
  }
  std::stable_sort(groups.begin(), groups.end(), [](const Group& a, const Group& b) { return a.cost > b.cost; });
  return groups;
}

// The longest share of a thread to the mean, where each takes the next group that is left.
inline double imbalance(const std::vector<Group>& groups, int64_t threads) {
  std::vector<double> load(threads, 0.);
  double total = 0;
  for (const Group& group : groups) *std::min_element(load.begin(), load.end()) += group.cost, total += group.cost;
  return total ? *std::max_element(load.begin(), load.end()) * threads / total : 1;
}

// The groups that threads take through all blocks by themselves; none where they would wait for one another too long.
inline std::vector<Group> shares(const int32_t* boundaries, int64_t images, const int32_t* frames, double cost_of_pair,
                                 int64_t threads) {
  std::vector<Group> best;
  double least = kMostImbalance;
  for (const int64_t rows : kGroupRows) {
    std::vector<Group> groups = groups_of(boundaries, images, frames, cost_of_pair, rows);
    const double found = imbalance(groups, threads);
    if (found < least) best = std::move(groups), least = found;
    if (least <= kImbalance) break;
  }
  return best;
}

}  // namespace
}  // namespace revit
