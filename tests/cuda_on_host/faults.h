// Kernels with one fault at a time: what a GPU would punish has to show on the host. faults.cpp runs them by name.
#pragma once

#include <functional>
#include <map>
#include <string>

// What comes of it, without the fault and with it: "right", "wrong" or "NaN", or what was said.
using Fault = std::function<std::string(bool fault)>;

inline std::map<std::string, Fault>& faults() {
  static std::map<std::string, Fault> known;
  return known;
}

// All numbers are as they should be.
inline std::string judged(const float* found, const float* expected, int count) {
  std::string said = "right";
  for (int i = 0; i < count; ++i) {
    if (std::isnan(found[i])) return "NaN";
    if (found[i] != expected[i]) said = "wrong";
  }
  return said;
}
