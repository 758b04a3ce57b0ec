"""Attention across frames on the CPU: csrc/temporal_attention/cpu.cpp."""

import torch

from revit_kernels import native

native.load("cpu")
_forward = torch.ops.revit_kernels.temporal_attention_cpu.default
_backward = torch.ops.revit_kernels.temporal_attention_backward_cpu.default


def refusal(step, args):
    return native.cpu_refusal(args.q)


def forward(q, k, v, cu_seqlens, frames, max_frames, prefix, scale):
    return _forward(q, k, v, cu_seqlens, frames, prefix, scale)


def backward(grad, q, k, v, out, lse, cu_seqlens, frames, max_frames, prefix, scale):
    return _backward(grad, q, k, v, cu_seqlens, frames, prefix, scale)
