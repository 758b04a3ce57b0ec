"""Preparation of videos, and of images as still clips, for a model of clips."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from revit_kernels.data.images import SUFFIXES as IMAGES
from revit_kernels.data.images import ImageError
from revit_kernels.data.videos import SUFFIXES as VIDEOS
from revit_kernels.data.videos import Sampling, decode_clip, still_clip
from revit_kernels.grids import Grid

if TYPE_CHECKING:
    from revit_kernels.serving.infer import GridRule

SUFFIXES = IMAGES | VIDEOS
UNIFORM = "uniform"
CROPS = (1, 3)  # parts of a frame along its longer side


@dataclass(frozen=True)
class ClipRule:
    """Which frames of a video the model sees, and how many patches each frame gets.

    sampling: frames of a clip, and clips of a video
    frame:    the rule of every frame
    crops:    parts of every frame, along its longer side: 1, the whole or its centre as `frame` says, or 3
    tubelet:  frames that one token sees
    run_length: threshold below which repeated tokens are left out, as ClipModel takes it; None keeps all

    Raises ValueError where the frames are no whole number of tubelets, and for other crops.
    """

    sampling: Sampling
    frame: GridRule
    crops: int = 1
    tubelet: int = 1
    run_length: float | None = None

    def __post_init__(self):
        if self.sampling.frames % self.tubelet:
            raise ValueError(f"--frames must be a multiple of {self.tubelet}, got {self.sampling.frames}")
        if self.crops not in CROPS:
            raise ValueError(f"a frame has 1 or 3 crops, got {self.crops}")
        if self.crops > 1 and not (self.frame.grids and self.frame.crop):
            raise ValueError("three crops need a list of --grids or a --policy, and no --fit squash")

    @property
    def views(self) -> int:
        """Clips of one video, whose answers are averaged."""
        return self.sampling.views * self.crops

    @property
    def least(self) -> Grid:
        """The fewest patches that a clip can have, in one view."""
        return (self.sampling.frames // self.tubelet, *self.frame.least)

    def take(self, path: str, hold=None) -> tuple[torch.Tensor, tuple[int, int], tuple[int, int, int]]:
        """(pixels, (height, width) of the file's frames, grid). The pixels are (frames, height, width, 3), or with
        several views (views, frames, height, width, 3). Raises ImageError for a file that cannot be used."""
        target = self.frame.pixels if self.frame.resize else None
        clip = _decode(path, self.sampling, target, hold)
        pixels, grid = clip.pixels, self.frame.grid(clip.size)
        parts = [self.frame.part(pixels, clip.size, at) for at in ((0.5,) if self.crops == 1 else (0.0, 0.5, 1.0))]
        self.frame.check(parts[0].shape[2:4], grid)
        found = np.concatenate(parts) if len(parts) > 1 else parts[0]
        found = torch.from_numpy(np.ascontiguousarray(found))
        return found if self.views > 1 else found[0], clip.size, (self.sampling.frames // self.tubelet, *grid)


def sampling(frames: int, stride: str | None, views: int = 1) -> Sampling:
    """The Sampling for a stride in text: a number of frames, or UNIFORM (also None)."""
    return Sampling(frames, None if stride in (None, UNIFORM) else float(stride), views)


def _decode(path: str, sampling: Sampling, target, hold):
    """The clip of a video or an image. A file with another suffix is tried as a video, then as an image."""
    suffix = os.path.splitext(path)[1].lower()
    if suffix in VIDEOS:
        return decode_clip(path, sampling, target, hold)
    if suffix in IMAGES:
        return still_clip(path, sampling, target, hold)
    try:
        return decode_clip(path, sampling, target, hold)
    except ImageError as error:
        try:
            return still_clip(path, sampling, target, hold)
        except ImageError:
            raise error from None
