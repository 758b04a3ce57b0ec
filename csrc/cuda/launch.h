// What every CUDA op needs from its host side: where a launch goes, and a check that it went.
//
// tests/cuda_on_host compiles the same .cu files with a C++ compiler and runs them on a CPU, thread by thread: the few
// things that differ there have their other meaning in cuda_on_host.h, which is then included first.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#ifndef REVIT_CUDA_ON_HOST

#define REVIT_CUDA_KEY CUDA
// The block's dynamic shared memory, on a 16-byte boundary.
#define REVIT_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

namespace revit {

inline void check(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "CUDA: ", cudaGetErrorString(error));
}

// Makes the tensor's device current as long as it lives, and knows the stream that work goes to.
class Stream {
 public:
  explicit Stream(const torch::stable::Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  template <class... Parameters, class... Arguments>
  void launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared, Arguments... arguments) const {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
    if (shared > 48 * 1024)
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)));
    kernel<<<grid, threads, shared, stream_>>>(arguments...);
    check(cudaGetLastError());
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

// Multiprocessors of the current device.
inline int multiprocessors() {
  static thread_local int known[64] = {};
  int device = 0;
  check(cudaGetDevice(&device));
  if (device < 0 || device >= 64) device = 0;
  if (!known[device]) check(cudaDeviceGetAttribute(&known[device], cudaDevAttrMultiProcessorCount, device));
  return known[device];
}

}  // namespace revit

#endif
