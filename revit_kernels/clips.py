"""ClipPacking: which token belongs to which clip, and to which of its frames."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import accumulate
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from revit_kernels.device_cache import copied_at_once
from revit_kernels.packing import Packing, _on_host

ClipGrid = tuple[int, int, int]


def check_clip_grid(name: str, grid) -> ClipGrid:
    """(frames, rows, columns) as integers. Raises ValueError where they are none, or below 1."""
    try:
        frames, rows, columns = (operator.index(n) for n in grid)
    except (TypeError, ValueError):
        raise ValueError(
            f"{name} must be (frames, rows, columns), one grid for all frames of a clip, got {grid!r}"
        ) from None
    if min(frames, rows, columns) < 1:
        raise ValueError(f"{name} must be at least (1, 1, 1), got {(frames, rows, columns)}")
    return frames, rows, columns


@dataclass(eq=False)
class ClipPacking(Packing):
    """Where the tokens of each clip lie in one packed buffer, frame after frame.

    A Packing whose "images" are clips, and whose grids are (frames, rows, columns): clip i owns the rows cu_seqlens[i]
    to cu_seqlens[i + 1], and `image`, `row`, `length_index` and `menu` speak of clips. Norms with an affine per length,
    pooling, and attention over whole clips take it as they take a Packing.

    per_frame:   True: each frame has prefix tokens of its own, [prefix, patches] frame by frame (divided attention);
                 False: each clip has them once, [prefix, patches of frame 0, patches of frame 1, ...]
    frames:      (clips,) int32, on the device: how many frames each clip has
    cu_frames:   (clips + 1,) int32, on the device: where each clip's frames begin in a list of all frames
    clip:        (all frames,) int64, on the device: the clip of each frame
    prefix_rows: (all prefix tokens,) int64, on the device: their rows in the buffer
    patch_rows:  (all patches,) int64, on the device: the patches' rows in the buffer; None where per_frame
    by_frame:    the Packing of the frames. Where per_frame, it is of this buffer: spatial attention and patch embedding
                 take it. Otherwise of a buffer of patches alone, without prefix tokens, whose rows are patch_rows here.
                 Its menu has an entry for each frame of each entry of `menu`, so that a table of positions can be of
                 (menu, frames, rows, columns)

    Build one with `from_grids`. Everything about it is known to the host.
    """

    per_frame: bool
    frames: Tensor
    cu_frames: Tensor
    clip: Tensor
    prefix_rows: Tensor
    patch_rows: Tensor | None
    by_frame: Packing

    @classmethod
    def from_grids(
        cls,
        grids: Sequence[ClipGrid],
        prefix: int = 1,
        *,
        per_frame: bool = True,
        menu: Sequence[ClipGrid] | None = None,
        capacity: int | None = None,
        device: torch.device | str | None = None,
    ) -> ClipPacking:
        """From one (frames, rows, columns) per clip.

        grids:     what each clip has; clips of different grids and frame counts go together
        prefix:    prefix tokens of each frame where per_frame, else of each clip
        per_frame: see ClipPacking
        menu:      the grids in the order of a model's menu; the distinct grids, longest first, if not given
        capacity:  rows of the packed buffer; exactly as many as there are tokens, if not given

        Raises ValueError for a grid that is none, is below (1, 1, 1), or not on the menu, and a capacity too small.
        """
        grids = tuple(check_clip_grid(f"grids[{i}]", grid) for i, grid in enumerate(grids))
        if menu is None:
            menu = tuple(sorted(set(grids), key=lambda grid: (-math.prod(grid), grid)))
        menu = tuple(check_clip_grid("menu", grid) for grid in menu)
        if prefix < 0:
            raise ValueError(f"prefix must be at least 0, got {prefix}")
        rows = {grid: i for i, grid in enumerate(menu)}
        for i, grid in enumerate(grids):
            if grid not in rows:
                raise ValueError(f"grids[{i}] is {grid}, which is not on the menu {menu}")
        counts = [grid[0] for grid in grids]
        prefixes = [count * prefix if per_frame else prefix for count in counts]
        lengths = [own + math.prod(grid) for own, grid in zip(prefixes, grids)]
        total = sum(lengths)
        capacity = total if capacity is None else capacity
        if capacity < total:
            raise ValueError(f"capacity must hold all {total} tokens, got {capacity}")

        index = np.array([rows[grid] for grid in grids], np.int32)
        of_clips = _on_host(index, np.array(lengths, np.int32), capacity, tuple((1, math.prod(g)) for g in menu))
        # A row of the frames' menu for every frame of every row of the clips'.
        by_frame_menu = tuple(grid[1:] for grid in menu for _ in range(grid[0]))
        starts = list(accumulate((grid[0] for grid in menu), initial=0))
        per_clip = [np.arange(starts[i], starts[i] + n, dtype=np.int32) for i, n in zip(index, counts)]
        frame_index = np.concatenate([np.empty(0, np.int32), *per_clip])
        cells = np.array([h * w for h, w in by_frame_menu] or [0], np.int32)[frame_index]
        frame_prefix, of_patches = (prefix, capacity) if per_frame else (0, int(cells.sum()))
        of_frames = _on_host(frame_index, cells + frame_prefix, of_patches, by_frame_menu)
        if per_frame:  # the prefix tokens that each frame begins with
            first = np.repeat(of_frames[0][:-1], prefix)
        else:
            first = np.repeat(of_clips[0][:-1], prefix)
        prefix_rows = first + np.tile(np.arange(prefix, dtype=np.int32), len(first) // max(prefix, 1))
        clip = np.arange(len(grids), dtype=np.int32).repeat(counts)
        cu_frames = np.array([0, *accumulate(counts)], np.int32)
        more = [np.array(counts, np.int32), cu_frames, clip, prefix_rows]
        if not per_frame:
            more.append(np.delete(np.arange(total, dtype=np.int32), prefix_rows))

        device = torch.get_default_device() if device is None else torch.device(device)
        tensors = copied_at_once([*of_clips, *of_frames, *more], device)
        n, m = len(of_clips), len(of_clips) + len(of_frames)
        *four, _, first_row = tensors[:n] if n == 6 else (*tensors[:n], None)
        frame_grids = tuple(grid[1:] for grid in grids for _ in range(grid[0]))
        by_frame = Packing._of(tensors[n:m], by_frame_menu, frame_prefix, of_patches, frame_grids, len(of_frames) == 5)
        counts, cu_frames, clip, prefix_rows, *patch_rows = tensors[m:]
        return cls(
            *(*four, first_row, menu, prefix, capacity, grids, capacity == total),
            *(per_frame, counts, cu_frames, clip.long(), prefix_rows.long()),
            *(patch_rows[0].long() if patch_rows else None, by_frame),
        )

    @classmethod
    def uniform(
        cls,
        clips: int,
        grid: ClipGrid,
        prefix: int = 1,
        *,
        per_frame: bool = True,
        device: torch.device | str | None = None,
    ) -> ClipPacking:
        """One (frames, rows, columns) for every clip."""
        return cls.from_grids([grid] * clips, prefix, per_frame=per_frame, device=device)

    @classmethod
    def from_choice(cls, *_: Any, **__: Any) -> NoReturn:
        """Raises NotImplementedError: how many frames there are has to be known to the host."""
        raise NotImplementedError("a ClipPacking is made from grids that the host knows: use ClipPacking.from_grids")

    @property
    def clips(self) -> int:
        """How many clips there are."""
        return self.images

    def _length(self, grid: ClipGrid) -> int:
        return math.prod(grid) + self.prefix * (grid[0] if self.per_frame else 1)

    @property
    def max_seqlen(self) -> int:
        """The most tokens that a clip of this menu can have, prefix tokens counted."""
        return max([0, *map(self._length, self.menu)])

    @property
    def max_frames(self) -> int:
        """The most frames that a clip of this menu can have."""
        return max([0, *(grid[0] for grid in self.menu)])

    def space(self) -> Packing:
        """For blocks that know space alone: each frame by itself, with the clips' lengths for norms. Only per_frame."""
        frames, index = self.by_frame, self.length_index[self.clip]
        told = (self.menu, self.prefix, self.capacity, None, self.full)
        return Packing(frames.cu_seqlens, index, frames.image, self.row, self.first_row, *told)

    @property
    def placement(self) -> Tensor:
        """Raises ValueError: patches are placed by `by_frame`."""
        raise ValueError("a ClipPacking has no placement of images: by_frame has that of its frames")

    def without_prefix(self) -> tuple[Packing, Tensor]:
        """The packing of the patch tokens alone, and (patches,) int64: the row of each in this one."""
        packing = ClipPacking.from_grids(self.grids, 0, per_frame=False, menu=self.menu, device=self.device)
        if not self.per_frame:
            return packing, self.patch_rows
        shift = self.prefix * (packing.by_frame.image.long() + 1)
        return packing, torch.arange(packing.capacity, device=self.device) + shift

    def split(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """One view (length, ...) per clip of a packed tensor (capacity, ...)."""
        lengths = [self._length(grid) for grid in self.grids]
        return torch.split(tokens[: sum(lengths)], lengths) if lengths else ()

    def keep(self, patches: Tensor) -> KeptPacking:
        """The packing of the prefix tokens and some of the patches; waits for the device, to know how many.

        patches: (all patches,) bool, on the device, in the order of `patch_rows`

        Raises ValueError where each frame has prefix tokens of its own, and for another shape or dtype.
        """
        if self.per_frame:
            raise ValueError("patches can be left out only where a clip is one sequence, not where each frame is one")
        if patches.dtype != torch.bool or patches.shape != self.patch_rows.shape:
            raise ValueError(
                f"patches must be {tuple(self.patch_rows.shape)} bool, got {tuple(patches.shape)} {patches.dtype}"
            )
        stay = (self.image >= 0).index_copy(0, self.patch_rows, patches)
        rows = stay.nonzero()[:, 0]
        image = self.image[rows]
        lengths = torch.bincount(image, minlength=self.clips)
        cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
        told = (self.menu, self.prefix, len(rows), None, True, self, rows, tuple(lengths.tolist()))
        return KeptPacking(cu_seqlens, self.length_index, image, self.row[rows], None, *told)


@dataclass(eq=False)
class KeptPacking(Packing):
    """Where the tokens lie of clips that some patches were left out of; `ClipPacking.keep` makes one.

    The grids of `menu` are those that the clips had: norms with an affine per length go by them.

    whole:   the packing of all tokens
    rows:    (capacity,) int64, on the device: the row of `whole` that each token has there
    lengths: tokens that each clip has, prefix tokens counted; known to the host
    """

    whole: ClipPacking
    rows: Tensor
    lengths: tuple[int, ...]

    @property
    def grids(self) -> None:
        """None: what is left of a clip is no grid."""

    def split(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """One view (length, ...) per clip of a packed tensor (capacity, ...)."""
        return torch.split(tokens, self.lengths) if self.lengths else ()


_TENSORS = ("cu_seqlens", "length_index", "image", "row", "first_row", "frames", "cu_frames", "clip", "prefix_rows")
_TENSORS += ("patch_rows", "by_frame")
_KNOWN = tuple(field.name for field in fields(ClipPacking) if field.name not in _TENSORS)
pytree.register_pytree_node(
    ClipPacking,
    lambda p: ([getattr(p, name) for name in _TENSORS], tuple(getattr(p, name) for name in _KNOWN)),
    lambda tensors, known: ClipPacking(**dict(zip(_TENSORS, tensors)), **dict(zip(_KNOWN, known))),
    serialized_type_name="revit_kernels.ClipPacking",
)
