"""The op on NVIDIA GPUs: csrc/pos_embed/cuda.cu. Which cells a cell is made of, and their weights, come from the host.

Counted, not measured: a table of 14 x 14 for grids of 10, 7 and 4 a side and 768 channels in bf16 is 126 blocks. They
read 36 KB of taps, out of 2.4 KB that stay in L2, beside 3.0 MB of the table: 1%. Made by the kernel in float64 the
taps would be 8 MFLOP: 0.2 us on an H200 (34 TFLOP/s), but 16 us on an L4, which has a 64th of its float32 rate.

Ran on one H200 (benchmarks/results/NVIDIA_H200.md), and thread by thread on a CPU (tests/cuda_on_host).
"""

import torch

from revit_kernels import native
from revit_kernels.device_cache import DeviceCache
from revit_kernels.ops.pos_embed.taps import plan

native.load("cuda")
_forward = torch.ops.revit_kernels.pos_embed_cuda.default
_backward = torch.ops.revit_kernels.pos_embed_backward_cuda.default
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_CACHE = DeviceCache()  # nothing is copied again for grids seen before


def refusal(step, args):
    return native.gpu_refusal(DTYPES, *args)


def _arrays(device, backward, rows, columns, sizes, how):
    key = (backward, rows, columns, tuple(sizes), how)
    return _CACHE.get(key, device, lambda: [torch.from_numpy(array) for array in plan(*key)])


def forward(table, sizes, *how):
    rows, columns, dim = table.shape
    if not sizes:
        return table.new_empty(0, dim)
    return _forward(table.contiguous(), *_arrays(table.device, False, rows, columns, sizes, how), sizes)


def backward(grad, rows, columns, sizes, *how):
    if not sizes:
        return grad.new_zeros(rows, columns, grad.shape[1])
    return _backward(grad.contiguous(), *_arrays(grad.device, True, rows, columns, sizes, how), rows, columns, sizes)
