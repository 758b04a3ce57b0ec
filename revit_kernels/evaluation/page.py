"""A report as one self-contained HTML page: what to do comes first, plots are SVG."""

from __future__ import annotations

import base64
import re
from html import escape
from pathlib import Path

STYLE = """
:root{color-scheme:light dark;--ink:#1d2330;--dim:#5b6474;--paper:#fff;--line:#dde1e8;--head:#f3f5f8;--do:#e8f3ee}
@media(prefers-color-scheme:dark){:root{--ink:#e8eaef;--dim:#a0a8b6;--paper:#14171c;--line:#333a45;--head:#1d2128;
--do:#14302a}}
body{margin:0 auto;padding:28px;max-width:1180px;background:var(--paper);color:var(--ink);
font:15px/1.5 system-ui,sans-serif}
.do{margin:0 0 20px;padding:16px 20px;background:var(--do);border-radius:8px;font-size:18px}
h1{font-size:22px;margin:26px 0 6px}h2{font-size:19px;margin:34px 0 8px;border-bottom:1px solid var(--line)}
p,li{max-width:100ch}.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:13.5px;white-space:nowrap}
td,th{padding:4px 8px;border-bottom:1px solid var(--line)}th{background:var(--head);font-weight:600;text-align:left;
white-space:normal;vertical-align:bottom}
.number{text-align:right;font-variant-numeric:tabular-nums}code{font-size:13px}
figure{margin:18px 0}figure img{max-width:100%;background:#fff;border-radius:6px}figcaption{color:var(--dim)}
"""
IMAGE = re.compile(r"^!\[(?P<said>[^\]]*)\]\((?P<file>[^)]+)\)$")
KINDS = {".svg": "image/svg+xml", ".png": "image/png"}


def inline(text: str) -> str:
    """One line of Markdown: bold, emphasis and code."""
    text = escape(text, quote=False)
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", text)
    text = re.sub(r"\*\*([^*]+)\*\*", r"<b>\1</b>", text)
    return re.sub(r"(?<!\w)\*([^*]+)\*(?!\w)", r"<i>\1</i>", text)


def _cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip().strip("|").split("|")]


def _table(lines: list[str]) -> str:
    kinds = [' class="number"' if mark.endswith(":") else "" for mark in _cells(lines[1])]
    rows = []
    for tag, line in [("th", lines[0]), *(("td", line) for line in lines[2:])]:
        cells = (f"<{tag}{kind}>{inline(cell)}</{tag}>" for kind, cell in zip(kinds, _cells(line)))
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return f'<div class="scroll"><table>{"".join(rows)}</table></div>'


def body(markdown: str, folder: Path) -> str:
    """HTML of the Markdown that report.py writes; pictures are taken from the folder into the page, as SVG if there is
    one of the same name."""
    parts = []
    for block in markdown.strip().split("\n\n"):
        lines = block.splitlines()
        if image := IMAGE.match(block):
            file = folder / image["file"]
            file = file.with_suffix(".svg") if file.with_suffix(".svg").exists() else file
            data = base64.b64encode(file.read_bytes()).decode()
            source = f"data:{KINDS[file.suffix]};base64,{data}"
            said = escape(image["said"])
            parts.append(f'<figure><img alt="{said}" src="{source}"><figcaption>{said}</figcaption></figure>')
        elif lines[0].startswith("#"):
            level = len(lines[0]) - len(lines[0].lstrip("#"))
            parts.append(f"<h{level}>{inline(lines[0][level:].strip())}</h{level}>")
        elif lines[0].startswith("|"):
            parts.append(_table(lines))
        elif lines[0].startswith("- "):
            parts.append("<ul>" + "".join(f"<li>{inline(line[2:])}</li>" for line in lines) + "</ul>")
        elif not re.fullmatch(r"\*[^*]+\*", block):  # a picture's caption, which it has already
            parts.append(f"<p>{inline(' '.join(lines))}</p>")
    return "\n".join(parts)


def page(title: str, todo: str, markdown: str, folder: Path) -> str:
    """The whole page. todo: the sentence that says what to do; folder: where the pictures lie"""
    meta = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head = f"{meta}<title>{escape(title)}</title><style>{STYLE}</style>"
    return f'<!doctype html><html lang="en">{head}<p class="do">{inline(todo)}</p>\n{body(markdown, folder)}</html>\n'
