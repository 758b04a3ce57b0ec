"""A picture of the easiest and the hardest test images, and what the model says of each at every length."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from revit_kernels.evaluation.evaluate import Evaluation
from revit_kernels.grids import grid_text
from revit_kernels.models.video import sampled

SIDE, GAP, LINE, ACROSS = 128, 36, 16, 6  # pixels, and images in a row
EACH = 12  # easy images, and hard ones
RIGHT, WRONG = "#0072B2", "#B34700"  # told apart by the colour-blind too; what is wrong is also marked


def easiest(e: Evaluation, count: int) -> np.ndarray:
    """Images that the shortest length gets right, the surest first."""
    o = e.outcomes
    there = np.flatnonzero(o.correct[:, -1])
    return there[np.argsort(-o.confidence[there, -1], kind="stable")][:count]


def hardest(e: Evaluation, count: int) -> np.ndarray:
    """Images that only the longest length gets right, then those that none does; the surest mistakes first."""
    o = e.outcomes
    solved = o.correct.any(1)
    only = np.flatnonzero(o.correct[:, 0] & ~o.correct[:, 1:].any(1)) if len(e.menu) > 1 else np.zeros(0, int)
    never = np.flatnonzero(~solved)
    only, never = (there[np.argsort(-o.confidence[there, -1], kind="stable")] for there in (only, never))
    share = min(len(never), max(count // 2, count - len(only)))
    return np.concatenate([only[: count - share], never[:share]])


def needed(e: Evaluation, count: int) -> list[tuple[str, np.ndarray]]:
    """(what is said of them, images) for each length that some images need, the shortest first; the surest first."""
    o, found = e.outcomes, []
    for row in reversed(range(len(e.menu))):
        there = np.flatnonzero(o.correct.any(1) & (o.label == row))
        there = there[np.argsort(-o.confidence[there, row], kind="stable")]
        found.append((f"Needed {grid_text(e.menu[row])}: {len(there):,} of {len(o):,}", there[:count]))
    never = np.flatnonzero(~o.correct.any(1))
    return [*found, (f"Never right: {len(never):,}", never[np.argsort(-o.confidence[never, 0], kind="stable")][:count])]


def mosaic(clip: np.ndarray) -> Image.Image:
    """Four frames of a clip (frames, height, width, 3), the middles of its quarters, in the order of reading."""
    first, second, third, last = (clip[i] for i in sampled(len(clip), 4))
    return Image.fromarray(np.concatenate([np.concatenate([first, second], 1), np.concatenate([third, last], 1)]))


def _font(size: int):
    try:
        return ImageFont.load_default(size)
    except (ImportError, OSError):  # a Pillow without FreeType has the one small font
        return ImageFont.load_default()


def _fit(text: str, font, width: int) -> str:
    """The text, or as much of it as fits."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text}..."


def draw(e: Evaluation, images, path: Path) -> None:
    """Write the picture: the easiest and the hardest images; of clips, some for each length that they needed.

    images: the ImageSet that was evaluated
    """
    o, grids = e.outcomes, list(map(grid_text, e.menu))
    plain, head = _font(12), _font(15)
    groups = [
        (f"Easiest: right at the shortest length, {grids[-1]}, and surest there", easiest(e, EACH)),
        (f"Hardest: right at the longest length only, {grids[0]}, or never", hardest(e, EACH)),
    ]
    if len(e.menu[0]) == 3:
        groups = needed(e, ACROSS)
    cell = SIDE + LINE * (len(grids) + 1) + 14
    lines = [-(-len(members) // ACROSS) for _, members in groups]
    height = sum(30 + max(1, n) * cell if n else 30 + LINE for n in lines) + LINE + 16
    sheet = Image.new("RGB", (ACROSS * (SIDE + GAP) + 12, height), "white")
    pen, top = ImageDraw.Draw(sheet), 8
    for said, members in groups:
        pen.text((10, top), said, fill="black", font=head)
        top += 26
        if not len(members):
            pen.text((10, top), "none", fill="black", font=plain)
            top += LINE
        for i, member in enumerate(members):
            x, y = 10 + i % ACROSS * (SIDE + GAP), top + i // ACROSS * cell
            pixels = images.pixels(int(member))
            picture = Image.fromarray(pixels) if pixels.ndim == 3 else mosaic(pixels)
            picture = ImageOps.contain(picture, (SIDE, SIDE), Image.BICUBIC)
            sheet.paste(picture, (x, y))
            label = grids[o.label[member]] if o.correct[member].any() and o.label[member] >= 0 else "none"
            truth = _fit(f"{e.classes[o.targets[member]]}, label {label}", plain, SIDE + GAP - 8)
            pen.text((x, y + SIDE + 2), truth, fill="black", font=plain)
            for row, grid in enumerate(grids):
                right = bool(o.correct[member, row])
                said = f"{o.confidence[member, row]:.2f}{'' if right else ' wrong'}"
                text = f"{grid} {said}: {e.classes[o.predicted[member, row]]}"
                place = (x, y + SIDE + 2 + LINE * (row + 1))
                pen.text(place, _fit(text, plain, SIDE + GAP - 8), fill=RIGHT if right else WRONG, font=plain)
        top += -(-len(members) // ACROSS) * cell + 4
    sheet.save(path)
