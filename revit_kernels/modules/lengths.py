"""Parameters that exist once per length of a menu, picked or interpolated for the lengths of a batch."""

import math
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from revit_kernels.device_cache import constant

Grid = tuple[int, ...]


def cells(grid: Grid) -> int:
    """The patches of a grid (rows, columns), or of a clip's (frames, rows, columns): its length."""
    return math.prod(grid)


def tokens_of(model, grid: Grid) -> int:
    """The tokens of one image or clip in a model, prefix tokens counted: those of every frame, where they have some."""
    return cells(grid) + model.num_prefix_tokens * (grid[0] if model.per_frame else 1)


def check_menu(menu) -> tuple[Grid, ...]:
    """The menu as grids. Raises ValueError where it is empty or its lengths do not strictly decrease."""
    menu = tuple(tuple(int(n) for n in grid) for grid in menu)
    if not menu or {len(grid) for grid in menu} not in ({2}, {3}) or min(map(min, menu)) < 1:
        raise ValueError(f"menu must list grids (rows, columns), or (frames, rows, columns) of clips, got {menu}")
    lengths = [cells(grid) for grid in menu]
    if any(longer <= shorter for longer, shorter in pairwise(lengths)):
        raise ValueError(f"the menu's grids must have fewer and fewer patches, got {lengths}")
    return menu


def nearest(length: int, menu: tuple[Grid, ...]) -> int:
    """The row of the menu whose length is off by the smallest factor."""
    return min(range(len(menu)), key=lambda i: abs(math.log(length / cells(menu[i]))))


def weights(length: int, menu: tuple[Grid, ...]) -> list[float]:
    """How much of each menu row a length gets: one row where it is on the menu, or beyond its ends; else its two
    neighbours, linearly in the logarithm of the length (our choice: a length twice as long is one step)."""
    lengths = [cells(grid) for grid in menu]
    row = [0.0] * len(menu)
    if length >= lengths[0] or length <= lengths[-1]:
        row[0 if length >= lengths[0] else -1] = 1.0
        return row
    after = next(i for i, n in enumerate(lengths) if n <= length)
    if lengths[after] == length:
        row[after] = 1.0
        return row
    upper, lower = (math.log(lengths[i]) for i in (after - 1, after))
    share = (math.log(length) - lower) / (upper - lower)
    row[after - 1], row[after] = share, 1 - share
    return row


def _rows(menu: tuple[Grid, ...], wanted: tuple[Grid, ...]) -> tuple[tuple[int, ...] | None, list[list[float]]]:
    """The menu row of each wanted grid, or None where some lie between; and the weights of every one."""
    mix = [weights(cells(grid), menu) for grid in wanted]
    exact = all(max(row) == 1.0 for row in mix)
    return (tuple(row.index(1.0) for row in mix) if exact else None), mix


_kept_rows = lru_cache(maxsize=1024)(_rows)


def exact_rows(menu: tuple[Grid, ...], wanted: tuple[Grid, ...]) -> tuple[int, ...] | None:
    """The menu row of each wanted grid; None where some lie between two."""
    return _kept_rows(menu, wanted)[0]


def select(longest: Tensor, shorter: Tensor, menu: tuple[Grid, ...], wanted: tuple[Grid, ...]) -> Tensor:
    """The rows for the wanted grids.

    longest: (dim,), of menu[0]; shorter: (lengths - 1, dim), of the others

    Returns (wanted, dim), or (dim,) where one grid is wanted. Differentiable; nothing waits for the device.
    """
    # torch.compile would trace through the cache, and warns of that
    exact, mix = (_rows if torch.compiler.is_compiling() else _kept_rows)(menu, wanted)
    if exact is not None and len(exact) == 1:
        return longest if exact[0] == 0 else shorter[exact[0] - 1]
    if not wanted:
        return longest
    table = whole_table(longest, shorter)
    if exact == tuple(range(len(menu))):
        return table
    if exact is not None:
        return table[constant(("rows", exact), table.device, lambda: torch.tensor(exact))]
    key = "shares", tuple(map(tuple, mix))
    share = constant(key, table.device, lambda: torch.tensor(mix)).to(table.dtype)
    mixed = (share[:, :, None] * table).sum(1)  # no matrix product: autocast would round it
    return mixed[0] if len(wanted) == 1 else mixed


def whole_table(longest: Tensor, shorter: Tensor) -> Tensor:
    """(lengths, dim): a row for each length of the menu."""
    table = _joined(longest, shorter)
    return torch.cat([longest[None], shorter]) if table is None else table


def join(longest: nn.Parameter, shorter: nn.Parameter) -> None:
    """Place both plain parameters in one buffer, so that `select` reads them as one table without a copy.

    Both stay parameters with their own names, gradients and optimizer states. A write to one in place writes to the
    table; after one was given new memory, `select` copies.
    """
    tensors = longest.data, shorter.data
    one = tensors[0].dtype == tensors[1].dtype and tensors[0].device == tensors[1].device
    plain = all(type(t) is Tensor and not (t.is_meta or t.is_inference()) for t in tensors)
    if not (one and plain and tensors[0].layout == tensors[1].layout == torch.strided):
        return
    if _get_current_dispatch_mode() is None and _one_table(*tensors) is None:
        table = torch.cat([tensors[0][None], tensors[1]])
        longest.data, shorter.data = table[0], table[1:]


def _one_table(longest: Tensor, shorter: Tensor) -> Tensor | None:
    """Both as one table (1 + lengths, dim), a view, if the second follows the first in one buffer; else None."""
    dim = longest.shape[0]
    if longest.untyped_storage().data_ptr() != shorter.untyped_storage().data_ptr() or not shorter.is_contiguous():
        return None
    if longest.stride(0) != 1 or shorter.storage_offset() != longest.storage_offset() + dim or not dim:
        return None
    return longest.as_strided((1 + shorter.shape[0], dim), (dim, 1))


def _joined(longest: Tensor, shorter: Tensor) -> Tensor | None:
    """The table of parameters that `join` laid out, where no gradient is recorded (it would have to reach both)."""
    if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
        return None
    if torch.is_grad_enabled() and (longest.requires_grad or shorter.requires_grad):
        return None
    if type(longest) is not nn.Parameter or type(shorter) is not nn.Parameter or longest.dtype != shorter.dtype:
        return None
    return _one_table(longest.detach(), shorter.detach())
