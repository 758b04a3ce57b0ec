"""The op in Triton. Which cells a cell is made of, and their weights, come from the host: it knows the grids."""

import os

import numpy as np
import torch
import triton
import triton.language as tl

from revit_kernels import measured
from revit_kernels.device_cache import DeviceCache
from revit_kernels.ops.pos_embed.taps import plan

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def refusal(step, args):
    x = args.table if step == "forward" else args.grad
    if not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return "needs a CUDA tensor"
    if x.dtype not in DTYPES:
        return f"no kernel for {x.dtype}"
    return None


@triton.jit(do_not_specialize=("parts", "width"))
def _resample_kernel(
    x_ptr,  # (source cells, dim)
    y_ptr,  # (target cells, dim)
    part_ptr,  # (target cells, parts, 4): band of the rows, band of the columns, first cell, columns of the source
    band_ptr,  # (bands, 2): first, count
    weight_ptr,  # (bands, width)
    dim,
    parts,  # None for 1, in every forward
    width,
    BLOCK_TAPS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    cell = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    inside = cols < dim
    total = tl.zeros([BLOCK_DIM], tl.float32)
    count = 1 if parts is None else parts
    part = 0
    while part < count:  # not `for`: NumPy 2.4 broke the interpreter's bounds that are not constants
        at = part_ptr + (cell * count + part) * 4
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


def _plan(backward, rows, columns, sizes, how):
    """The last three arrays that the kernel takes."""
    grids, bands, weights = plan(backward, rows, columns, sizes, how)
    parts = []
    for h, w, start, band in grids:
        y, x = np.indices((rows, columns) if backward else (h, w)).reshape(2, -1)
        across = band + (rows if backward else h)
        first, pitch = (start, w) if backward else (0, columns)
        parts.append(np.stack([band + y, across + x, np.full_like(y, first), np.full_like(y, pitch)], -1))
    parts = np.stack(parts, 1) if backward else np.concatenate(parts)[:, None]  # (target cells, parts, 4)
    return [torch.from_numpy(np.ascontiguousarray(a)) for a in (parts.astype(np.int32), bands, weights)]


_CACHE = DeviceCache()  # nothing is copied again for grids seen before


def _resample(x, cells, arrays, parts=None):
    dim = x.shape[1]
    y = x.new_empty(cells, dim)
    part, band, weight = arrays
    if y.numel():
        tiles = measured.tiles("pos_embed", "resample", x.device, bits=8 * x.element_size(), dim=dim)
        _resample_kernel[(cells, triton.cdiv(dim, tiles["BLOCK_DIM"]))](
            x, y, part, band, weight, dim, parts, weight.shape[1], **tiles
        )
    return y


def forward(table, sizes, *how):
    rows, columns, dim = table.shape
    if not sizes:
        return table.new_empty(0, dim)
    key = (False, rows, columns, tuple(sizes), how)
    arrays = _CACHE.get(key, table.device, lambda: _plan(*key))
    return _resample(table.contiguous().view(-1, dim), arrays[0].shape[0], arrays)


def backward(grad, rows, columns, sizes, *how):
    dim = grad.shape[1]
    if not sizes:
        return grad.new_zeros(rows, columns, dim)
    key = (True, rows, columns, tuple(sizes), how)
    arrays = _CACHE.get(key, grad.device, lambda: _plan(*key))
    return _resample(grad.contiguous(), rows * columns, arrays, arrays[0].shape[1]).view(rows, columns, dim)


def specification(kernel, tiles, bits=16, dim=768, dtype=None, backward=False, ones=(), is_aligned=True):
    """The kernel as a model calls it, for the compiler alone: see tests/machine_code.py."""
    dtype = dtype or ("fp32" if bits == 32 else "bf16")
    types = dict.fromkeys(("part_ptr", "band_ptr"), "*i32") | {"weight_ptr": "*fp32"}
    types |= dict.fromkeys(("dim", "parts", "width"), "i32")
    constexprs = {name: tiles[name] for name in ("BLOCK_TAPS", "BLOCK_DIM")} | dict.fromkeys(ones, 1)
    constexprs |= {} if backward else {"parts": None}
    signature = {name: types.get(name, f"*{dtype}") for name in _resample_kernel.arg_names if name not in constexprs}
    aligned = is_aligned and dim % 16 == 0
    options = {"num_warps": tiles["num_warps"], "aligned": aligned, "multiples": ("dim",) if aligned else ()}
    return {"kernel": _resample_kernel, "signature": signature, "constexprs": constexprs} | options
