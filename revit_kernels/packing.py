"""Packing: which token belongs to which image."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from revit_kernels.device_cache import DeviceCache, constant, copied_at_once, watched
from revit_kernels.grids import Grid

_MOST_KEPT = 2048  # tokens of a dense batch on a CPU whose packing is kept: of one image or a few, it takes time


def _check_grid(name: str, grid) -> Grid:
    try:
        h, w = (operator.index(n) for n in grid)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a pair (rows, columns) of patches, got {grid!r}") from None
    if h < 1 or w < 1:
        raise ValueError(f"{name} must be at least (1, 1), got {(h, w)}")
    return h, w


def _is_grid(grid) -> bool:
    """Whether `_check_grid` would return this very object."""
    return type(grid) is tuple and len(grid) == 2 and type(grid[0]) is type(grid[1]) is int and min(grid) > 0


def _check_grids(grids: Sequence[Grid]) -> tuple[tuple[Grid, ...], Sequence, dict]:
    """The grids, a key for each, and each key's grid. Of hundreds of images few have a grid object of their own."""
    grids = tuple(grids)
    if not torch.compiler.is_compiling():
        keys = list(map(id, grids))
        by_key = dict(zip(keys, grids))
        if all(map(_is_grid, by_key.values())):
            return grids, keys, by_key
    grids = tuple(_check_grid(f"grids[{i}]", grid) for i, grid in enumerate(grids))
    return grids, grids, {grid: grid for grid in grids}


def _distinct(grids: Iterable[Grid]) -> tuple[Grid, ...]:
    """The menu of these grids: each once, longest first."""
    return tuple(sorted(set(grids), key=lambda grid: (-grid[0] * grid[1], grid)))


_CPU = torch.device("cpu")
_uniforms = DeviceCache(16)


def _cells(menu: tuple[Grid, ...]) -> list[tuple[int, int, int]]:
    """Rows, columns, and where the grid's cells start in a list of the cells of the whole menu."""
    starts = accumulate((h * w for h, w in menu), initial=0)
    return [(h, w, start) for (h, w), start in zip(menu, starts)] or [(0, 0, 0)]


def _table(menu: tuple[Grid, ...], device: torch.device) -> Tensor:
    """(menu, 3) int32: `_cells`"""
    return constant(("cells", menu), device, lambda: torch.tensor(_cells(menu), dtype=torch.int32))


def _on_host(index: np.ndarray, lengths: np.ndarray, capacity: int, menu: tuple[Grid, ...]) -> list[np.ndarray]:
    """What the device is told of a packing, all int32. index, lengths: each image's row of the menu and its tokens.

    Returns cu_seqlens, length_index, image, row, placement and, where rows are left over, first_row.
    """
    cu_seqlens = np.zeros(len(index) + 1, np.int32)
    np.add.accumulate(lengths, out=cu_seqlens[1:])
    placement, number = np.array(_cells(menu), np.int32)[index], np.arange(len(index), dtype=np.int32)
    image, row = number.repeat(lengths), index.repeat(lengths)
    if len(image) == capacity:
        return [cu_seqlens, index, image, row, placement]
    unused = np.full(capacity - len(image), -1, np.int32)
    image, row = (np.concatenate([numbers, unused]) for numbers in (image, row))
    return [cu_seqlens, index, image, row, placement, np.minimum(row, 0)]


def _traced(rows: list[int], lengths: list[int], capacity: int, total: int, device) -> list[Tensor | None]:
    """The tensors of a packing, by torch's ops alone."""
    index = torch.tensor(rows, dtype=torch.int32)
    numbered = [torch.full((n,), i) for i, n in enumerate(lengths)]
    image = torch.cat(numbered) if numbered else torch.empty(0, dtype=torch.long)
    unused = image.new_full((capacity - total,), -1)
    row = torch.cat([index[image], unused.int()]).to(device)
    cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device)
    image = torch.cat([image, unused]).int().to(device)
    return [cu_seqlens, index.to(device), image, row, None if capacity == total else row.clamp(max=0)]


