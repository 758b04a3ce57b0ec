"""`revit infer`: image files in, one record each out, in batches by a budget of tokens."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from revit_kernels.adaptive.model import AdaptiveViT
from revit_kernels.data.images import Decoded, ImageError, show
from revit_kernels.engines import Engine
from revit_kernels.grids import Grid, largest_grid, native_grid
from revit_kernels.modules.lengths import cells, tokens_of
from revit_kernels.serving.batching import token_batches
from revit_kernels.serving.loading import Loaded, Pace, load_all
from revit_kernels.serving.records import Answer

LARGEST_PATCH = 1024  # pixels a side, of a kernel that is resized instead of the image
NOT_FINITE = "the model's answer is not finite: its weights are damaged, or the dtype is too small for them"
BATCH_BYTES = 512 << 20  # decoded images in one batch


@dataclass(frozen=True)
class GridRule:
    """How many patches an image gets.

    patch_size: (height, width) of a patch, in pixels
    max_tokens: the most patches, where each image keeps its own aspect
    grids:      or the grids to choose from: the largest that does not enlarge the image
    crop:       with `grids`, cut the centre of the grid's aspect out of the image, instead of stretching it
    resize:     False where the patch kernel is resized instead of the image (the model's patch_method "patch")
    """

    patch_size: tuple[int, int]
    max_tokens: int
    grids: tuple[Grid, ...] | None = None
    crop: bool = True
    resize: bool = True

    def grid(self, size: tuple[int, int]) -> Grid:
        if self.grids:
            return largest_grid(size, self.patch_size, self.grids)
        return native_grid(size, self.patch_size, self.max_tokens)

    def pixels(self, size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) that an image of this size is resized to, what is cropped off included."""
        rows, columns = self.grid(size)
        target = rows * self.patch_size[0], columns * self.patch_size[1]
        if not self.grids or not self.crop:
            return target
        scale = max(target[0] / size[0], target[1] / size[1])
        return max(target[0], round(size[0] * scale)), max(target[1], round(size[1] * scale))

    def cut(self, decoded: Decoded) -> np.ndarray:
        """The part of the image that the model sees: a view (height, width, 3)."""
        return self.part(decoded.pixels, decoded.size)

    def part(self, pixels: np.ndarray, size: tuple[int, int], place: float = 0.5) -> np.ndarray:
        """The part of an image (..., height, width, 3) that the model sees: a view.

        size:  (height, width) of the image before it was resized
        place: position along the longer side, from 0 (its beginning) to 1 (its end)
        """
        if not self.grids or not self.crop:
            return pixels
        height, width = pixels.shape[-3:-1]
        rows, columns = self.grid(size)
        aspect = (rows * self.patch_size[0]) / (columns * self.patch_size[1])
        h = min(height, max(1, round(width * aspect)))
        w = min(width, max(1, round(height / aspect)))
        top, left = int((height - h) * place), int((width - w) * place)
        return pixels[..., top : top + h, left : left + w, :]

    views, run_length = 1, None  # as of ClipRule

    @property
    def least(self) -> Grid:
        """A grid of the fewest patches that an image can have, a guess without `grids`."""
        return min(self.grids, key=cells) if self.grids else (1, self.max_tokens)

    def check(self, size: tuple[int, int], grid: Grid) -> None:
        """Raise ImageError if the image must keep its size, and its patches would not be whole numbers of pixels, or
        would be larger than a kernel can be resized to."""
        if not self.resize and max(size[0] / grid[0], size[1] / grid[1]) > LARGEST_PATCH:
            raise ImageError(
                f"its patches would have a side of more than {LARGEST_PATCH} pixels, as --method patch cuts"
            )
        if not self.resize and (size[0] % grid[0] or size[1] % grid[1]):
            raise ImageError(
                f"its {size[1]} x {size[0]} pixels are no whole multiple of the grid {grid[0]}x{grid[1]}, as --method "
                "patch needs"
            )


@dataclass
class Totals:
    """Totals of a run.

    images:   answered or not; videos where the model reads clips
    kind:     "image" or "video"
    errors:   (path, reason) of each image without an answer
    full:     tokens that the images would have had at full length
    seconds:  from the request for the first image to the last record written
    decoded:  images per second of decoding while the model was idle; None if it was never idle
    answered: images per second from decoded image to record while decoding was paused, measured in a few batches; None
              if there was no such batch
    """

    images: int = 0
    kind: str = "image"
    errors: list[tuple[str, str]] = field(default_factory=list)
    tokens: int = 0
    full: int = 0
    seconds: float = 0.0
    decoded: float | None = None
    answered: float | None = None


class Results(NamedTuple):
    """Results of a batch, on the device.

    values: (images, classes) probabilities or (images, features), float32
    row:    (images,) menu row of the length that answered, if a policy chose it
    tokens: (images,) of all passes, if a policy chose the length; the patches kept, for run-length tokens
    """

    values: torch.Tensor
    row: torch.Tensor | None = None
    tokens: torch.Tensor | None = None


def answer(
    model, batch: list[Loaded], device: torch.device, features: bool, run_length: float | None = None
) -> Results:
    """The model's results for decoded images.

    model:      a VarLenViT, its engine, or an AdaptiveViT
    batch:      images without errors
    features:   features instead of the probabilities of classes
    run_length: as of ClipRule
    """
    images = [loaded.pixels.to(device, non_blocking=True) for loaded in batch]
    views = [len(pixels) if pixels.ndim == 5 else 1 for pixels in images]
    if max(views) > 1:
        images = [view for pixels in images for view in (pixels.unbind() if pixels.ndim == 5 else (pixels,))]
    grids = [loaded.grid for loaded, n in zip(batch, views) for _ in range(n)]
    found = _answered(model, images, grids, features, run_length)
    return found if max(views) == 1 else _averaged(found, views)


def _answered(
    model, images: list[torch.Tensor], grids: list[Grid], features: bool, run_length: float | None
) -> Results:
    if isinstance(model, AdaptiveViT) and features:
        values, row, tokens = model.features(images, channels_last=True)
        return Results(values.float(), row, tokens)
    if isinstance(model, AdaptiveViT):
        found = model.predict(images, channels_last=True)
        return Results(found.logits.float().softmax(-1), found.choice, found.tokens)
    if run_length is not None:
        with torch.inference_mode():
            packed = _features(model)(images, grids=grids, channels_last=True, run_length=run_length)
            values = model.forward_head(packed, pre_logits=features).float()
        kept = torch.tensor(packed.packing.lengths) - packed.packing.prefix
        return Results(values if features else values.softmax(-1), None, kept)
    with torch.inference_mode():
        if features:
            packed = _features(model)(images, grids=grids, channels_last=True)
            return Results(model.forward_head(packed, pre_logits=True).float())
        return Results(model(images, grids=grids, channels_last=True).float().softmax(-1))


def _features(model) -> Callable:
    return model.features if isinstance(model, Engine) else model.forward_features


def _averaged(found: Results, views: list[int]) -> Results:
    """The mean of each clip's views, the longest of their lengths, and the sum of their tokens."""
    values = torch.stack([part.mean(0) for part in found.values.split(views)])
    if found.tokens is None:
        return Results(values)
    row = None if found.row is None else torch.stack([part.min() for part in found.row.split(views)])
    return Results(values, row, torch.stack([part.sum() for part in found.tokens.split(views)]))


def infer(
    model,
    paths: list[str],
    rule: GridRule,
    writer,
    *,
    features: bool = False,
    batch_tokens: int = 8192,
    workers: int = 4,
    progress=None,
    keep=None,
    measure: bool = True,
) -> Totals:
    """Run the model over image files and write one record for each, in the order given.

    model:        a VarLenViT in eval mode, its engine, or an AdaptiveViT, whose policy gives each image its length:
                  `rule` must then give the longest
    paths:        image files; one that is missing or broken becomes a record with its error
    rule:         which grid each image gets
    writer:       a writer of serving.records
    features:     write features instead of the probabilities of classes
    batch_tokens: most tokens of a batch, prefix tokens included; a larger image runs alone
    workers:      threads that decode
    progress:     called with the number of images whose records were just written
    keep:         called with each decoded image
    measure:      pause decoding for a few batches, to measure the rates of Totals

    Returns the totals. Decoded images take at most loading.AHEAD_BYTES in the queue and BATCH_BYTES in a batch, or one
    image that is larger.
    """
    device = next(model.parameters()).device
    plain = model.model if isinstance(model, AdaptiveViT) else model
    views, full = rule.views, full_length(model) * rule.views
    totals = Totals(kind="image" if plain.per_frame is None else "video", full=len(paths) * full)
    ahead = min(256, max(2 * workers, 2 * batch_tokens // (views * tokens_of(plain, rule.least))))
    start = time.perf_counter()

    def write(batch: list[Loaded], results: Results | None) -> None:
        rows = iter(results.values.cpu().numpy() if results is not None else ())
        chosen = iter(_choices(model, results) if results is not None and results.row is not None else ())
        kept = iter(results.tokens.tolist() if results is not None and rule.run_length is not None else ())
        for loaded in batch:
            if loaded.error is not None:
                totals.errors.append((loaded.path, loaded.error))
                totals.full -= full
                writer.write(Answer(show(loaded.path), error=loaded.error))
                continue
            row = next(rows)
            grid, tokens = next(chosen, (loaded.grid, None))
            left = next(kept, None)
            if not np.isfinite(row).all():
                totals.errors.append((loaded.path, NOT_FINITE))
                totals.full -= full
                writer.write(Answer(show(loaded.path), error=NOT_FINITE))
                continue
            cost = None if tokens is None else tokens / full
            totals.tokens += left or views * cells(grid) if tokens is None else tokens
            kind = {"features": row} if features else {"probabilities": row}
            if plain.per_frame is not None:
                kind |= {"frames": views * grid[0] * plain.tubelet, "tubelet": plain.tubelet, "kept": left}
            writer.write(Answer(show(loaded.path), loaded.size, grid[-2:], cost=cost, **kind))
        totals.images += len(batch)
        totals.seconds = time.perf_counter() - start
        if progress is not None:
            progress(len(batch))

    def run(batch: list[Loaded]) -> Results | None:
        good = [loaded for loaded in batch if loaded.error is None]
        results = answer(model, good, device, features, rule.run_length) if good else None
        for loaded in good:
            if keep is not None:
                keep(loaded)
            loaded.pixels = None
        return results

    def run_to_the_end(batch: list[Loaded]) -> float:
        """Answers the batch and writes its records; returns the seconds."""
        begun = time.perf_counter()
        write(batch, run(batch))
        return time.perf_counter() - begun

    pace = Pace()
    alone: list[tuple[int, float]] = []  # images and seconds of batches that ran while no image was decoded
    images = load_all(paths, rule, workers, ahead, pace)
    try:
        before = None  # the batch whose records are written while a GPU computes the next one
        batches = token_batches(
            images,
            batch_tokens,
            lambda loaded: 1 if loaded.error else views * tokens_of(plain, loaded.grid),
            max_bytes=BATCH_BYTES,
            bytes_of=lambda loaded: loaded.bytes,
        )
        for number, batch in enumerate(batches):
            if not measure or (number and not measured(number)):
                results = run(batch)
                if before is not None:
                    write(*before)
                before = (batch, results)
                continue
            if before is not None:
                write(*before)
                before = None
            with pace.pause() if number else nullcontext():
                alone.append((len(batch), run_to_the_end(batch)))
        if before is not None:
            write(*before)
    finally:
        images.close()
    totals.decoded = pace.images_per_second
    if measure and len(totals.errors) < totals.images:
        # The first batch warms up; where there is no other, all images were decoded before it.
        count, seconds = map(sum, zip(*(alone[1:] or alone)))
        totals.answered = count / max(seconds, 1e-9)
    return totals


def measured(number: int) -> bool:
    """Whether decoding is paused for this batch, to measure the model's own rate.

    It is for batches 1, 4, 16, 64, ...: so few that the cost is negligible.
    """
    return number.bit_count() == 1 and number.bit_length() % 2 == 1


def _choices(model: AdaptiveViT, results: Results) -> list[tuple[Grid, int]]:
    """For each image the grid that answered (zeros for the assigner itself) and the tokens of all passes."""
    menu = (*model.menu, (0,) * len(model.menu[0]))  # row -1 is the assigner's
    return [(menu[row], tokens) for row, tokens in zip(results.row.tolist(), results.tokens.tolist())]


def full_length(model) -> int:
    """The patches of an image at the model's full length; for an AdaptiveViT, whose tokens count them, with prefix."""
    plain = model.model if isinstance(model, AdaptiveViT) else model
    longest = tuple(plain.patch_embed.grid_size)
    if plain.per_frame is not None:
        longest = (plain.num_frames, *longest)
    return tokens_of(plain, longest) if isinstance(model, AdaptiveViT) else cells(longest)


def counted(totals: Totals) -> str:
    """The number of images or videos of a run, in words."""
    return f"{totals.images:,} {totals.kind}{'' if totals.images == 1 else 's'}"


def closing_line(totals: Totals, others: str | None = None) -> str:
    """The run's totals in one line, and its bottleneck in another. others: a clause on files left out"""
    seconds = max(totals.seconds, 1e-9)
    rate = totals.images / seconds
    line = f"{counted(totals)} in {clock(totals.seconds)}: {rate:,.{0 if rate >= 100 else 1}f} {totals.kind}s/s"
    if totals.full:
        line += f", with {totals.tokens / totals.full:.0%} of the tokens of full length"
    first = ". ".join(part for part in (line, others) if part)
    return "\n".join(part for part in (f"{first}.", bottleneck(totals)) if part)


def clock(seconds: float) -> str:
    """The seconds as "0.4 s", "48 s", "3 min 20 s" or "2 h 05 min"."""
    if seconds < 100:
        return f"{seconds:.{1 if seconds < 10 else 0}f} s"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds:02d} s" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def bottleneck(totals: Totals) -> str | None:
    """Whether decoding or the model was slower, each measured while the other was paused; None if either was not
    measured."""
    if totals.decoded is None or totals.answered is None:
        return None
    decoded, answered = (f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}" for rate in (totals.decoded, totals.answered))
    unit = f"{totals.kind}s/s"
    if totals.decoded < totals.answered:
        return f"Decoding was the bottleneck: {decoded} {unit} could be decoded, the model could take {answered}."
    return f"The model was the bottleneck: it could take {answered} {unit}, {decoded} could be decoded."
