"""README.md and docs/: Python blocks run, commands parse, links lead somewhere, tables are current.

The Python blocks of a page run in order and share their names, as a reader would run them. What a block needs that the
page should not show stands in a comment directly before it, and runs first:

    <!-- setup: image = torch.zeros(3, 8, 8) -->
"""

import importlib.util
import json
import linecache
import re
import shlex
import xml.etree.ElementTree
from pathlib import Path

import pytest
import torch

from revit_kernels import cli

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OTHERS = [ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "recipes/README.md")]
KNOWN = {"python", "bash", "text"}  # a block of anything else would be skipped silently
BLOCK = re.compile(r"^```(?P<kind>.*)\n(?P<code>(?:.*\n)*?)^```$", re.MULTILINE)
SETUP = re.compile(r"<!-- setup:(?P<code>(?:(?!-->).)*)-->\n\Z", re.DOTALL)


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


every_page = pytest.mark.parametrize("page", PAGES, ids=name)


def blocks(text: str, kind: str):
    """(line, code) of each block of this kind, the setup before it included."""
    for block in BLOCK.finditer(text):
        if block["kind"] != kind:
            continue
        if setup := SETUP.search(text, 0, block.start()):
            yield text.count("\n", 0, setup.start("code")), setup["code"].strip()
        yield text.count("\n", 0, block.start("code")), block["code"]


@every_page
def test_python_blocks_run(page, tmp_path, monkeypatch, capsys):
    text = page.read_text()
    assert len(re.findall("^ *(```|~~~)", text, re.MULTILINE)) == 2 * len(BLOCK.findall(text)), "an odd fence"
    assert {block["kind"] for block in BLOCK.finditer(text)} <= KNOWN
    monkeypatch.chdir(tmp_path)
    linecache.checkcache()
    torch.manual_seed(0)
    names = {"__name__": "__main__"}
    for line, code in blocks(text, "python"):
        exec(compile("\n" * line + code, str(page), "exec"), names)  # a traceback shows the page's own lines


@pytest.mark.parametrize("page", PAGES + OTHERS, ids=name)
def test_commands_parse(page):
    """Only the arguments: the commands need files and time."""
    for line, code in blocks(page.read_text(), "bash"):
        for command in code.replace("\\\n", " ").splitlines():
            words = shlex.split(command, comments=True)
            if words and Path(words[0]).name == "revit":
                cli.parser().parse_args(words[1:])
            elif words and "/" in words[0] and not words[0].startswith(".venv/"):
                assert (ROOT / words[0]).stat().st_mode & 0o100, f"{name(page)}:{line}: {words[0]} cannot be run"


@pytest.mark.parametrize("page", PAGES + OTHERS, ids=name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)|src(?:set)?=\"([^\"]+)\"", page.read_text()):
        target = "".join(target).partition("#")[0]
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_a_setup_runs_before_its_block():
    text = "a\n<!-- setup: x = 1 -->\n```python\ny = x\n```\n\n```python\nz = y\n```\n"
    assert list(blocks(text, "python")) == [(1, "x = 1"), (3, "y = x\n"), (7, "z = y\n")]


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.fixture(scope="module")
def report():
    spec = importlib.util.spec_from_file_location("benchmarks_report", ROOT / "benchmarks" / "report.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", ["README.md", "docs/performance.md", "docs/revit.md"])
def test_tables_are_current(report, page):
    assert (ROOT / page).read_text() == report.written(page), "run: python benchmarks/report.py"


def test_pictures_are_current(report):
    for name, text in report.pictures().items():
        assert (ROOT / name).read_text() == text, "run: python benchmarks/report.py"
        xml.etree.ElementTree.fromstring(text)


def test_the_list_of_models_is_current():
    spec = importlib.util.spec_from_file_location("make_models_page", ROOT / "tools" / "make_models_page.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    text = tool.PAGE.read_text()
    assert text == tool.page(text), "run: python tools/make_models_page.py"


def test_noise_is_not_kept(report, tmp_path):
    rows = [{"name": "bench_a", "extra_info": {"speedup": 2.0}, "stats": {"rounds": 1}}]
    (tmp_path / "run.json").write_text(json.dumps({"benchmarks": rows}))
    with pytest.raises(ValueError, match="bench_a ran 1 rounds, which is noise"):
        report.check(tmp_path / "run.json")


def test_every_table_is_tested(report):
    assert set(report.TABLES) == {"README.md", "docs/performance.md", "docs/revit.md"}


@pytest.mark.parametrize("marker", ["main", "test"])
def test_the_readme_marks_its_commands(marker):
    """What .ci/run extracts: one command, which is a script here."""
    found = re.findall(rf"^<!-- {marker} -->\n```bash\n(.*)\n```$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(found) == 1
    assert (ROOT / found[0]).read_text().splitlines()[:1] == ["#!/usr/bin/env bash"]
    assert "set -euo pipefail" in (ROOT / found[0]).read_text()


@pytest.mark.parametrize("marker", ["main", "test"])
def test_the_script_runs_the_commands_beside_it(marker):
    """The pip lines that the README shows are those that the script runs."""
    text = (ROOT / "README.md").read_text()
    script = (ROOT / {"main": "tools/quickstart", "test": "tools/test"}[marker]).read_text()
    shown = {line for _, code in blocks(text, "bash") for line in code.splitlines()}
    steps = [line for line in script.splitlines() if line.startswith(".venv/bin/")]
    assert len(steps) >= 3
    assert all(step.removesuffix(' "$@"') in shown for step in steps)
