"""Pooling on CPUs: csrc/pool/cpu.cpp."""

import torch

from revit_kernels import native

native.load("cpu")
_forward = torch.ops.revit_kernels.pool_cpu.default
_backward = torch.ops.revit_kernels.pool_backward_cpu.default
DTYPES = (torch.float32, torch.bfloat16)


def refusal(step, args):
    for tensor in args:
        if isinstance(tensor, torch.Tensor) and tensor.device.type != "cpu":
            return f"needs CPU tensors, got one on {tensor.device}"
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.dtype not in DTYPES:
            return f"no kernel for {tensor.dtype}"
    return None


def forward(x, cu_seqlens, kind, prefix, include_prefix):
    return _forward(x, cu_seqlens.contiguous(), kind, prefix, include_prefix)


def backward(grad, x, cu_seqlens, tokens, kind, prefix, include_prefix):
    return _backward(grad, x, cu_seqlens.contiguous(), tokens, kind, prefix, include_prefix)
