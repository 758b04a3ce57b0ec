"""Run-length tokens (arXiv:2411.05222): which tokens of a clip differ from the ones before them at their place."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from revit_kernels.clips import ClipGrid
from revit_kernels.ops.patch_embed.reference import resized


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
    found = []
    for end, (steps, *grid) in zip(accumulate(grid[0] for grid in grids), grids):
        clip = frames[end - steps : end]
        clip = clip if isinstance(clip, Tensor) else torch.stack(clip)
        x = (clip.movedim(-1, 1) if channels_last else clip).float()
        size = tuple(n * p for n, p in zip(grid, patch_size))
        x = x if tuple(x.shape[2:]) == size else resized(x, size, interpolation)
        apart = (x[1:] - x[:-1]).abs()
        if clip.dtype == torch.uint8 and std is not None:
            apart = apart / (255 * apart.new_tensor(std)[:, None, None])
        apart = F.avg_pool2d(apart, patch_size).mean(1).flatten()
        found += [apart.new_full((grid[0] * grid[1],), torch.inf), apart]
    return torch.cat(found) if found else torch.empty(0)
