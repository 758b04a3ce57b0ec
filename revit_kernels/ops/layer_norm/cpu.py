"""LayerNorm on CPUs: csrc/layer_norm/cpu.cpp."""

import torch

from revit_kernels import native

native.load("cpu")
_forward = torch.ops.revit_kernels.layer_norm_cpu.default
_backward = torch.ops.revit_kernels.layer_norm_backward_cpu.default


def refusal(step, args):
    return native.cpu_refusal(*args)


def _fp32(parameter):
    return None if parameter is None else parameter.float().contiguous()


def forward(x, weight, bias, row, branch, gamma, eps, rms):
    return _forward(x, _fp32(weight), _fp32(bias), row, branch, _fp32(gamma), eps, rms)


def backward(dy, dsum, sum, weight, bias, row, branch, gamma, mean, rstd, rms):
    dx, dbranch, *grads = _backward(
        dy, dsum, sum, _fp32(weight), _fp32(bias), row, branch, _fp32(gamma), mean, rstd, rms
    )
    parameters = (weight, bias, gamma)
    return dx, dbranch, *(grad if p is None else grad.to(p.dtype) for p, grad in zip(parameters, grads))
