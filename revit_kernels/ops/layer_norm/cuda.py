"""LayerNorm on NVIDIA GPUs from Ampere on: csrc/layer_norm/cuda.cu.

Ran on one H200 (benchmarks/results/NVIDIA_H200.md), and thread by thread on a CPU (tests/cuda_on_host).
"""

import torch

from revit_kernels import native

native.load("cuda")
_forward = torch.ops.revit_kernels.layer_norm_cuda.default
_backward = torch.ops.revit_kernels.layer_norm_backward_cuda.default
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MOST_COLUMNS = 4096  # what the threads of a block hold in registers


def refusal(step, args):
    if why := native.gpu_refusal(DTYPES, *args):
        return why
    columns = (args.sum if step == "backward" else args.x).shape[1]
    if columns > MOST_COLUMNS:
        return f"no kernel for a dim above {MOST_COLUMNS}, got {columns}"
    return None


def _contiguous(parameter):
    return None if parameter is None else parameter.contiguous()


def forward(x, weight, bias, row, branch, gamma, eps, rms):
    return _forward(x, _contiguous(weight), _contiguous(bias), row, branch, _contiguous(gamma), eps, rms)


def backward(dy, dsum, sum, weight, bias, row, branch, gamma, mean, rstd, rms):
    parameters = (_contiguous(weight), _contiguous(bias), row, branch, _contiguous(gamma))
    return _backward(dy, dsum, sum, *parameters, mean, rstd, rms)
