"""`revit infer --gallery`: one HTML page that draws each image at the resolution that the model read."""

from __future__ import annotations

import base64
import io
from collections import deque
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from revit_kernels.data.images import show
from revit_kernels.files import write_whole
from revit_kernels.grids import grid_text
from revit_kernels.modules.lengths import cells
from revit_kernels.serving.infer import Totals, closing_line, full_length
from revit_kernels.serving.prepare import Prepared
from revit_kernels.serving.records import Answer, Columns

MOST = 1000  # images that a page shows; its totals are of all
SIDE = 224  # pixels of a picture, at most
BOX = 148  # pixels that it is drawn in

STYLE = """
:root{color-scheme:light dark;--ink:#1d2330;--dim:#5b6474;--paper:#fafafa;--card:#fff;--line:#dde1e8;--bar:#0072b2}
@media(prefers-color-scheme:dark){:root{--ink:#e8eaef;--dim:#a0a8b6;--paper:#14171c;--card:#1d2128;--line:#333a45;
--bar:#56b4e9}}
*{box-sizing:border-box}body{margin:0;padding:28px;background:var(--paper);color:var(--ink);
font:15px/1.45 system-ui,sans-serif}h1{font-size:22px;margin:0 0 6px}p{margin:0 0 14px;color:var(--dim);max-width:90ch}
table{border-collapse:collapse;margin:0 0 22px}td,th{padding:3px 18px 3px 0;text-align:right;font-weight:400}
th{color:var(--dim)}td:first-child,th:first-child{text-align:left}td.bar{width:240px;text-align:left}
td.bar i{display:block;height:12px;background:var(--bar);border-radius:2px;min-width:1px}
main{display:grid;grid-template-columns:repeat(auto-fill,minmax(172px,1fr));gap:14px}
figure{margin:0;padding:10px;background:var(--card);border:1px solid var(--line);border-radius:8px;min-width:0}
.mosaic{position:relative;height:148px;display:flex;align-items:center;justify-content:center}
.mosaic div{position:relative}
.mosaic img{width:100%;height:100%;image-rendering:pixelated;display:block}
.mosaic div::after{content:"";position:absolute;inset:0;
background-image:linear-gradient(to right,var(--card) var(--gap),transparent var(--gap)),
linear-gradient(to bottom,var(--card) var(--gap),transparent var(--gap));
background-size:calc(100%/var(--columns)) calc(100%/var(--rows))}
figcaption{margin-top:8px;font-size:13px}figcaption b{display:block;overflow-wrap:anywhere}
figcaption span{display:block;color:var(--dim);font-size:12px;overflow-wrap:anywhere}
.error{color:#b34700}
"""


def _length(answer: Answer) -> tuple[int, ...]:
    """The grid, of a clip with its frames."""
    return answer.grid if answer.frames is None else (answer.frames, *answer.grid)


