"""The learned position table, interpolated to every grid of a batch in one call."""

import math
from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from revit_kernels.dispatch import register
from revit_kernels.ops.derivatives import once_differentiable
from revit_kernels.ops.pos_embed.interpolation import MODES

_HOW = "SymInt[] sizes, str interpolation, bool antialias, bool align_corners, float offset, str? backend"


def _cells(sizes):
    return sum(h * w for h, w in zip(sizes[::2], sizes[1::2]))


_forward = register(
    "pos_embed",
    "forward",
    f"(Tensor table, {_HOW}) -> Tensor",
    lambda table, sizes, *_: table.new_empty(_cells(sizes), table.shape[2]),
    check=lambda args: _check(args.table, _grids(args.sizes), *args[2:]),
)
_backward = register(
    "pos_embed",
    "backward",
    f"(Tensor grad, SymInt rows, SymInt columns, {_HOW}) -> Tensor",
    lambda grad, rows, columns, *_: grad.new_empty(rows, columns, grad.shape[1]),
    check=lambda args: _check_backward(args),
)


class _PosEmbed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, table, sizes, *how):
        ctx.how = (*table.shape[:2], sizes, *how)
        return _forward(table, sizes, *how)

    @staticmethod
    @once_differentiable("pos_embed")
    def backward(ctx, grad):
        return _backward(grad, *ctx.how), None, None, None, None, None, None


def _grids(sizes):
    if len(sizes) % 2:
        raise ValueError(f"sizes must be rows and columns of each grid, got {len(sizes)} numbers")
    return list(zip(sizes[::2], sizes[1::2]))


def _check(table, grids, interpolation, antialias, align_corners, offset):
    if table.ndim != 3 or 0 in table.shape[:2] or not table.is_floating_point():
        raise ValueError(
            f"table must be (rows, columns, dim) and floating-point, got {tuple(table.shape)} {table.dtype}"
        )
    _check_how(grids, interpolation, antialias, align_corners, offset)


def _check_how(grids, interpolation, antialias, align_corners, offset):
    if interpolation not in MODES:
        raise ValueError(f"interpolation must be one of {MODES}, got {interpolation!r}")
    if align_corners and (antialias or offset):
        raise ValueError("align_corners excludes antialias and offset, as in F.interpolate: pass antialias=False")
    for i, grid in enumerate(grids):
        if len(grid) != 2 or grid[0] < 1 or grid[1] < 1:
            raise ValueError(f"grids[{i}] must be (rows, columns), each at least 1, got {tuple(grid)}")
        if offset and not 0 < min(grid) + offset < math.inf:
            raise ValueError(f"offset must be finite and leave every grid above 0, got {offset} for {tuple(grid)}")


def _check_backward(args):
    if args.rows < 1 or args.columns < 1:
        raise ValueError(f"rows and columns must be at least 1, got {args.rows} and {args.columns}")
    _check_how(_grids(args.sizes), *args[4:])
    grad, cells = args.grad, _cells(args.sizes)
    if grad.ndim != 2 or grad.shape[0] != cells or not grad.is_floating_point():
        raise ValueError(f"grad must be ({cells}, dim) and floating-point, got {tuple(grad.shape)} {grad.dtype}")


def pos_embed(
    table: Tensor,
    grids: Sequence[tuple[int, int]],
    *,
    interpolation: str = "bicubic",
    antialias: bool = True,
    align_corners: bool = False,
    offset: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Resize the position table to every grid, as F.interpolate and timm's `resample_abs_pos_embed` do.

    table: (rows, columns, dim), on the grid that it was learned for
    grids: (rows, columns) of each grid wanted: the `menu` of a Packing
    interpolation: "bicubic" or "bilinear"
    antialias:     low-pass where a grid is smaller than the table, as timm does
    align_corners: as in F.interpolate; only without antialias
    offset:        DINOv2's interpolate_offset (0.1 in its models): the scale is that of grid + offset over table

    Returns (cells, dim) in the dtype of the table: the cells of every grid, one grid after the other, row by row.
    Computed in fp32; where a grid is the table's own, the rows are the table's.

    Raises ValueError for a table that is not (rows, columns, dim) or is empty, a grid below (1, 1), and options that
    exclude each other.
    """
    grids = list(map(tuple, grids))
    _check(table, grids, interpolation, antialias, align_corners, offset)
    sizes = tuple(chain.from_iterable(grids))
    if not torch.is_grad_enabled():
        return _forward(table, sizes, interpolation, antialias, align_corners, float(offset), backend)
    return _PosEmbed.apply(table, sizes, interpolation, antialias, align_corners, float(offset), backend)


def sample(device="cpu", dtype=torch.float32):
    return torch.ones(2, 2, 8, device=device, dtype=dtype), [3, 2], "bicubic", True, False, 0.0
