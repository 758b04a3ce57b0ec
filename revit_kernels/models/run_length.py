"""Run-length tokens (arXiv:2411.05222): which tokens of a clip differ from the ones before them at their place."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, groupby

import torch
from torch import Tensor

from revit_kernels.clips import ClipGrid
from revit_kernels.ops.patch_embed.reference import resized

MOST = 1 << 22  # numbers that are compared at once


def differences(
    frames: Tensor | Sequence[Tensor],
    grids: Sequence[ClipGrid],
    patch_size: tuple[int, int],
    std: Sequence[float] | None,
    interpolation: str,
    channels_last: bool = False,
) -> Tensor:
    """How far the pixels of each token of clips are from those of the token one step earlier at the same place.

    frames:        what becomes the tokens of one step each, clip after clip, as `ops.patch_embed` takes images: frames,
                   or tubelets with their frames' channels side by side
    grids:         (frames, rows, columns) of tokens of each clip
    patch_size:    (height, width) in pixels: a frame of another size than its grid's is resized first, as the model's
    std:           a number per channel that uint8 pixels are divided by, in units of an image from 0 to 1
    interpolation: of the resizing

    Returns (tokens,) float32, clip after clip, frame after frame, row by row: the mean of the absolute differences over
    the token's pixels and channels as the model sees them; infinity for the first token of a place.
    """

    def shape(clip: int) -> torch.Size:
        return frames.shape[1:] if isinstance(frames, Tensor) else frames[starts[clip]].shape

    starts, found = [0, *accumulate(grid[0] for grid in grids)], []
    for (_, (steps, rows, columns)), same in groupby(enumerate(grids), lambda clip: (shape(clip[0]), clip[1])):
        numbers = [number for number, _ in same]
        size = rows * patch_size[0], columns * patch_size[1]
        at_once = max(1, MOST // (steps * shape(numbers[0]).numel()))
        for first in range(0, len(numbers), at_once):
            some = numbers[first : first + at_once]
            clips = frames[starts[some[0]] : starts[some[-1] + 1]]
            clips = (clips if isinstance(clips, Tensor) else torch.stack(clips)).unflatten(0, (len(some), steps))
            apart = _apart(clips, size, (rows, columns), std, interpolation, channels_last)
            begin = apart.new_full((len(some), rows * columns), torch.inf)
            found.append(torch.cat([begin, apart.flatten(1)], 1).flatten())
    return torch.cat(found) if found else torch.empty(0)


def _apart(clips: Tensor, size, grid, std, interpolation: str, channels_last: bool) -> Tensor:
    """(clips, steps - 1, rows, columns) of (clips, steps, ...) of one size."""
    x = clips
    if tuple(x.shape[2:4] if channels_last else x.shape[3:]) != size:
        x = (x.movedim(-1, 2) if channels_last else x).flatten(0, 1).float()
        x, channels_last = resized(x, size, interpolation).unflatten(0, clips.shape[:2]), False
    x = x.float()
    apart = (x[:, 1:] - x[:, :-1]).abs_()
    if clips.dtype == torch.uint8 and std is not None:
        scale = 1 / (255 * apart.new_tensor(std))
        apart *= scale if channels_last else scale[:, None, None]
    (rows, columns), height = grid, -3 if channels_last else -2
    cells = apart.unflatten(height + 1, (columns, -1)).unflatten(height - 1, (rows, -1))
    return cells.mean((-4, -2, -1) if channels_last else (-5, -3, -1))
