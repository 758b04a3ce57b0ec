"""Learned positions as the sum of a row's and a column's, instead of one table of both."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revit_kernels.grids import Grid


class AxisPositions(nn.Module):
    """A table of rows and one of columns, whose sum is the position of a cell.

    grid:        how many rows and columns the tables have
    interpolate: whether a grid's rows and columns are resampled linearly from the tables, as timm's NaFlexVit does; if
                 not, row i of every grid is row i of the table
    """

    def __init__(self, grid: Grid, dim: int, *, interpolate: bool = True, device=None, dtype=None):
        super().__init__()
        kwargs = {"device": device, "dtype": dtype}
        self.interpolate = interpolate
        self.y = nn.Parameter(torch.empty(1, grid[0], dim, **kwargs))
        self.x = nn.Parameter(torch.empty(1, grid[1], dim, **kwargs))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.y, std=0.02)
        nn.init.trunc_normal_(self.x, std=0.02)

    def _axis(self, table: Tensor, count: int) -> Tensor:
        """(count, dim)"""
        if not self.interpolate:
            if count > table.shape[1]:
                raise ValueError(f"the model has positions for {table.shape[1]} rows and columns, got {count}")
            return table[0, :count]
        if count == table.shape[1]:
            return table[0]
        return F.interpolate(table.mT.float(), count, mode="linear")[0].T.to(table.dtype)

    def forward(self, menu: tuple[Grid, ...], square: bool = False) -> Tensor:
        """(cells of all the grids, dim), in order. Raises ValueError for a grid beyond fixed tables.

        square: resample to as many rows as columns, the larger number, and use the first of them
        """
        parts = [self.y[0, :0]]
        for h, w in menu:
            rows, columns = (max(h, w),) * 2 if square else (h, w)
            rows, columns = self._axis(self.y, rows)[:h], self._axis(self.x, columns)[:w]
            parts.append((rows[:, None] + columns).flatten(0, 1))
        return torch.cat(parts)
