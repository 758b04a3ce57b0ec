"""A hook of MkDocs: pages that lie outside docs/ are part of the site, README.md as its front page."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
OUTSIDE = (
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "LICENSE",
    "examples/*",
    "recipes/*",
    "recipes/reports/*.md",
    "recipes/reports/*/*",
    "benchmarks/results/*.md",
    "benchmarks/results/scale/*",
)
LINK = re.compile(r'(\]\(|src(?:set)?=")([^)"#\s]+)')


def on_files(files: Files, config) -> Files:
    """Add README.md as index.md, and what OUTSIDE names at its place in the repository."""
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            if path.is_file():
                uri = str(path.relative_to(ROOT))
                files.append(File.generated(config, uri, abs_src_path=str(path)))
    files.append(File.generated(config, "index.md", content=(ROOT / "README.md").read_text()))
    return files


def on_page_markdown(markdown: str, page, **_) -> str:
    """Links as they are in the repository, turned into links of the site, where docs/ is the root."""
    uri = page.file.src_uri
    folder = ROOT if uri == "index.md" or (ROOT / uri).exists() else ROOT / "docs"
    place = folder if uri == "index.md" else (folder / uri).parent
    here = Path(uri).parent

    def moved(found: re.Match) -> str:
        target = found[2]
        if "://" in target or target.startswith("mailto:"):
            return found[0]
        path = (place / target).resolve()
        path = ROOT / "docs" / "index.md" if path == ROOT / "README.md" else path
        inside = path.relative_to(ROOT / "docs") if path.is_relative_to(ROOT / "docs") else path.relative_to(ROOT)
        up = "../" * len(here.parts)
        return f"{found[1]}{up}{inside.as_posix()}"

    return LINK.sub(moved, markdown)
