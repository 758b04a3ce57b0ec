"""`revit infer --compare`: the same images packed, padded, and as one dense batch per length, timed in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from revit_kernels.grids import Grid
from revit_kernels.modules.patch_embed import resize_mode
from revit_kernels.serving.batching import token_batches

KEEP_BYTES = 1 << 30


class Sample:
    """The first images of a run, decoded: at most `images` of them, and KEEP_BYTES."""

    def __init__(self, images: int = 256):
        self.limit, self.bytes = images, 0
        self.pixels: list[Tensor] = []
        self.grids: list[Grid] = []

    def keep(self, loaded) -> None:
        if len(self.pixels) < self.limit and (not self.pixels or self.bytes + loaded.bytes <= KEEP_BYTES):
            self.bytes += loaded.bytes
            self.pixels.append(loaded.pixels)
            self.grids.append(loaded.grid)


@dataclass
class Way:
    """One way to run the images.

    tokens: how many it computes, padding and prefix tokens included
    resize: the part of `seconds` spent on resizing and normalizing; None where the model does it
    """

    name: str
    tokens: int
    batches: int
    seconds: float = 0.0
    resize: float | None = None


def timm_model(model):
    """(timm's model of the same name and size with its own weights, the label of the comparison).

    Raises ImportError without timm, and whatever timm raises for a name that it does not know.
    """
    import timm

    created = getattr(model, "created_from", {"name": None, "kwargs": {}})
    weight = next(model.parameters())
    arguments = created["kwargs"] | {"num_classes": model.num_classes, "img_size": model.patch_embed.img_size}
    dense = timm.create_model(created["name"], pretrained=False, **arguments | {"dynamic_img_size": True})
    return dense.to(weight.device, weight.dtype).eval(), f"timm {timm.__version__}"


def rival(model):
    """(the model for the dense batches, its label): timm's model if timm is installed and has one, else ours."""
    try:
        dense, name = timm_model(model)
        dense.load_state_dict(model.state_dict())
        return dense, name
    except Exception:  # no timm, no such name, or a changed model: our own modules compute the same
        return model, "this model's own modules, not timm's"


def compare(model, sample: Sample, batch_tokens: int, rounds: int = 3) -> tuple[list[Way], str]:
    """Time the sample three ways in turn: medians over `rounds` rounds, after one warm-up round.

    Each way starts from decoded images and ends with logits. For padded and dense batches, images are resized
    (antialiased, with the model's interpolation) and normalized one by one, then batched in order up to the same number
    of tokens. Batches are padded to their longest image, and padding is masked. A padded image gets the positions of
    another grid, which costs the same.

    Returns (the ways, the label of the dense model).
    """
    dense, name = rival(model)
    indices = range(len(sample.pixels))
    prefix, p = model.num_prefix_tokens, model.patch_embed.patch_size
    lengths = [prefix + h * w for h, w in sample.grids]
    packed = list(token_batches(indices, batch_tokens, lengths.__getitem__))
    by_grid: dict[Grid, list[int]] = {}
    for i in indices:
        by_grid.setdefault(sample.grids[i], []).append(i)
    per_length = [
        batch for group in by_grid.values() for batch in token_batches(group, batch_tokens, lengths.__getitem__)
    ]
    padded = _padded_batches(lengths, batch_tokens)
    frames = [max(lengths[i] for i in batch) - prefix for batch in padded]
    ways = [
        Way("packed", sum(lengths), len(packed)),
        Way("padded", sum(len(b) * (prefix + n) for b, n in zip(padded, frames)), len(padded), resize=0.0),
        Way("one dense batch per length", sum(lengths), len(per_length), resize=0.0),
    ]
    device, dtype = next(model.parameters()).device, next(model.parameters()).dtype
    resize = Resize(model, device, dtype)

    def run_packed() -> float:
        for batch in packed:
            images = [sample.pixels[i].to(device) for i in batch]
            model(images, grids=[sample.grids[i] for i in batch], channels_last=True)
        return 0.0

    def run_padded() -> float:
        spent = 0.0
        for batch, longest in zip(padded, frames):
            start = _now(device)
            # Patches in one row: a frame around grids of several aspects would hold far more padding than sequences do.
            x = torch.zeros(len(batch), 3, p[0], longest * p[1], device=device, dtype=dtype)
            mask = torch.arange(longest + prefix, device=device) < torch.tensor(
                [[lengths[i]] for i in batch], device=device
            )
            for row, i in enumerate(batch):
                h, w = sample.grids[i]
                patches = resize(sample.pixels[i], (h * p[0], w * p[1])).unflatten(1, (h, p[0])).unflatten(3, (w, p[1]))
                x[row, :, :, : h * w * p[1]] = patches.permute(0, 2, 1, 3, 4).flatten(2)
            spent += _now(device) - start
            uneven = any(lengths[i] != longest + prefix for i in batch)  # with a mask, attention is slower
            dense(x, attn_mask=mask[:, None, None, :]) if uneven else dense(x)
        return spent

    def run_dense() -> float:
        spent = 0.0
        for batch in per_length:
            start = _now(device)
            h, w = sample.grids[batch[0]]
            x = torch.stack([resize(sample.pixels[i], (h * p[0], w * p[1])) for i in batch])
            spent += _now(device) - start
            dense(x)
        return spent

    _time(ways, [run_packed, run_padded, run_dense], rounds, device)
    return ways, name


def _time(ways: list[Way], runs: list[Callable[[], float]], rounds: int, device) -> None:
    seconds, resizing = [[] for _ in ways], [[] for _ in ways]
    with torch.inference_mode():
        for turn in range(rounds + 1):
            for i, run in enumerate(runs):
                start = _now(device)
                spent = run()
                total = _now(device) - start
                if turn:
                    seconds[i].append(total)
                    resizing[i].append(spent)
    for way, total, spent in zip(ways, seconds, resizing):
        way.seconds = statistics.median(total)
        if way.resize is not None:
            way.resize = statistics.median(spent)


class Resize:
    """A decoded image (height, width, 3) as the float tensor (3, height, width) that timm's models take."""

    def __init__(self, model, device, dtype):
        self.device, self.dtype, self.mode = device, dtype, resize_mode(model.pretrained_cfg)
        self.mean = torch.tensor(model.pretrained_cfg["mean"], device=device).view(3, 1, 1) * 255
        self.std = torch.tensor(model.pretrained_cfg["std"], device=device).view(3, 1, 1) * 255

    def __call__(self, pixels: Tensor, size: tuple[int, int]) -> Tensor:
        x = pixels.to(self.device).permute(2, 0, 1)[None]
        x = F.interpolate(x, size, mode=self.mode, antialias=True)[0]  # on uint8: torch's fastest path
        return ((x.float() - self.mean) / self.std).to(self.dtype)


def _padded_batches(lengths: list[int], batch_tokens: int) -> list[list[int]]:
    """First in, first out, while the batch, padded to its longest image, is within the budget."""
    batches: list[list[int]] = []
    for i, length in enumerate(lengths):
        if batches and (len(batches[-1]) + 1) * max(length, *(lengths[j] for j in batches[-1])) <= batch_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def table(ways: list[Way], rival_name: str, images: int) -> str:
    """The comparison as text, a line for each way."""
    lines = [f"{images} decoded images to logits; padded and dense batches run by {rival_name}:"]
    head = ("", "images/s", "tokens computed", "batches", "seconds", "of it resizing", "against packed")
    lines.append(f"{head[0]:<27}{head[1]:>10}{head[2]:>17}{head[3]:>9}{head[4]:>9}{head[5]:>16}{head[6]:>16}")
    for way in ways:
        resizing = "in the model" if way.resize is None else f"{way.resize:.2f}"
        ratio = way.seconds / ways[0].seconds
        lines.append(
            f"{way.name:<27}{images / way.seconds:>10.1f}{way.tokens:>17,}{way.batches:>9}{way.seconds:>9.2f}"
            f"{resizing:>16}{f'{ratio:.2f}x the time':>16}"
        )
    return "\n".join(lines)
