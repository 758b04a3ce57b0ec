"""Attention across frames on NVIDIA GPUs from Ampere on: csrc/temporal_attention/cuda.cu.

Has not run on a GPU yet: thread by thread on a CPU (tests/cuda_on_host).
"""

import torch

from revit_kernels import native

native.load("cuda")
_forward = torch.ops.revit_kernels.temporal_attention_cuda.default
_backward = torch.ops.revit_kernels.temporal_attention_backward_cuda.default
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def refusal(step, args):
    if why := native.gpu_refusal(DTYPES, args.q):
        return why
    return None if args.q.shape[2] <= 256 else f"head_dim must be at most 256, got {args.q.shape[2]}"


def forward(q, k, v, cu_seqlens, frames, max_frames, prefix, scale):
    return _forward(q, k, v, cu_seqlens, frames, prefix, scale)


def backward(grad, q, k, v, out, lse, cu_seqlens, frames, max_frames, prefix, scale):
    return _backward(grad, q, k, v, out, lse, cu_seqlens, frames, prefix, scale)
