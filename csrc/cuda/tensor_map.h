// What the tensor memory accelerator has to know of a tensor: written on the host, handed to the kernel as a parameter.
#pragma once

#include <cstdint>
#include <cstdlib>

#ifndef REVIT_CUDA_ON_HOST

#include <cuda.h>

#include "cuda/launch.h"

namespace revit {

using TensorMap = CUtensorMap;

// Whether the current device is a Hopper, and the kernel's code there is not the empty one of other GPUs, which needs
// hardly a register. REVIT_CUDA_HOPPER=0 says no, for comparisons.
template <class Kernel>
bool on_hopper(Kernel kernel) {
  const char* wanted = std::getenv("REVIT_CUDA_HOPPER");
  if (wanted && wanted[0] == '0') return false;
  int device = 0, major = 0, minor = 0;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  if (major != 9 || minor != 0) return false;
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, kernel));
  return attributes.numRegs > 64;
}

// Boxes of `rows` tokens of one head and `columns` (16, 32 or 64) of its numbers, of (tokens, heads, dim) 16-bit
// numbers with these strides, in elements. False where the driver knows no such maps, or refuses this one.
inline bool encode(TensorMap& map, const void* data, int tokens, int heads, int dim, int64_t token_stride,
                   int64_t head_stride, int rows, int columns) {
  static const auto driver = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
    if (error != cudaSuccess) cudaGetLastError();  // else the next launch would be blamed for it
    if (error != cudaSuccess || result != cudaDriverEntryPointSuccess) found = nullptr;
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
  }();
  if (!driver) return false;
  const cuuint64_t sizes[3] = {static_cast<cuuint64_t>(dim), static_cast<cuuint64_t>(heads),
                               static_cast<cuuint64_t>(tokens)};
  const cuuint64_t strides[2] = {static_cast<cuuint64_t>(head_stride) * 2, static_cast<cuuint64_t>(token_stride) * 2};
  const cuuint32_t box[3] = {static_cast<cuuint32_t>(columns), 1, static_cast<cuuint32_t>(rows)}, steps[3] = {1, 1, 1};
  const CUtensorMapSwizzle swizzle = columns == 64   ? CU_TENSOR_MAP_SWIZZLE_128B
                                     : columns == 32 ? CU_TENSOR_MAP_SWIZZLE_64B
                                                     : CU_TENSOR_MAP_SWIZZLE_32B;
  return driver(&map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 3, const_cast<void*>(data), sizes, strides, box, steps,
                CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace revit

#endif
