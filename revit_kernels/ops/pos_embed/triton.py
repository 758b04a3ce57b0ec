"""The op in Triton. Which cells a cell is made of, and their weights, come from the host: it knows the grids."""

import os

import numpy as np
import torch
import triton
import triton.language as tl

from revit_kernels.device_cache import DeviceCache
from revit_kernels.ops.pos_embed.interpolation import matrix

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def refusal(x, *_):
    if not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"needs a CUDA tensor, got one on {x.device}"
    if x.dtype not in DTYPES:
        return f"no kernel for {x.dtype}"
    return None


@triton.jit
def _resample_kernel(
    x_ptr,  # (source cells, dim)
    y_ptr,  # (target cells, dim)
    part_ptr,  # (target cells, parts, 4): band of the rows, band of the columns, first cell, columns of the source
    band_ptr,  # (bands, 2): first, count
    weight_ptr,  # (bands, width)
    dim,
    parts,
    width,
    BLOCK_TAPS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    cell = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    inside = cols < dim
    total = tl.zeros([BLOCK_DIM], tl.float32)
    part = 0
    while part < parts:  # not `for`: NumPy 2.4 broke the interpreter's bounds that are not constants
        at = part_ptr + (cell * parts + part) * 4
        down, across = tl.load(at), tl.load(at + 1)
        start, columns = tl.load(at + 2), tl.load(at + 3)
        row, rows = tl.load(band_ptr + down * 2), tl.load(band_ptr + down * 2 + 1)
        column, wide = tl.load(band_ptr + across * 2), tl.load(band_ptr + across * 2 + 1)
        tap = 0
        while tap < rows * wide:
            k = tap + tl.arange(0, BLOCK_TAPS)
            known = k < rows * wide
            y, x = k // wide, k % wide
            weight = tl.load(weight_ptr + down * width + y, mask=known, other=0.0)
            weight *= tl.load(weight_ptr + across * width + x, mask=known, other=0.0)  # [BLOCK_TAPS]
            source = (start + (row + y) * columns + column + x).to(tl.int64)
            mask = known[:, None] & inside[None, :]
            value = tl.load(x_ptr + source[:, None] * dim + cols[None, :], mask=mask, other=0.0).to(tl.float32)
            total += tl.sum(weight[:, None] * value, 0)
            tap += BLOCK_TAPS
        part += 1
    tl.store(y_ptr + cell * dim + cols, total, mask=inside)


def _bands(weights):
    """(bands, 2) first and count, and (bands, width) weights: of each row of the matrices, what is not zero."""
    rows = [row for matrix in weights for row in matrix]
    spans = [(int(used[0]), int(used[-1]) + 1) if len(used := np.flatnonzero(row)) else (0, 0) for row in rows]
    values = np.zeros((len(rows), max(end - first for first, end in spans)), np.float32)
    for value, row, (first, end) in zip(values, rows, spans):
        value[: end - first] = row[first:end]
    return np.array([(first, end - first) for first, end in spans], np.int32), values


def _plan(backward, rows, columns, sizes, how):
    """The last three arrays that the kernel takes."""
    grids = list(zip(sizes[::2], sizes[1::2]))
    axes = {}  # (source, target, whether the grid is the table's own): weights
    for h, w in grids:
        same = (h, w) == (rows, columns)
        for n, m in ((rows, h), (columns, w)):
            axes[n, m, same] = np.eye(n) if same else matrix(n, m, *how)
    weights = list(axes.values())
    weights = [weight.T for weight in weights] if backward else weights
    band = dict(zip(axes, np.cumsum([0, *(len(weight) for weight in weights)])))
    parts, start = [], 0
    for h, w in grids:
        same = (h, w) == (rows, columns)
        down, across = band[rows, h, same], band[columns, w, same]
        y, x = np.indices((rows, columns) if backward else (h, w)).reshape(2, -1)
        first, pitch = (start, w) if backward else (0, columns)
        parts.append(np.stack([down + y, across + x, np.full_like(y, first), np.full_like(y, pitch)], -1))
        start += h * w
    parts = np.stack(parts, 1) if backward else np.concatenate(parts)[:, None]  # (target cells, parts, 4)
    return [torch.from_numpy(np.ascontiguousarray(a)) for a in (parts.astype(np.int32), *_bands(weights))]


_CACHE = DeviceCache()  # nothing is copied again for grids seen before


def _resample(x, cells, plan):
    dim = x.shape[1]
    y = x.new_empty(cells, dim)
    part, band, weight = plan
    if y.numel():
        block = min(triton.next_power_of_2(dim), 128)
        _resample_kernel[(cells, triton.cdiv(dim, block))](
            x, y, part, band, weight, dim, part.shape[1], weight.shape[1], BLOCK_TAPS=16, BLOCK_DIM=block, num_warps=4
        )
    return y


def forward(table, sizes, *how):
    rows, columns, dim = table.shape
    if not sizes:
        return table.new_empty(0, dim)
    key = (False, rows, columns, tuple(sizes), how)
    plan = _CACHE.get(key, table.device, lambda: _plan(*key))
    return _resample(table.contiguous().view(-1, dim), plan[0].shape[0], plan)


def backward(grad, rows, columns, sizes, *how):
    dim = grad.shape[1]
    if not sizes:
        return grad.new_zeros(rows, columns, dim)
    key = (True, rows, columns, tuple(sizes), how)
    plan = _CACHE.get(key, grad.device, lambda: _plan(*key))
    return _resample(grad.contiguous(), rows * columns, plan).view(rows, columns, dim)


def offline():
    """Every kernel as a model calls it, for tests/compile_triton.py."""
    types = dict.fromkeys(("part_ptr", "band_ptr"), "*i32") | {"weight_ptr": "*fp32"}
    types |= dict.fromkeys(("dim", "parts", "width"), "i32")
    for dtype, block, ones, alignment in (
        ("fp32", 128, ("parts",), {}),  # parts is 1 in every forward
        ("fp32", 128, (), {}),
        ("fp32", 64, ("parts",), {"aligned": False, "multiples": ()}),
        ("bf16", 128, ("parts",), {}),
        ("bf16", 64, (), {}),
        ("fp16", 128, ("parts",), {}),
        ("fp32", 1, ("parts", "dim", "width"), {}),
    ):
        constexprs = {"BLOCK_TAPS": 16, "BLOCK_DIM": block} | dict.fromkeys(ones, 1)
        names = [name for name in _resample_kernel.arg_names if name not in constexprs]
        signature = {name: types.get(name, f"*{dtype}") for name in names}
        options = {"num_warps": 4, "multiples": ("dim",)} | alignment
        yield {"kernel": _resample_kernel, "signature": signature, "constexprs": constexprs} | options