@dataclass(eq=False)
class Packing:
    """Where each image's tokens lie in one packed buffer of tokens.

    Image i owns the rows cu_seqlens[i] to cu_seqlens[i + 1]: its prefix tokens first, then its patches, row by row.
    Rows beyond cu_seqlens[-1] belong to no image: every op writes zeros there and never reads them.

    cu_seqlens:   (images + 1,) int32, on the device
    length_index: (images,) int32, on the device: the row of `menu` that each image is given
    image:        (capacity,) int32, on the device: the image that each token belongs to, -1 for none
    row:          (capacity,) int32, on the device: the row of `menu` that each token's image is given, -1 for none
    first_row:    (capacity,) int32 like `row`, but 0 for every token of an image: for a module with one affine.
                  None where `full`: then no token needs to be told apart
    menu:         the grids (rows, columns) that occur, longest first; known to the host
    prefix:       prefix tokens (class, distillation, register) of each image
    capacity:     rows of the packed buffer
    full:         whether the host knows that no row is unused

    Build one with `from_grids`, `uniform` or `from_choice`.
    """

    cu_seqlens: Tensor
    length_index: Tensor
    image: Tensor
    row: Tensor
    first_row: Tensor | None
    menu: tuple[Grid, ...]
    prefix: int
    capacity: int
    host_grids: tuple[Grid, ...] | None
    full: bool

    @classmethod
    def from_grids(
        cls,
        grids: Sequence[Grid],
        prefix: int = 1,
        *,
        menu: Sequence[Grid] | None = None,
        capacity: int | None = None,
        device: torch.device | str | None = None,
    ) -> Packing:
        """From one grid per image, known to the host.

        grids:    (rows, columns) of patches for each image
        prefix:   prefix tokens of each image
        menu:     the grids in the order of a model's menu; the distinct grids, longest first, if not given
        capacity: rows of the packed buffer; exactly as many as there are tokens, if not given

        Raises ValueError for a grid below (1, 1) or not on the menu, and a capacity that is too small.
        """
        grids, keys, by_key = _check_grids(grids)
        menu = _distinct(by_key.values()) if menu is None else tuple(_check_grid("menu", grid) for grid in menu)
        if prefix < 0:
            raise ValueError(f"prefix must be at least 0, got {prefix}")
        row = {grid: i for i, grid in enumerate(menu)}
        for grid in by_key.values():
            if grid not in row:
                raise ValueError(f"grids[{grids.index(grid)}] is {grid}, which is not on the menu {menu}")
        row_of = {key: row[grid] for key, grid in by_key.items()}
        rows = [row_of[key] for key in keys]
        lengths = [prefix + h * w for h, w in menu]
        total = sum([lengths[i] for i in rows])
        capacity = total if capacity is None else capacity
        if capacity < total:
            raise ValueError(f"capacity must hold all {total} tokens, got {capacity}")
        known = (menu, prefix, capacity, grids, capacity == total)
        if watched():
            return cls(*_traced(rows, [lengths[i] for i in rows], capacity, total, device), *known)
        device = torch.get_default_device() if device is None else torch.device(device)
        index = np.array(rows, np.int32)
        arrays = _on_host(index, np.array(lengths, np.int32)[index], capacity, menu)
        return cls._of(copied_at_once(arrays, device), *known)

    @classmethod
    def _of(cls, tensors: list[Tensor], *known) -> Packing:
        """tensors: those of `_on_host`, on the device; known: what the host knows"""
        *four, placement, first_row = tensors if len(tensors) == 6 else (*tensors, None)
        packing = cls(*four, first_row, *known)
        packing._placement = placement
        return packing

    @classmethod
    def uniform(cls, images: int, grid: Grid, prefix: int = 1, *, device: torch.device | str | None = None) -> Packing:
        """One grid for every image: a dense batch seen as a packing. `images` may be symbolic, as in torch.export."""
        grid = _check_grid("grid", grid)
        length = prefix + grid[0] * grid[1]
        if watched() or type(images) is not int or device is None:
            return cls._uniform(images, grid, prefix, device)
        device = torch.device(device)
        if device == _CPU and images * length <= _MOST_KEPT:
            return _kept_uniform(images, grid, prefix)
        if device.type != "cuda" or device.index is None:
            return cls._uniform(images, grid, prefix, device)

        def make() -> list[Tensor]:
            lengths = np.full(images, length, np.int32)
            return list(map(torch.from_numpy, _on_host(np.zeros_like(lengths), lengths, images * length, (grid,))))

        with torch.inference_mode(False):  # else what is kept could not be saved for a backward
            tensors = _uniforms.get((images, grid, prefix), device, make)
        return cls._of(tensors, (grid,), prefix, images * length, None, True)

    @classmethod
    def _uniform(cls, images: int, grid: Grid, prefix: int, device) -> Packing:
        length = prefix + grid[0] * grid[1]
        tokens = torch.arange(images * length, dtype=torch.int32, device=device)
        return cls(
            torch.arange(images + 1, dtype=torch.int32, device=device) * length,
            torch.zeros(images, dtype=torch.int32, device=device),
            torch.div(tokens, length, rounding_mode="floor"),
            torch.zeros_like(tokens),
            None,
            (grid,),
            prefix,
            images * length,
            None,
            True,
        )

    @classmethod
    def from_choice(cls, choice: Tensor, menu: Sequence[Grid], prefix: int = 1, *, capacity: int) -> Packing:
        """From a choice made on the device (an assigner's, say), without waiting for the device.

        choice:   (images,) integer, the row of `menu` that each image is given; below 0 for none: a slot without an
                  image, which gets no tokens
        menu:     the grids to choose from
        capacity: rows of the packed buffer. Images are packed in order while they fit; from the first that does not,
                  an image gets no tokens (see `fits`), and VarLenViT answers zeros for it.
        """
        menu = tuple(_check_grid("menu", grid) for grid in menu)
        if not menu:
            raise ValueError("menu must name at least one grid")
        if choice.ndim != 1 or choice.is_floating_point() or choice.dtype == torch.bool:
            raise ValueError(f"choice must be (images,) of an integer dtype, got {tuple(choice.shape)} {choice.dtype}")
        if prefix < 0 or capacity < 1:
            raise ValueError(f"prefix must be at least 0 and capacity at least 1, got {prefix} and {capacity}")
        table = _table(menu, choice.device)
        lengths = prefix + table[:, 0] * table[:, 1]
        none, choice = choice < 0, choice.to(torch.int32).clamp(0, len(menu) - 1)
        ends = lengths[choice.long()].masked_fill(none, 0).cumsum(0)
        ends = torch.where(ends <= capacity, ends, 0).cummax(0).values if len(choice) else ends
        cu_seqlens = torch.cat([ends.new_zeros(1), ends])
        image = torch.searchsorted(ends, torch.arange(capacity, device=choice.device), right=True)
        unused = image >= len(choice)
        row = torch.cat([choice, choice.new_full((1,), -1)])[image].int()
        image = torch.where(unused, -1, image).int()
        return cls(cu_seqlens.int(), choice, image, row, row.clamp(max=0), menu, prefix, capacity, None, False)

    @property
    def images(self) -> int:
        """How many images there are."""
        return self.length_index.shape[0]

    @property
    def device(self) -> torch.device:
        return self.cu_seqlens.device

    @property
    def max_seqlen(self) -> int:
        """The most tokens an image of this menu can have, prefix tokens counted. Never read back from the device."""
        return self.prefix + max([0, *map(math.prod, self.menu)])

    @property
    def fits(self) -> Tensor:
        """(images,) bool, on the device: whether the image found room in the buffer."""
        return self.cu_seqlens[1:] > self.cu_seqlens[:-1]

    @property
    def grids(self) -> tuple[Grid, ...] | None:
        """The grid of each image, or None where the device chose them."""
        if self.host_grids is None and self.full and len(self.menu) == 1:
            return self.menu * self.images
        return self.host_grids

    @property
    def placement(self) -> Tensor:
        """(images, 3) int32: rows and columns of each image's grid, and where that grid starts in a table that
        lists the cells of every grid of the menu, in order."""
        kept = self.__dict__.get("_placement")
        return _table(self.menu, self.device)[self.length_index.long()] if kept is None else kept

    def without_prefix(self) -> tuple[Packing, Tensor]:
        """The packing of the patch tokens alone, and (tokens,) int64: the row of each in this packing.

        Only for packings whose grids the host knows. Raises ValueError otherwise.
        """
        if self.grids is None:
            raise ValueError("prefix tokens can be left out only where the host knows the grids")
        packing = Packing.from_grids(self.grids, 0, menu=self.menu, device=self.device)
        shift = self.prefix * (packing.image.long() + 1)
        return packing, torch.arange(packing.capacity, device=self.device) + shift

    def split(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """One view (length, ...) per image of a packed tensor (capacity, ...). The host must know the grids."""
        if self.grids is None:
            raise ValueError("tokens can be split by image only where the host knows the grids")
        lengths = [self.prefix + h * w for h, w in self.grids]
        return torch.split(tokens[: sum(lengths)], lengths) if lengths else ()


class PackedTokens(NamedTuple):
    """Tokens of images of several lengths, and which of them belongs to which image.

    tokens:  (capacity, dim)
    packing: where each image's tokens lie
    """

    tokens: Tensor
    packing: Packing

    def split(self) -> tuple[Tensor, ...]:
        """One view (length, dim) per image."""
        return self.packing.split(self.tokens)


@lru_cache(maxsize=64)
def _kept_uniform(images: int, grid: Grid, prefix: int) -> Packing:
    with torch.inference_mode(False):  # else what is kept could not be saved for a backward
        packing = Packing._uniform(images, grid, prefix, "cpu")
        packing._placement = packing.placement
        return packing


pytree.register_pytree_node(
    Packing,
    lambda p: (
        [p.cu_seqlens, p.length_index, p.image, p.row, p.first_row],
        (p.menu, p.prefix, p.capacity, p.host_grids, p.full),
    ),
    lambda tensors, host: Packing(*tensors, *host),
    serialized_type_name="revit_kernels.Packing",
)
