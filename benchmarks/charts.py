"""The pictures of README.md, for light and dark pages, made of committed results. report.py writes them."""

from __future__ import annotations

import json
import math
from html import escape
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = "docs/images"
THEMES = {
    "light": {"ink": "#1f2328", "dim": "#59636e", "line": "#d1d9e0", "ours": "#0072b2", "theirs": "#9aa4b0"},
    "dark": {"ink": "#e6edf3", "dim": "#9198a1", "line": "#3d444d", "ours": "#56b4e9", "theirs": "#6a7480"},
}
POLICIES = {  # colours of Okabe and Ito on light and on dark, and how a policy is called here
    "fixed": ("#1f2328", "#e6edf3", "one length for all images"),
    "assigner": ("#b87900", "#e69f00", "assigner"),
    "cascade": ("#0072b2", "#56b4e9", "cascade"),
    "assigner+cascade": ("#007a58", "#00b887", "assigner and cascade"),
}
FONT = "font-family=\"-apple-system,'Segoe UI',Helvetica,Arial,sans-serif\""


def text(x: float, y: float, said: str, colour: str, size: int = 13, anchor: str = "start", bold: bool = False) -> str:
    weight = ' font-weight="600"' if bold else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" font-size="{size}" text-anchor="{anchor}"{weight}>'
        f"{escape(said)}</text>"
    )


def line(x1: float, y1: float, x2: float, y2: float, colour: str, dashes: str = "") -> str:
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"{dashed}/>'


def svg(width: int, height: int, title: str, parts: list[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" {FONT}>'
    return "\n".join([head, f"<title>{escape(title)}</title>", *parts, "</svg>", ""])


def bars(title: str, subtitle: str, rows: list[tuple[str, float]], theme: str) -> str:
    """A bar for each (rival, how many times faster ours is), the strongest rival first; 1 is marked."""
    c, left, width, top, step = THEMES[theme], 262, 760, 66, 34
    most = max(max(value for _, value in rows), 1.0)
    scale = (width - left - 74) / most
    height = top + step * len(rows) + 26
    parts = [text(0, 20, title, c["ink"], 17, bold=True), text(0, 42, subtitle, c["dim"])]
    for i, (name, value) in enumerate(rows):
        y = top + step * i
        colour = c["ours"] if value >= 1 else c["theirs"]
        parts.append(text(left - 10, y + 17, name, c["ink"], 14, "end"))
        parts.append(f'<rect x="{left}" y="{y + 2}" width="{value * scale:.1f}" height="22" rx="2" fill="{colour}"/>')
        parts.append(text(left + value * scale + 8, y + 18, f"{value:.2f}x", c["ink"], 14, bold=True))
    bottom = top + step * len(rows)
    parts.append(line(left + scale, top - 4, left + scale, bottom, c["ink"], "3 3"))
    parts.append(text(left + scale, bottom + 17, "as fast", c["dim"], 12, "middle"))
    return svg(width, height, f"{title}: " + ", ".join(f"{value:.2f}x {name}" for name, value in rows), parts)


def mixed_batches(rows: list[tuple[str, float]], device: str, theme: str) -> str:
    """The chart of a batch of mixed lengths against its rivals."""
    title = "Images of mixed sizes: how many times faster than"
    subtitle = f"ViT-S/16, 32 images of 16 to 196 tokens, bfloat16; {device}"
    return bars(title, subtitle, rows, theme)


def accuracy_speed(found: dict, theme: str) -> str:
    """Accuracy against measured speed, of a report of `revit evaluate`: lengths alone, and each policy."""
    c, dark = THEMES[theme], theme == "dark"
    width, height, left, right, top, bottom = 760, 400, 56, 20, 62, 50
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
    parts.append(text(left, top + 16, "accuracy, %", c["dim"], 12))
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
