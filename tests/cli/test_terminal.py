"""What a person sees: the table on a terminal, progress, the gallery, and hints about arguments."""

import json
import os
import pty
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from test_images import noise
from tiny_revit import MENU, labelled, trained

from revit_kernels import cli
from revit_kernels.cli import answers, progress
from revit_kernels.cli.gallery import Gallery
from revit_kernels.models.checkpoints import save_checkpoint
from revit_kernels.models.registry import SHIPPED
from revit_kernels.serving.infer import Totals, clock
from revit_kernels.serving.loading import Loaded
from revit_kernels.serving.records import Answer, Columns

LABELS = ["Ankle boot", "Bag", "a name of a class that is far too long for any table"]


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, size in {"a.jpg": (64, 48), "b.png": (100, 100), "c.png": (32, 32)}.items():
        noise(size).save(folder / name)
    (folder / "broken.png").write_bytes(b"broken")
    return folder


def on_a_terminal(arguments, columns=80):
    """What the command with test_infer's stand-in writes to a terminal, both streams."""
    master, slave = pty.openpty()
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": str(columns)}
    command = [sys.executable, "-m", "stand_in", "infer", "--model", "m", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=slave, stderr=slave, env=env)
    os.close(slave)
    found = b""
    while True:
        try:
            part = os.read(master, 1 << 16)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        found += part
    process.wait()
    os.close(master)
    return found.decode().replace("\r\n", "\n")


def test_a_terminal_gets_a_table_and_json_if_asked(photos):
    said = on_a_terminal([photos])
    lines = said.splitlines()
    assert lines[0] == f"in {photos}/" and re.fullmatch(r"file +class +prob\. +grid +of a full pass", lines[1])
    assert re.fullmatch(r"a\.jpg +\d +\d+\.\d % +3x4 +6 %", lines[2]) and lines[3].startswith("b.png")
    assert re.fullmatch(r"broken\.png +no answer: .*", lines[4]) and lines[5].startswith("c.png")
    assert lines[6] == "" and re.match(r"4 images in [\d.]+ s: [\d.,]+ images/s, with 9% of the tokens", lines[7])
    assert len({line.index(" %") for line in (lines[2], lines[3], lines[5])}) == 1
    said = on_a_terminal([photos / "a.jpg", "--json", "-q"])
    assert json.loads(said)["grid"] == [3, 4]


