"""The command line around the work: streams that are closed, names that command, files that would be overwritten."""

import csv
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_images import noise

from revit_kernels import cli
from revit_kernels.serving.infer import NOT_FINITE
from revit_kernels.serving.records import _cell


@pytest.fixture
def photos(tmp_path):
    (tmp_path / "photos").mkdir()
    for name, size in {"a.jpg": (64, 48), "b.png": (100, 100)}.items():
        noise(size).save(tmp_path / "photos" / name)
    return tmp_path / "photos"


def revit(*arguments):
    return cli.main(["infer", "--model", "stand_in", *map(str, arguments)])


def run(closed, *arguments):
    """The command in a shell that closes a stream of it."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    line = f'"$0" "$@" {closed}'
    shell = ["sh", "-c", line, sys.executable, "-m", "stand_in", "infer", "--model", "m", *map(str, arguments)]
    return subprocess.run(shell, capture_output=True, text=True, env=env)


def test_standard_output_is_closed(photos, tmp_path):
    done = run(">&-", photos)
    assert done.returncode == 2 and done.stderr == "revit: error: standard output is closed: give --output FILE\n"
    done = run(">&-", photos, "-q", "-o", tmp_path / "out.csv")
    assert done.returncode == 0 and done.stderr == "" and (tmp_path / "out.csv").read_text().count("\n") == 3


@pytest.mark.parametrize("closed", ["2>&-", "2>/dev/full"])
def test_standard_error_is_closed(photos, closed):
    done = run(closed, photos, photos / "gone.jpg")
    assert done.returncode == 1 and [json.loads(line).get("error") for line in done.stdout.splitlines()] == [
        None,
        None,
        "there is no such file",
    ]
    assert run(closed, photos, "--grids", "7x7", "--max-tokens", "9").returncode == 2


def test_an_interrupt_while_the_work_is_imported(monkeypatch, capsys):
    monkeypatch.setattr(cli, "import_module", lambda name: (_ for _ in ()).throw(KeyboardInterrupt()))
    assert cli.main(["infer", "x"]) == 130
    assert capsys.readouterr().err == "revit: interrupted\n"


def test_an_output_that_is_an_input_is_refused(model, photos, tmp_path, capsys):
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")
    data = (photos / "b.png").read_bytes()
    pyarrow.parquet.write_table(pyarrow.table({"image": [data, data]}), tmp_path / "x.parquet")
    (photos / "image.csv").write_bytes(data)
    (tmp_path / "list.csv").write_text(f"{photos}/a.jpg\n")
    (tmp_path / "link.parquet").symlink_to(tmp_path / "x.parquet")
    for path, output in (
        (tmp_path / "x.parquet", tmp_path / "x.parquet"),
        (tmp_path / "x.parquet", tmp_path / "link.parquet"),
        (photos / "image.csv", photos / "image.csv"),
        (f"@{tmp_path}/list.csv", tmp_path / "list.csv"),
    ):
        before = output.read_bytes()
        assert revit(path, "-o", output) == 2
        assert "is an input: it would be overwritten" in capsys.readouterr().err and output.read_bytes() == before
    assert revit(tmp_path / "x.parquet", "-q", "-o", tmp_path / "y.parquet") == 0
    assert revit(tmp_path / "x.parquet", "-q", "-o", tmp_path / "y.parquet") == 0  # an output of before


@pytest.mark.parametrize(
    "name, command",
    [
        ("x.html", "infer {photos} --model stand_in --labels {file} --gallery {file}"),
        ("x.csv", "infer {photos} --model stand_in --labels {file} --output {file}"),
        ("x.parquet", "infer {photos} --model stand_in --outcomes {file} --output {file}"),
        ("x.parquet", "label m.safetensors --data {file} --output {file}"),
        ("x.safetensors", "train-assigner {file} --labels y.parquet --data mnist --output {file}"),
    ],
)
@pytest.mark.parametrize("link", [None, os.symlink, os.link])
def test_no_file_that_is_read_is_overwritten(model, photos, tmp_path, capsys, name, command, link):
    """Whichever argument names it, and by whatever name."""
    file, other = tmp_path / name, tmp_path / f"other{Path(name).suffix}"
    file.write_text("a\nb\nc\n")
    if link:
        link(file, other)
    command = command.replace("{file}", str(file), 1).format(photos=photos, file=other if link else file)
    assert cli.main(command.split()) == 2
    assert "is an input: it would be overwritten" in capsys.readouterr().err and file.read_text() == "a\nb\nc\n"


def test_an_output_that_is_a_link_is_written_through(model, photos, tmp_path):
    (tmp_path / "link.csv").symlink_to(tmp_path / "real.csv")
    assert revit(photos, "-q", "-o", tmp_path / "link.csv") == 0
    assert (tmp_path / "link.csv").is_symlink() and (tmp_path / "real.csv").read_text().count("\n") == 3


def test_names_do_not_command_the_terminal(model, photos, capsys):
    name = "\x1b]0;owned\x07\x9b2J\u2028.jpg"
    (photos / name).write_bytes(b"")
    assert revit(photos) == 1
    captured = capsys.readouterr()
    assert "\x1b" not in captured.out + captured.err and "\x9b" not in captured.out + captured.err
    assert r"\x1b]0;owned\x07\x9b2J\u2028.jpg: the file is empty" in captured.err
    assert Path(json.loads(captured.out.splitlines()[0])["path"]).name == name
    with pytest.raises(SystemExit, match="2"):
        revit(photos, "--grids", "\x1b[2J")
    assert "\x1b" not in capsys.readouterr().err
    assert revit(photos, "--labels", "\x1b[31m.txt") == 2 and "\x1b" not in capsys.readouterr().err


def test_a_spreadsheet_finds_no_formulas(model, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(photos)
    for name in ("=cmd|'!A1'.png", "+1.png", "@x.png", "-y.png"):
        noise((16, 16)).save(name)
    (tmp_path / "names.txt").write_text("=HYPERLINK(1)\n-1\n+sum\n")
    images = ["=cmd|'!A1'.png", "+1.png", "b.png"]
    assert revit(*images, "-q", "--labels", tmp_path / "names.txt", "-o", tmp_path / "out.csv") == 0
    with open(tmp_path / "out.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == ["'=cmd|'!A1'.png", "'+1.png", "b.png"]
    assert {row[f"label_{i}"] for row in rows for i in (1, 2, 3)} == {"'=HYPERLINK(1)", "-1", "'+sum"}
    assert _cell("-0.5e3") == "-0.5e3" and _cell("a=b") == "a=b" and _cell("\t=x") == "'\t=x"


def test_an_answer_that_is_not_finite_is_an_error(model, photos, tmp_path, capsys):
    answered = model.forward

    def overflowing(images, **kwargs):
        found = answered(images, **kwargs)
        found[0, 1] = float("nan")
        return found

    model.forward = overflowing
    assert revit(photos) == 1
    captured = capsys.readouterr()
    first, second = map(json.loads, captured.out.splitlines())
    assert first["error"] == NOT_FINITE and "classes" not in first and len(second["classes"]) == 3
    assert "a.jpg: the model's answer is not finite" in captured.err
    assert "1 of 2 images could not be answered" in captured.err
    assert revit(photos, "-q", "-o", tmp_path / "out.npz") == 1
    assert np.load(tmp_path / "out.npz")["errors"].tolist() == [NOT_FINITE, ""]


def test_what_is_no_image_is_counted_in_the_closing_line(model, photos, capsys):
    for name in ("x.txt", "y.txt", "z.pdf", "w.tar"):
        (photos / name).touch()
    assert revit(photos) == 0
    line = capsys.readouterr().err.splitlines()[0]
    assert "4 files were not taken as images (2 .txt, 1 .tar to be named outright, 1 .pdf)" in line
    assert revit(photos, "-q") == 0 and capsys.readouterr().err == ""
    (photos / "empty").mkdir()
    (photos / "empty" / "a.doc").touch()
    assert revit(photos / "empty") == 2
    assert "there are no images in" in (err := capsys.readouterr().err) and "(1 .doc)" in err


def test_an_archive_is_answered_as_its_images_are(model, photos, tmp_path, capsys):
    with tarfile.open(tmp_path / "shard-0.tar", "w") as archive:
        archive.add(photos / "a.jpg", "a.jpg")
        archive.add(photos / "b.png", "b.png")
        archive.add(__file__, "b.py")
    assert revit(photos) == 0
    alone = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert revit(tmp_path / "shard-0.tar", "-q") == 0
    inside = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record.pop("path") for record in inside] == [f"{tmp_path}/shard-0.tar/{n}" for n in ("a.jpg", "b.png")]
    assert inside == [{k: v for k, v in record.items() if k != "path"} for record in alone]
    (tmp_path / "broken.tar").write_bytes(b"nothing")
    assert revit(tmp_path / "broken.tar") == 2 and "broken.tar cannot be read" in capsys.readouterr().err


def test_patches_too_large_to_resize_a_kernel_to(model, tmp_path, capsys):
    Image.new("L", (1025, 1025)).save(tmp_path / "wide.png")
    assert revit(tmp_path / "wide.png", "--grids", "1x1", "--method", "patch") == 1
    assert "a side of more than 1024 pixels" in capsys.readouterr().out


def test_warnings_are_one_line(monkeypatch, capsys):
    class Warns:
        add = staticmethod(lambda commands: commands.add_parser("infer"))

        @staticmethod
        def run(args):
            warnings.warn("of a\x1b name\nin two lines")
            return 0

    monkeypatch.setattr(cli, "import_module", lambda name: Warns)
    monkeypatch.setattr(cli, "COMMANDS", ("infer",))
    before = warnings.formatwarning
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", lambda *of: sys.stderr.write(warnings.formatwarning(*of[:4])))
        assert cli.main(["infer"]) == 0
    assert capsys.readouterr().err == "revit: warning: of a\\x1b name in two lines\n"
    assert warnings.formatwarning is before


def test_the_folder_of_a_run_is_its_model(photos, tmp_path, capsys):
    from revit_kernels.models.checkpoints import save_checkpoint
    from revit_kernels.models.registry import create_model

    torch.manual_seed(0)
    small = create_model("vit_tiny_patch16_224", depth=1, embed_dim=32, num_heads=2, num_classes=3, img_size=32)
    (tmp_path / "run").mkdir()
    save_checkpoint(small, tmp_path / "run" / "model.safetensors")
    for name in (tmp_path / "run", tmp_path / "run" / "model.safetensors"):
        assert cli.main(["infer", str(photos), "--model", str(name), "-q", "-o", str(tmp_path / "x.csv")]) == 0
    assert cli.main(["infer", str(photos), "--model", str(photos), "-q"]) == 2
    assert "there is no model named" in capsys.readouterr().err


STARTED = "import sys; from revit_command import main; print('started', flush=True); sys.exit(main())"


@pytest.mark.parametrize("seconds", [0.0, 0.2, 0.6, 1.2, 2.5])
def test_an_interrupt_at_any_moment_of_the_start(seconds):
    """While PyTorch is imported, while the parser is built, and at the end: what is asserted holds at any of them."""
    handled = "import revit_command, signal; signal.signal(signal.SIGINT, revit_command._interrupted)"  # as main begins
    command = [sys.executable, "-c", f"{handled}; {STARTED}", "costs", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "started\n"
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    interrupted = (process.returncode, errors) == (130, "revit: interrupted\n")
    assert interrupted or (process.returncode, errors) == (0, ""), (process.returncode, errors)


def test_an_interrupt_after_the_command():
    """Before Python's exit functions it is told of, after them it is ignored; --help ends by SystemExit."""
    before = "from revit_command import main\ntry: main()\nfinally: os.kill(os.getpid(), 2)"
    after = f"import atexit; atexit.register(os.kill, os.getpid(), 2); {STARTED}"  # registered first, called last
    caught = "import os, signal; signal.signal(2, signal.default_int_handler)"  # tests may run in the background
    for code, expected in ((before, (130, "revit: interrupted\n")), (after, (0, ""))):
        command = [sys.executable, "-c", f"{caught}; {code}", "costs", "--help"]
        found = subprocess.run(command, capture_output=True, text=True)
        assert (found.returncode, found.stderr) == expected


def test_a_job_in_the_background_is_not_interrupted():
    code = f"import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); {STARTED}"
    with subprocess.Popen([sys.executable, "-c", code, "--version"], stdout=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert "revit_kernels" in process.communicate(timeout=120)[0] and process.returncode == 0
