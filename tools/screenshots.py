"""Takes pictures of what a user sees, to be looked at, and those that README.md and docs/ show; needs Chromium.

python tools/screenshots.py SAMPLES FOLDER          the README, pages of the site, a gallery, reports, the terminal
python tools/screenshots.py SAMPLES FOLDER --keep   also docs/images/gallery.png, report.png, and README.md's table

SAMPLES is the folder of `revit samples`. The package must be importable, and mkdocs installed.
"""

from __future__ import annotations

import argparse
import fcntl
import html
import json
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import markdown
from PIL import Image

from revit_kernels.evaluation.page import page as report_of

ROOT = Path(__file__).parents[1]
REVIT = [sys.executable, "-m", "revit_kernels.cli"]
PAGES = ("index", "guide", "revit", "video", "scale", "models", "performance", "questions", "api")  # of the site
LIKE_GITHUB = """
body{max-width:830px;margin:24px auto;font:16px/1.5 "Segoe UI",Helvetica,Arial,sans-serif;color:#1f2328;background:#fff}
a{color:#0969da}code{font:85% monospace;background:#eff1f3;padding:2px 5px;border-radius:6px}
pre{background:#f6f8fa;padding:16px;border-radius:6px;overflow:auto}pre code{background:none;padding:0}
table{border-collapse:collapse}td,th{border:1px solid #d1d9e0;padding:6px 13px}
h1,h2{border-bottom:1px solid #d1d9e0;padding-bottom:.3em}img{max-width:100%}
@media(prefers-color-scheme:dark){body{background:#0d1117;color:#f0f6fc}pre{background:#151b23}code{background:#2a313c}
td,th,h1,h2{border-color:#3d444d}a{color:#4493f8}}
"""
TERMINAL = "body{margin:0;background:#0d1117;color:#e6edf3}pre{font:15px/1.35 monospace;margin:16px}"


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format, *args):
        pass


def take(url: str | Path, to: Path, size: tuple[int, int], dark: bool = False) -> None:
    """A picture of the page, `size` pixels of it."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome") or "chromium"
    url = url.resolve().as_uri() if isinstance(url, Path) else url
    command = [chromium, "--headless", "--no-sandbox", "--hide-scrollbars", "--force-device-scale-factor=1"]
    command += [f"--blink-settings=preferredColorScheme={0 if dark else 1}", f"--screenshot={to}"]
    command += [f"--window-size={size[0]},{size[1]}", "--virtual-time-budget=4000", url]
    subprocess.run(command, check=True, capture_output=True)


def small(path: Path, to: Path) -> None:
    """The picture with few colours: a tenth of the bytes."""
    Image.open(path).convert("RGB").quantize(128).save(to, optimize=True)


def page(name: str, style: str, body: str, folder: Path) -> Path:
    path = folder / f"{name}.html"
    path.write_text(f'<!doctype html><meta charset="utf-8"><base href="{ROOT.as_uri()}/"><style>{style}</style>{body}')
    return path


def on_a_terminal(arguments: list[str], columns: int, folder: Path) -> str:
    """What the command writes to a terminal of so many columns."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    env = {name: value for name, value in os.environ.items() if name != "COLUMNS"} | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([*REVIT, *arguments], stdout=slave, stderr=slave, stdin=slave, cwd=folder, env=env)
    os.close(slave)
    said = b""
    while True:
        try:
            part = os.read(master, 1 << 16)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        said += part
    os.close(master)
    if process.wait():
        raise RuntimeError(said.decode())
    lines = said.decode().replace("\r\n", "\n").split("\n")
    return "\n".join(line.rpartition("\r")[2] for line in lines)  # a bar that was drawn there is gone


def shortened(said: str) -> str:
    """The table's head, its first row for each grid, longest last, and the first closing line."""
    table, _, closing = said.strip().partition("\n\n")
    head = table.splitlines()[:2]
    first: dict[str, str] = {}
    for row in table.splitlines()[2:]:
        grid = re.search(r" (\d+x\d+) ", row)
        if grid:
            first.setdefault(grid[1], row)
    return "\n".join([*head, *(first[grid] for grid in sorted(first)), "...", closing.splitlines()[0]])


def write_table(said: str) -> None:
    """Put the shortened table between README.md's marks."""
    path, mark = ROOT / "README.md", "<!-- terminal:{} -->\n"
    before, start, rest = path.read_text().partition(mark.format("start"))
    _, end, after = rest.partition(mark.format("end"))
    if not (start and end):
        raise ValueError(f"README.md needs the lines {mark.format('start')}and {mark.format('end')}")
    path.write_text(f"{before}{start}```text\n{shortened(said)}\n```\n{end}{after}")


def report_page(folder: Path) -> Path:
    """The page of the committed report of the shipped model."""
    kept = ROOT / "recipes" / "reports" / "fashion_mnist"
    todo = json.loads((kept / "report.json").read_text())["verdict"][0]
    text = (kept / "report.md").read_text().replace(f"- {todo}\n", "", 1)
    path = folder / "report.html"
    path.write_text(report_of("Token lengths on fashion-mnist/test", todo, text, kept))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("samples", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--keep", action="store_true")
    arguments = parser.parse_args()
    folder, samples = arguments.folder.resolve(), arguments.samples.resolve()
    folder.mkdir(parents=True, exist_ok=True)

    said = {columns: on_a_terminal(["infer", "samples/fashion"], columns, samples.parent) for columns in (80, 120)}
    for columns, text in said.items():
        lines = text.splitlines()
        shown = "\n".join(lines[:20] + ["..."] + lines[-4:])
        pre = page(f"terminal_{columns}", TERMINAL, f"<pre>{html.escape(shown)}</pre>", folder)
        take(pre, folder / f"terminal_{columns}.png", (columns * 9 + 48, 560))
    if arguments.keep:
        write_table(said[80])

    readme = markdown.markdown((ROOT / "README.md").read_text(), extensions=["tables", "fenced_code", "md_in_html"])
    readme = page("readme", LIKE_GITHUB, readme, folder)
    site = folder / "site"
    subprocess.run([sys.executable, "-m", "mkdocs", "build", "-q", "-d", str(site)], cwd=ROOT, check=True)
    # The search of a page that is opened as a file does not show.
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site)))
    Thread(target=server.serve_forever, daemon=True).start()
    report = report_page(folder)
    gallery = folder / "gallery.html"
    photos = ["infer", str(samples / "fashion"), "--gallery", str(gallery), "-o", str(folder / "fashion.csv"), "-q"]
    subprocess.run([*REVIT, *photos], check=True, cwd=ROOT)
    for dark in (False, True):
        theme = "dark" if dark else "light"
        take(readme, folder / f"readme_{theme}.png", (1012, 3900), dark)
        take(report, folder / f"report_{theme}.png", (1000, 1500), dark)
        take(gallery, folder / f"gallery_{theme}.png", (1000, 900), dark)
        for name in PAGES:
            take(
                f"http://127.0.0.1:{server.server_port}/{name}.html",
                folder / f"site_{name}_{theme}.png",
                (1280, 1600),
                dark,
            )
    if arguments.keep:
        for name, size in (("gallery", (980, 620)), ("report", (900, 620))):
            take(folder / f"{name}.html", folder / f"{name}.png", size)
            small(folder / f"{name}.png", ROOT / "docs" / "images" / f"{name}.png")


if __name__ == "__main__":
    main()