class Gallery:
    """Collects answers with their images, and writes the page.

    path:   an .html file
    prefix: prefix tokens of the model
    full:   tokens of a full-length pass, prefix tokens counted
    patch:  (height, width) of a patch in pixels

    Call `keep` with each decoded image, then `write` with its answer. The first MOST images are shown.
    """

    def __init__(self, path: str, columns: Columns, prefix: int, full: int, patch: tuple[int, int]):
        self.path, self.columns, self.prefix, self.full, self.patch = Path(path), columns, prefix, full, patch
        self.waiting: dict[str, deque[np.ndarray]] = {}
        self.cards: list[tuple[int, str]] = []  # tokens paid, HTML
        self.lengths: dict[tuple[int, ...], list[int]] = {}  # by grid: images, tokens paid
        self.errors: list[tuple[str, str]] = []
        self.kept = 0

    def keep(self, loaded) -> None:
        """Hold an image until its answer comes. loaded: a serving.loading.Loaded"""
        if self.kept < MOST:
            self.kept += 1
            pixels = loaded.pixels.numpy()
            pixels = pixels[len(pixels) // 2] if pixels.ndim == 4 else pixels  # of a clip, the frame in the middle
            self.waiting.setdefault(show(loaded.path), deque()).append(pixels)

    def write(self, answer: Answer) -> None:
        """Add an answer, with the image that `keep` holds for it."""
        waiting = self.waiting.get(answer.path)
        pixels = waiting.popleft() if waiting else None
        if waiting is not None and not waiting:
            del self.waiting[answer.path]
        if answer.error is not None:
            self.errors.append((answer.path, answer.error))
            return
        paid = self._once(answer) if answer.cost is None else round(answer.cost * self.full)
        of_length = self.lengths.setdefault(_length(answer), [0, 0])
        of_length[0] += 1
        of_length[1] += paid
        if pixels is not None:
            self.cards.append((paid, self._card(answer, pixels, paid)))

    def _once(self, answer: Answer) -> int:
        """The tokens of one pass, prefix tokens included (of a clip, those of each frame)."""
        return answer.tokens + self.prefix * (1 if answer.frames is None else answer.frames // answer.tubelet)

    def _card(self, answer: Answer, pixels: np.ndarray, paid: int) -> str:
        alone = 0 in answer.grid  # the assigner's own answer: the model did not read the image
        rows, columns = (1, 1) if alone else answer.grid
        passes = 1 if paid <= self._once(answer) else 2
        if answer.features is not None or not self.columns.top:
            said = f"{self.columns.features:,} features"
        else:
            best = self.columns.best(answer)[0]
            name = best.get("label", f"class {best['class']}")
            said = f"{name}, {100 * best['probability']:.0f} %"
        cost = f"{grid_text(_length(answer))}, {paid} tokens, {passes} pass{'es' if passes > 1 else ''}"
        cost = "by the assigner, no pass" if alone else cost
        height, width = pixels.shape[:2] if alone else (rows * self.patch[0], columns * self.patch[1])
        scale = BOX / max(height, width)
        gap = "1.5px" if max(rows, columns) <= 10 else "0.8px"
        size = f"--gap:{gap};width:{max(2, width * scale):.0f}px;height:{max(2, height * scale):.0f}px"
        return (
            f'<figure><div class="mosaic"><div style="--rows:{rows};--columns:{columns};{size}">'
            f'<img alt="" src="{self._picture(pixels, height, width)}"></div></div><figcaption><b>{escape(said)}</b>'
            f'<span>{cost}</span><span title="{escape(answer.path)}">{escape(Path(answer.path).name)}</span>'
            f"</figcaption></figure>"
        )

    @staticmethod
    def _picture(pixels: np.ndarray, height: int, width: int) -> str:
        """The image at the model's resolution, at most SIDE pixels a side, as a data URL."""
        scale = min(1.0, SIDE / max(height, width))
        size = max(1, round(width * scale)), max(1, round(height * scale))
        small = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
        file = io.BytesIO()
        if max(size) <= 64:
            small.save(file, "PNG")
        else:
            small.save(file, "JPEG", quality=80)
        kind = "png" if max(size) <= 64 else "jpeg"
        return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"

    def _lengths(self) -> str:
        """An HTML table with a row for each grid, longest first: its images and their tokens."""
        images = sum(n for n, _ in self.lengths.values())
        ordered = sorted(self.lengths.items(), key=lambda item: -cells(item[0]))
        shown, rest = ordered[:12], ordered[12:]
        rows = [("the assigner" if 0 in length else grid_text(length), n, paid) for length, (n, paid) in shown]
        if rest:
            rows.append((f"{len(rest)} other grids", *map(sum, zip(*(found for _, found in rest)))))
        lines = []
        for name, count, paid in rows:
            bar = f'<td class="bar"><i style="width:{100 * count / images:.1f}%"></i></td>'
            lines.append(f"<tr><td>{name}</td><td>{count:,}</td><td>{paid:,}</td>{bar}</tr>")
        head = "<tr><th>answered at</th><th>images</th><th>tokens paid</th><th></th></tr>"
        return f"<table>{head}{''.join(lines)}</table>" if images else ""

    def page(self, totals: Totals, model: str) -> str:
        """The page as HTML."""
        paid, images = (sum(found[i] for found in self.lengths.values()) for i in (1, 0))
        cards = [card for _, card in sorted(self.cards, key=lambda card: -card[0])]
        full = images * self.full
        head = f"{images:,} image{'' if images == 1 else 's'} paid {paid:,} tokens"
        head += f", {paid / full:.0%} of full length" if full else ""
        shown = "" if len(cards) == images else f" The first {len(cards):,} images are shown."
        text = (
            f"{closing_line(totals)} Each image has the pixels that the model read, cut into its patches; those that "
            f"paid the most tokens come first.{shown} Prefix tokens are counted."
        )
        errors = "".join(f'<p class="error">{escape(path)}: {escape(error)}</p>' for path, error in self.errors[:50])
        more = f'<p class="error">and {len(self.errors) - 50:,} more</p>' if len(self.errors) > 50 else ""
        meta = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        title = f"<title>{escape(model)}: {head}</title>"
        body = f"<h1>{head}</h1><p>{escape(model)}. {escape(text)}</p>{self._lengths()}{errors}{more}"
        body += f"<main>{''.join(cards)}</main>"
        return f'<!doctype html><html lang="en">{meta}{title}<style>{STYLE}</style>{body}</html>\n'

    def save(self, totals: Totals, model: str) -> None:
        """Write the page. Raises RuntimeError if it cannot be written."""
        text = self.page(totals, model)
        write_whole(self.path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def gallery_of(path: str | None, prepared: Prepared) -> Gallery | None:
    """The gallery of a run; None where no path was given."""
    if path is None:
        return None
    model = prepared.model
    full = model.num_prefix_tokens + full_length(model)
    return Gallery(path, prepared.columns, model.num_prefix_tokens, full, model.patch_embed.patch_size)


def check_gallery(path: str | None) -> None:
    """Raise ValueError if the page cannot be written; called before any work is done."""
    if path is None:
        return
    if Path(path).suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--gallery must end in .html, got {path!r}")
    if Path(path).is_dir() or not Path(path).resolve().parent.is_dir():
        raise ValueError(f"--gallery {path} is a folder, or its folder does not exist")
