"""Attention on NVIDIA GPUs from Ampere on: csrc/attention/cuda.cu, on Hopper forward with what it alone has.

Where a rotary table turns queries and keys, Hopper runs what Ampere runs.

REVIT_CUDA_HOPPER=0 leaves Hopper's part out, to compare the two.
Ran on one H200 (benchmarks/results/NVIDIA_H200.md), and thread by thread on a CPU (tests/cuda_on_host).
"""

import torch

from revit_kernels import native
from revit_kernels.ops.attention import tail

native.load("cuda")
_forward = torch.ops.revit_kernels.attention_cuda.default
_backward = torch.ops.revit_kernels.attention_backward_cuda.default
DTYPES = (torch.float16, torch.bfloat16)


def refusal(step, args):
    x = args.q
    if why := native.gpu_refusal(DTYPES, x):
        return why
    if x.shape[2] % 8 or x.shape[2] > 128:
        return f"head_dim must be a multiple of 8, at most 128, got {x.shape[2]}"
    if args.cos is not None and args.cos.dtype != torch.float32:
        return f"a rotary table must be of float32, got {args.cos.dtype}"
    if args.cos is not None and step == "backward" and x.shape[2] > 96:
        return f"gradients of what a rotary table turns need a head_dim of at most 96, got {x.shape[2]}"
    if args.cos is not None and args.half and args.cos.shape[-1] % 8:
        return f"a rotary table that turns halves must be of a multiple of 8 pairs, got {args.cos.shape[-1]}"
    return None


def forward(q, k, v, cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k, scale, *rotary):
    return _forward(*tail.aligned(q, k, v), cu_seqlens, cu_seqlens_k, scale, *rotary)


def backward(grad, q, k, v, out, lse, cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k, scale, *rotary):
    return _backward(*tail.aligned(grad, q, k, v), out, lse, cu_seqlens, cu_seqlens_k, scale, *rotary)
