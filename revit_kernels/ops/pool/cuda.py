"""Pooling on NVIDIA GPUs from Ampere on: csrc/pool/cuda.cu.

Ran on one H200 (benchmarks/results/NVIDIA_H200.md), and thread by thread on a CPU (tests/cuda_on_host).
"""

import torch

from revit_kernels import native

native.load("cuda")
_forward = torch.ops.revit_kernels.pool_cuda.default
_backward = torch.ops.revit_kernels.pool_backward_cuda.default
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def refusal(step, args):
    return native.gpu_refusal(DTYPES, *args)


def forward(x, cu_seqlens, kind, prefix, include_prefix):
    return _forward(x, cu_seqlens.contiguous(), kind, prefix, include_prefix)


def backward(grad, x, cu_seqlens, tokens, kind, prefix, include_prefix):
    return _backward(grad, x, cu_seqlens.contiguous(), tokens, kind, prefix, include_prefix)
