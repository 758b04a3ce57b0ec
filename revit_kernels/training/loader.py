"""Training images in an order that depends on the seed and the epoch alone, so that any step can be begun at."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset


def seed_of(*parts: int) -> int:
    """One seed of several numbers."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


class Order:
    """The batches of one epoch, as (index, seed) pairs: DataLoader's batch sampler.

    batch: images of a step in each process; images that make no whole step are left out, others each epoch
    rank, world: of this process and how many there are: a step takes batch * world images, dealt out in turn
    start: the first step
    """

    def __init__(self, images: int, batch: int, seed: int, epoch: int, rank: int = 0, world: int = 1, start: int = 0):
        if images < batch * world:
            raise ValueError(f"a step takes {batch * world} images, but there are only {images}: give a smaller batch")
        self.images, self.batch, self.seed, self.epoch = images, batch, seed, epoch
        self.rank, self.world, self.start = rank, world, start
        self.steps = images // (batch * world)

    def __len__(self) -> int:
        return self.steps - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.images)
        whole = self.batch * self.world
        for step in range(self.start, self.steps):
            members = order[step * whole : (step + 1) * whole][self.rank :: self.world]
            yield [(int(i), seed_of(self.seed, self.epoch, int(i))) for i in members]


class Augmented(Dataset):
    """The images of a set, augmented: what an image becomes depends on its seed alone, in whatever process.

    images:  a data.datasets.ImageSet
    size:    (height, width) of what is returned; of every frame, of a set of clips
    augment: of `augmentation`, or None
    interpolation: how the model resizes images, see `modules.patch_embed.resize_mode`
    """

    def __init__(self, images, size: tuple[int, int], augment: Callable | None = None, interpolation: str = "bicubic"):
        self.images, self.size, self.augment, self.interpolation = images, size, augment, interpolation

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, int]:
        index, seed = item
        pixels = torch.from_numpy(np.ascontiguousarray(self.images.pixels(index)))
        if self.augment is not None:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed)  # the CPU's alone: torch.manual_seed walks the stack for CUDA
                pixels = self.augment(pixels.movedim(-1, -3)).movedim(-3, -1)  # the same for all frames of a clip
        if tuple(pixels.shape[-3:-1]) != self.size:
            pixels = stretched(pixels, self.size, self.interpolation)
        return pixels.contiguous(), int(self.images.targets[index])


def stretched(pixels: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    """The whole image, or every frame, stretched to the size: as the model sees an image at evaluation."""
    planes = pixels.view(-1, *pixels.shape[-3:]).permute(0, 3, 1, 2).float()
    planes = F.interpolate(planes, size, mode=interpolation, antialias=True)
    planes = planes.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    return planes.view(*pixels.shape[:-3], *size, pixels.shape[-1])


def load(dataset: Augmented, order: Order, workers: int, pin: bool = False) -> DataLoader:
    """Batches (images (batch, height, width, 3) or clips (batch, frames, height, width, 3) uint8, targets (batch,))."""
    return DataLoader(dataset, batch_sampler=order, num_workers=workers, pin_memory=pin, persistent_workers=False)
