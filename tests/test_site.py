"""The site of docs/ builds without a warning, and its navigation has every page."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    api = (tmp_path / "api.html").read_text()
    assert "AdaptiveViT" in api and "<code>packing</code>" in api  # arguments are lists
    assert 'src="images/mixed_batches_light.svg"' in (tmp_path / "index.html").read_text()
    assert (tmp_path / "recipes" / "reports" / "fashion_mnist" / "report.html").exists()


def test_the_navigation_has_every_page():
    listed = set(re.findall(r"^  - [^:]+: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert {page.name for page in (ROOT / "docs").glob("*.md")} <= listed
