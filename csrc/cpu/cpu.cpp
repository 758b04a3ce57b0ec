// Which instruction set the kernels of this process use, for Python.

#include <torch/csrc/stable/library.h>

#include <string>

#include "cpu/isa.h"

namespace revit {
namespace {

std::string capability_cpu() { return kCapabilities[static_cast<int>(capability())]; }

}  // namespace
}  // namespace revit

STABLE_TORCH_LIBRARY_FRAGMENT(revit_kernels, m) { m.def("capability_cpu() -> str"); }
STABLE_TORCH_LIBRARY_IMPL(revit_kernels, CompositeExplicitAutograd, m) {
  m.impl("capability_cpu", TORCH_BOX(&revit::capability_cpu));
}
