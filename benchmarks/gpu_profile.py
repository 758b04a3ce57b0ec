#!/usr/bin/env python3
"""One call of every CUDA kernel at ViT-B's sizes, for a profiler:

ncu --profile-from-start off --csv ... python benchmarks/gpu_profile.py
"""

import importlib

import torch

from revit_kernels import Packing
from revit_kernels.ops.attention import attention
from revit_kernels.ops.layer_norm import layer_norm

IMAGES, HEADS, HEAD_DIM = 256, 12, 64
MENU = [(4, 4), (7, 7), (10, 10), (14, 14)]


def attention_call(lengths):
    qkv = torch.randn(sum(lengths), 3, HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int().cuda()

    def call():
        y = attention(*qkv.unbind(1), cu_seqlens, max(lengths), backend="cuda")
        torch.autograd.grad(y, qkv, torch.ones_like(y))

    return call


def layer_norm_call():
    dim = HEADS * HEAD_DIM
    packing = Packing.from_grids([MENU[i % len(MENU)] for i in range(IMAGES)], 1, device="cuda")
    x, branch = torch.randn(2, packing.capacity, dim, device="cuda", dtype=torch.bfloat16).unbind(0)
    x.requires_grad_()
    weight, bias = torch.ones(2, len(MENU), dim, device="cuda", dtype=torch.bfloat16).unbind(0)

    def call():
        y = layer_norm(x, weight, bias, packing.row, branch=branch, gamma=weight[0], backend="cuda")[0]
        torch.autograd.grad(y, x, torch.ones_like(y))

    return call


def sample_call(op):
    """The op's own sample: small, but it shows the kernel's registers and that it runs."""
    from revit_kernels.dispatch import load

    arguments = importlib.import_module(f"revit_kernels.ops.{op}").sample("cuda", torch.bfloat16)
    return lambda: load(op, "cuda").forward(*arguments)


def main():
    calls = [attention_call([n] * IMAGES) for n in (50, 197, 577)]
    calls += [layer_norm_call(), *(sample_call(op) for op in ("patch_embed", "pos_embed", "pool"))]
    for call in calls:
        call()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    for call in calls:
        call()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


if __name__ == "__main__":
    main()