@pytest.mark.parametrize("width", [40, 80, 120])
def test_rows_fit_the_terminal(width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    paths = [f"photos/of/{'a' * n}/{n}.jpg" for n in (3, 30, 300)] + ["photos/of/漢字漢字漢字.jpg"]
    rows = answers.Rows(Columns(classes=3, top=1, labels=LABELS), paths, 196)
    lines = [rows._head()[1]]
    for i, path in enumerate(paths):
        lines.append(rows.row(Answer(path, (9, 9), (14, 14), np.roll(np.array([0.999, 0, 0], np.float32), i % 3))))
    assert rows.folder == "photos/of/" and all("photos/of" not in line for line in lines)
    assert len({answers.cells(line) for line in lines}) == 1 and (width < 80 or answers.cells(lines[0]) <= width)
    assert lines[3].split()[0].endswith("/300.jpg") and "99.9 %" in lines[3] and lines[3].endswith(" 100 %")


def test_cost_is_of_all_passes():
    rows = answers.Rows(Columns(classes=2, top=1, adaptive=True), ["a"], 49)
    answer = Answer("a", (9, 9), (7, 7), np.array([0.25, 0.75], np.float32), cost=1.2)
    assert rows.row(answer).split() == ["a", "1", "75.0", "%", "7x7", "120", "%"]


def test_folders_that_paths_share():
    assert answers.common_folder(["a/b/c", "a/b/d/e"]) == "a/b/" and answers.common_folder(["a/bc", "a/bd"]) == "a/"
    assert answers.common_folder(["ab", "ac"]) == answers.common_folder([]) == ""
    assert answers.common_folder(["a/b", "a/b"]) == ""


# ---------------------------------------------------------------------- progress


def test_progress_off_a_terminal_is_whole_lines(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.Progress(1000, "images") as bar:
        for _ in range(100):
            now[0] += 1.0
            bar.update(5)
    assert capsys.readouterr().err.splitlines() == [
        "revit: 50 of 1,000 images, 5 a second, 3 min 10 s left",
        "revit: 200 of 1,000 images, 5 a second, 2 min 40 s left",
        "revit: 350 of 1,000 images, 5 a second, 2 min 10 s left",
        "revit: 500 of 1,000 images, 5 a second, 1 min 40 s left",
    ]
    with progress.Progress(10, quiet=True) as bar:
        now[0] += 1000
        bar.update(5)
    assert capsys.readouterr().err == ""


def test_a_bar_is_off_the_terminal_while_records_are_written(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress.Progress(100) as bar:
        bar._bar.delay = bar._bar.mininterval = 0
        bar.update(10)
        drawn = capsys.readouterr().err
        assert " 10/100 " in drawn and "\n" not in drawn
        bar.clear()
        assert capsys.readouterr().err.endswith("\r")  # the cursor stands at the start of an empty line
        bar.clear()
        assert capsys.readouterr().err == ""


@pytest.mark.parametrize("seconds, text", [(0.42, "0.4 s"), (48.2, "48 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")])
def test_times_are_read_aloud(seconds, text):
    assert clock(seconds) == text


# ---------------------------------------------------------------------- the gallery


def test_the_gallery(photos, tmp_path, capsys):
    page = tmp_path / "page.html"
    arguments = ["infer", str(photos), "--gallery", str(page), "-o", str(tmp_path / "out.csv")]
    assert cli.main(arguments) == 1
    text = page.read_text()
    assert 'src="data:image/png;base64,' in text and "http" not in text
    assert text.count("<figure>") == 3 and "broken.png" in text and "3 images paid" in text.split("<h1>")[1]
    paid = [int(n) for n in re.findall(r", (\d+) tokens, \d pass", text)]
    assert paid == sorted(paid, reverse=True) and len(paid) == 3
    total = int(re.search(r"images paid ([\d,]+) tokens", text)[1].replace(",", ""))
    assert total == sum(paid)
    assert cli.main(["infer", str(photos), "--gallery", str(tmp_path / "page.png")]) == 2
    assert "--gallery must end in .html" in capsys.readouterr().err


def test_a_gallery_shows_the_pixels_that_were_read(tmp_path, monkeypatch):
    monkeypatch.setattr("revit_kernels.cli.gallery.MOST", 2)
    gallery = Gallery(str(tmp_path / "page.html"), Columns(classes=2, top=1, labels=["<b>", "x"]), 1, 50, (4, 4))
    pixels = torch.zeros(28, 28, 3, dtype=torch.uint8)
    for name in "abc":
        gallery.keep(Loaded(name, pixels, (28, 28), (7, 7)))
        gallery.write(Answer(name, (28, 28), (3, 2), np.array([0.75, 0.25], np.float32), cost=57 / 50))
    text = gallery.page(Totals(images=3, seconds=1.0), "m")
    assert text.count("<figure>") == 2 and "The first 2 images are shown" in text and "&lt;b&gt;, 75 %" in text
    assert "3x2, 57 tokens, 2 passes" in text and "3 images paid 171 tokens, 114% of full length" in text
    assert gallery._picture(pixels.numpy(), 12, 8).startswith("data:image/png") and not gallery.waiting


def test_answers_of_the_assigner_alone_have_no_grid(tmp_path):
    columns = Columns(classes=2, top=1, labels=["bag", "coat"])
    gallery = Gallery(str(tmp_path / "page.html"), columns, 1, 50, (4, 4))
    answer = Answer("a.png", (28, 20), (0, 0), np.array([0.75, 0.25], np.float32), cost=0.0)
    gallery.keep(Loaded("a.png", torch.zeros(28, 20, 3, dtype=torch.uint8), (28, 20), (7, 5)))
    gallery.write(answer)
    text = gallery.page(Totals(images=1, seconds=1.0), "m")
    assert "by the assigner, no pass" in text and "<td>the assigner</td><td>1</td><td>0</td>" in text
    assert "width:106px;height:148px" in text and "0x0" not in text


# ---------------------------------------------------------------------- hints


@pytest.fixture(scope="module")
def revit(tmp_path_factory):
    path = tmp_path_factory.mktemp("revit") / "model.safetensors"
    save_checkpoint(trained(), path)
    labelled()[1].save(path.with_name("labels.parquet"))
    return path


def test_lengths_that_are_seldom_meant(photos, revit, capsys):
    def said(*arguments):
        status = cli.main(["infer", str(photos / "a.jpg"), "--model", str(revit), *map(str, arguments)])
        return status, capsys.readouterr().err

    assert MENU == ((4, 4), (3, 3), (2, 2))
    status, err = said()
    assert status == 0 and "this is a ReViT, but no policy chooses lengths" in err and "--assigner FILE" in err
    status, err = said("--grids", "4x4,3x4")
    assert status == 0 and "warning: the model was not trained at 3x4, but at 4x4, 3x3, 2x2" in err
    assert "warning" not in said("--grids", "4x4,3x3")[1]
    assert "3 patches an image are few" in said("--max-tokens", 3)[1]
    status, err = said("--grids", "100x100")
    assert status == 2 and "--grids asks for 10,000 patches of an image, 625 times the 16" in err
    assert said("--max-tokens", 1000)[0] == 2
    status, err = said("--outcomes", revit.with_name("labels.parquet"), "--policy", "cascade", "--grids", "4x4")
    assert status == 2 and "does not go with --grids" in err


def test_the_shipped_model_says_what_leaves_out_its_policy(photos, capsys):
    assert cli.main(["infer", str(photos / "a.jpg"), "--max-tokens", "40"]) == 0
    assert "with --max-tokens no policy is used" in capsys.readouterr().err
    assert cli.main(["infer", str(photos / "a.jpg")]) == 0 and SHIPPED.exists()
    assert "warning" not in capsys.readouterr().err


def test_features_at_the_lengths_that_a_policy_chooses(photos, revit, tmp_path, capsys):
    for policy in ("cascade", "fixed"):
        output = tmp_path / f"{policy}.npz"
        arguments = ["infer", photos, "--model", revit, "--outcomes", revit.with_name("labels.parquet")]
        arguments += ["--policy", policy, "--features", "--budget", "8tokens", "-q", "-o", output]
        assert cli.main([str(a) for a in arguments]) == 1
        found = np.load(output)
        assert found["features"].shape == (4, 32) and np.isfinite(found["features"][[0, 1, 3]]).all()
        paid, tokens = found["share_of_full_pass"] * 17, found["tokens"] + 1
        assert (paid[[0, 1, 3]] >= tokens[[0, 1, 3]] - 1e-3).all()
