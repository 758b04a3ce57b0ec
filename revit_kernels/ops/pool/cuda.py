"""Pooling on NVIDIA GPUs from Ampere on: csrc/pool/cuda.cu.

Never run on a GPU yet: right on the CPU, thread by thread (tests/cuda_on_host), and its machine code is without spills.
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
