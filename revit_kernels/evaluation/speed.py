"""`revit bench`: a batch of mixed lengths, packed, against what else one would run, on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median, quantiles

import torch
from torch import Tensor

from revit_kernels.grids import Grid

WARMUP = 2  # rounds before those that count


@dataclass(frozen=True)
class Duel:
    """Ours against one rival, timed in turn.

    ours, theirs:  seconds of a batch, medians
    ratio:         how many times ours is as fast, the median of the rounds' ratios; low, high: their quartiles
    """

    rival: str
    ours: float
    theirs: float
    ratio: float
    low: float
    high: float


def mixed_images(grids: Sequence[Grid], count: int, patch: tuple[int, int], channels: int, like: Tensor):
    """(images, their grids): noise, already of the size of its grid; every grid as often, longest first."""
    generator = torch.Generator().manual_seed(0)
    chosen = [grids[i * len(grids) // count] for i in range(count)]
    shapes = [(channels, h * patch[0], w * patch[1]) for h, w in chosen]
    return [torch.randn(shape, generator=generator).to(like.device, like.dtype) for shape in shapes], chosen


def rivals(dense, images: list[Tensor], grids: list[Grid], patch: tuple[int, int], prefix: int) -> dict[str, Callable]:
    """What else one would run, by name. dense: timm's model, which takes any size (dynamic_img_size)

    What prepares their inputs (sorting by length, padding) is not timed. Padding is in one row of patches, masked out.
    """
    batches = [
        torch.stack([image for image, one in zip(images, grids) if one == grid]) for grid in dict.fromkeys(grids)
    ]
    longest = max(h * w for h, w in grids)
    padded = torch.zeros(len(images), images[0].shape[0], patch[0], longest * patch[1]).to(images[0])
    for row, (image, (h, w)) in enumerate(zip(images, grids)):
        patches = image.unflatten(1, (h, patch[0])).unflatten(3, (w, patch[1])).permute(0, 2, 1, 3, 4)
        padded[row, :, :, : h * w * patch[1]] = patches.flatten(2)
    lengths = torch.tensor([[prefix + h * w] for h, w in grids], device=padded.device)
    mask = (torch.arange(prefix + longest, device=padded.device) < lengths)[:, None, None, :]
    found = {
        "one dense batch per length": lambda: [dense(batch) for batch in batches],
        "one image at a time": lambda: [dense(image[None]) for image in images],
    }
    if len(batches) > 1:
        found["padded to the longest, masked"] = lambda: dense(padded, attn_mask=mask)
    return found


def _seconds(call: Callable, device: torch.device) -> float:
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


@torch.inference_mode()
def duels(ours: Callable, theirs: dict[str, Callable], device: torch.device, rounds: int, progress=None) -> list[Duel]:
    """Each rival in turn with ours, the strongest first. progress: called with 1 after each round"""
    found = []
    for name, rival in theirs.items():
        pairs = []
        for turn in range(-WARMUP, rounds):
            pair = _seconds(ours, device), _seconds(rival, device)
            if turn >= 0:
                pairs.append(pair)
            if progress is not None:
                progress(1)
        ratios = [b / a for a, b in pairs]
        low, _, high = quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
        a, b = (median(times) for times in zip(*pairs))
        found.append(Duel(name, a, b, median(ratios), low, high))
    return sorted(found, key=lambda duel: duel.ratio)
