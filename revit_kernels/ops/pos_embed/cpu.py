"""The op on a CPU, in C++: see csrc/pos_embed/cpu.cpp."""

import torch

from revit_kernels import native

native.load("cpu")
_forward = torch.ops.revit_kernels.pos_embed_cpu.default
_backward = torch.ops.revit_kernels.pos_embed_backward_cpu.default


def refusal(step, args):
    return native.cpu_refusal(args.table if step == "forward" else args.grad)


def forward(table, *how):
    return _forward(table.contiguous(), *how)


def backward(grad, *how):
    return _backward(grad.contiguous(), *how)
