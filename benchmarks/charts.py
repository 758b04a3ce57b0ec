"""The pictures of README.md, for light and dark pages, made of committed results. report.py writes them."""

from __future__ import annotations

import json
import math
from pathlib import Path

from revit_kernels.evaluation.svg import THEMES, bars, line, svg, text

ROOT = Path(__file__).parents[1]
FOLDER = "docs/images"
POLICIES = {  # colours of Okabe and Ito on light and on dark, and how a policy is called here
    "fixed": ("#1f2328", "#e6edf3", "one length for all images"),
    "assigner": ("#b87900", "#e69f00", "assigner"),
    "cascade": ("#0072b2", "#56b4e9", "cascade"),
    "assigner+cascade": ("#007a58", "#00b887", "assigner and cascade"),
}


def mixed_batches(rows: list[tuple[str, float]], device: str, theme: str) -> str:
    """The chart of a batch of mixed lengths against its rivals."""
    title = "Images of mixed sizes: how many times faster than"
    subtitle = f"ViT-S/16, 32 images of 16 to 196 tokens, bfloat16; {device}"
    return bars(title, subtitle, rows, theme)


def accuracy_speed(found: dict, theme: str) -> str:
    """Accuracy against measured speed, of a report of `revit evaluate`: lengths alone, and each policy."""
    c, dark = THEMES[theme], theme == "dark"
    width, height, left, right, top, bottom = 760, 414, 56, 20, 76, 50
    groups = {"fixed": found["static"]}
    for row in found["policies"]:
        if row["policy"] in POLICIES:
            groups.setdefault(row["policy"], []).append(row)
    shown = [row for rows in groups.values() for row in rows]
    fast = math.ceil(2 * max(row["speed"] for row in shown)) / 2
    low = math.floor(200 * min(row["accuracy"] for row in shown)) / 2
    high = math.ceil(200 * max(row["accuracy"] for row in shown)) / 2

    def x(speed: float) -> float:
        return left + (width - left - right) * (speed - 0.8) / (fast - 0.8)

    def y(accuracy: float) -> float:
        return height - bottom - (height - top - bottom) * (100 * accuracy - low) / (high - low)

    about = found["about"]
    title = "One model, a token length for each image"
    images = f"{found['count']:,} test images of {found['images'].partition('/')[0]}"
    subtitle = f"{images}, {about['device']}, {about['threads']} threads, {about['dtype']}"
    parts = [text(0, 20, title, c["ink"], 17, bold=True), text(0, 42, subtitle, c["dim"])]
    for step in range(round(2 * low), round(2 * high) + 1):
        at = y(step / 200)
        parts += [
            line(left, at, width - right, at, c["line"]),
            text(left - 8, at + 4, f"{step / 2:g}", c["dim"], 12, "end"),
        ]
    for step in range(1, math.floor(fast) + 1):
        parts.append(text(x(step), height - bottom + 20, f"{step}x", c["dim"], 12, "middle"))
    middle = (left + width - right) / 2
    parts.append(text(middle, height - 6, "images a second, times full length (measured)", c["dim"], 12, "middle"))
    parts.append(text(0, top - 13, "accuracy, %", c["dim"], 12))
    for i, (name, rows) in enumerate(groups.items()):
        colour, points = POLICIES[name][dark], sorted((row["speed"], row["accuracy"]) for row in rows)
        path = " ".join(f"{x(speed):.1f},{y(accuracy):.1f}" for speed, accuracy in points)
        dashes = ' stroke-dasharray="5 4"' if name == "fixed" else ""
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8"{dashes}/>')
        parts += [f'<circle cx="{x(s):.1f}" cy="{y(a):.1f}" r="4.5" fill="{colour}"/>' for s, a in points]
        across = width - right - 190
        parts.append(f'<circle cx="{across}" cy="{top + 14 + 22 * i}" r="4.5" fill="{colour}"/>')
        parts.append(text(across + 12, top + 18 + 22 * i, POLICIES[name][2], c["ink"]))
    for row in found["static"]:
        rows, columns = found["menu"][row["numbers"]["row"]]
        parts.append(text(x(row["speed"]) - 7, y(row["accuracy"]) + 17, f"{rows}x{columns}", c["ink"], 12, "end"))
    said = ", ".join(f"{row['policy']} {100 * row['accuracy']:.1f} % at {row['speed']:.2f}x" for row in shown)
    return svg(width, height, f"{title}: {said}", parts)


def pictures(rows: list[tuple[str, float]], device: str) -> dict[str, str]:
    """The text of each file, by its path from the root. rows: of the chart of mixed batches"""
    found = json.loads((ROOT / "recipes" / "reports" / "fashion_mnist" / "report.json").read_text())
    files = {}
    for theme in THEMES:
        files[f"{FOLDER}/mixed_batches_{theme}.svg"] = mixed_batches(rows, device, theme)
        files[f"{FOLDER}/accuracy_speed_{theme}.svg"] = accuracy_speed(found, theme)
    return files
