"""The definition of the op, in plain PyTorch: every other backend is tested against this file."""

import torch

from revit_kernels.ops.pos_embed.interpolation import matrix


def refusal(step, args):
    return None


def _grids(sizes):
    return list(zip(sizes[::2], sizes[1::2]))


def forward(table, sizes, interpolation, antialias, align_corners, offset):
    rows, columns, dim = table.shape
    wide = torch.promote_types(table.dtype, torch.float32)
    cells = [table.new_empty(0, dim)]
    for h, w in _grids(sizes):
        grid = table
        if (h, w) != (rows, columns):
            down, across = (
                torch.from_numpy(matrix(*pair, interpolation, antialias, align_corners, offset)).to(table.device, wide)
                for pair in ((rows, h), (columns, w))
            )
            grid = torch.einsum("hr,wc,rcd->hwd", down, across, table.to(wide)).to(table.dtype)
        cells.append(grid.reshape(h * w, dim))
    return torch.cat(cells)


def backward(grad, rows, columns, sizes, interpolation, antialias, align_corners, offset):
    wide = torch.promote_types(grad.dtype, torch.float32)
    dtable = torch.zeros(rows, columns, grad.shape[1], dtype=wide, device=grad.device)
    grids = _grids(sizes)
    for (h, w), part in zip(grids, grad.to(wide).split([h * w for h, w in grids]) if grids else ()):
        part = part.reshape(h, w, -1)
        if (h, w) != (rows, columns):
            down, across = (
                torch.from_numpy(matrix(*pair, interpolation, antialias, align_corners, offset)).to(grad.device, wide)
                for pair in ((rows, h), (columns, w))
            )
            part = torch.einsum("hr,wc,hwd->rcd", down, across, part)
        dtable += part
    return dtable.to(grad.dtype)
