"""The op on NVIDIA GPUs: csrc/pos_embed/cuda.cu. The sizes of the grids are all that the host gives to the kernel.

Never run on a GPU yet: right on the CPU, thread by thread (tests/cuda_on_host), and its machine code is without spills.
"""

from itertools import accumulate

import torch

from revit_kernels import native
from revit_kernels.device_cache import DeviceCache

native.load("cuda")
_forward = torch.ops.revit_kernels.pos_embed_cuda.default
_backward = torch.ops.revit_kernels.pos_embed_backward_cuda.default
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MOST_ROWS = 2**14  # a block has a weight for each row of its input in shared memory
_CACHE = DeviceCache()


def refusal(x, *args):
    if why := native.gpu_refusal(DTYPES, x):
        return why
    sizes = next(arg for arg in args if not isinstance(arg, int))  # backward has the table's rows and columns ahead
    most = max([x.shape[0] if x.ndim == 3 else 0, *sizes[::2]])
    if most > MOST_ROWS:
        return f"no kernel for a table or grid of more than {MOST_ROWS} rows, got {most}"
    return None


def _grids(sizes, device):
    """(grids, 3) int32: rows, columns and first cell of each grid."""

    def make():
        starts = accumulate((h * w for h, w in zip(sizes[::2], sizes[1::2])), initial=0)
        rows = [*zip(sizes[::2], sizes[1::2], starts)]
        return [torch.tensor(rows, dtype=torch.int32).view(-1, 3)]

    return _CACHE.get(tuple(sizes), device, make)[0]


def forward(table, sizes, *how):
    return _forward(table.contiguous(), _grids(sizes, table.device), sizes, *how)


def backward(grad, rows, columns, sizes, *how):
    return _backward(grad.contiguous(), _grids(sizes, grad.device), rows, columns, sizes, *how)
