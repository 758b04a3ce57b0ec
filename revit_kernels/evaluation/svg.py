"""Charts as SVG text, for light and dark pages, without a plotting library."""

from __future__ import annotations

from html import escape

THEMES = {
    "light": {"ink": "#1f2328", "dim": "#59636e", "line": "#d1d9e0", "ours": "#0072b2", "theirs": "#9aa4b0"},
    "dark": {"ink": "#e6edf3", "dim": "#9198a1", "line": "#3d444d", "ours": "#56b4e9", "theirs": "#6a7480"},
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
