"""Pooling on CPUs: csrc/pool/cpu.cpp."""

import torch

from revit_kernels import native

native.load("cpu")
_forward = torch.ops.revit_kernels.pool_cpu.default
_backward = torch.ops.revit_kernels.pool_backward_cpu.default


def refusal(step, args):
    return native.cpu_refusal(args.x if args.x is not None else args.grad)


def forward(x, cu_seqlens, kind, prefix, include_prefix):
    return _forward(x, cu_seqlens.contiguous(), kind, prefix, include_prefix)


def backward(grad, x, cu_seqlens, tokens, kind, prefix, include_prefix):
    return _backward(grad, x, cu_seqlens.contiguous(), tokens, kind, prefix, include_prefix)
