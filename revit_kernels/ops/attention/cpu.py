"""Attention on the CPU: csrc/attention."""

import torch

from revit_kernels import native

native.load("cpu")
_forward = torch.ops.revit_kernels.attention_cpu.default
_backward = torch.ops.revit_kernels.attention_backward_cpu.default


def refusal(step, args):
    if why := native.cpu_refusal(args.q):
        return why
    if args.cos is not None and args.cos.dtype != torch.float32:
        return f"a rotary table must be of float32, got {args.cos.dtype}"
    return None


def forward(q, k, v, cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k, scale, *rotary):
    return _forward(q, k, v, cu_seqlens, cu_seqlens_k, scale, *rotary)


def backward(grad, q, k, v, out, lse, cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k, scale, *rotary):
    return _backward(grad, q, k, v, lse, cu_seqlens, cu_seqlens_k, scale, *rotary)
