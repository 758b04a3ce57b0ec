"""`kill -9` of infer, train, label and evaluate at any moment, and begun once more.

What has its name is whole, finished work is kept, the answer is that of a run that nobody killed, and nothing temporary
is left. A moment is a share of the run's CPU time, so that a busy machine does not move it: of the whole run, or of its
work, which begins with the first file.
"""

import json
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from contextlib import suppress
from importlib import import_module
from pathlib import Path

import torch
from safetensors.torch import load_file

from revit_kernels import cli, files
from revit_kernels.adaptive.outcomes import Outcomes
from revit_kernels.models.checkpoints import save_checkpoint

MADE = {}
CLASSES = ("flat", "stripes_across", "stripes_down")
PATIENCE = 300.0  # seconds for one run
PAUSE = 0.001  # seconds between two looks at it


def prepare():
    from PIL import Image
    from tiny_revit import make_images, make_model

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    files.ABANDONED = 0  # what a killed process has left may be removed at once
    folder = MADE["folder"] = tempfile.TemporaryDirectory(prefix="revit_campaign_")
    path = MADE["path"] = Path(folder.name)
    images = make_images(60)
    for i in range(60):
        inside = path / "images" / CLASSES[images.targets[i]]
        inside.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images.pixels(i)).save(inside / f"{i:02d}.png")
    model = make_model()
    model.pretrained_cfg = model.pretrained_cfg | {"label_names": ["flat", "stripes across", "stripes down"]}
    save_checkpoint(model, path / "model.safetensors")
    MADE["first"], MADE["last"] = {}, {}  # nanoseconds of CPU until the first file, and in all
    for name in [name for name in COMMANDS for _ in range(2)]:  # the second time, with what the first has imported
        output = path / f"whole_{name}"
        shutil.rmtree(output, ignore_errors=True)
        process, first, last = _begin(name, output), None, 0
        while (status := _wait(process, 0)) is None:
            last = max(last, _used(process))
            first = last if first is None and any(output.iterdir()) else first
        if status:
            raise AssertionError(f"{name} ended with {status}: {(path / 'said').read_text()[-500:]}")
        MADE["first"][name], MADE["last"][name] = last if first is None else first, last
        COMMANDS[name][1](output, output)
        for module in (path / "modules").read_text().split():  # the next run need not import them
            with suppress(ImportError):
                import_module(module)


def _infer(output):
    paths, model = str(MADE["path"] / "images"), str(MADE["path"] / "model.safetensors")
    command = ["infer", paths, "--model", model, "-q", "--batch-tokens", "40", "-o", str(output / "answers.jsonl")]
    return [*command, "--resume"]


def _train(output):
    small = "img_size=16,patch_size=4,embed_dim=32,depth=2,num_heads=2"
    command = ["train", "vit_tiny_patch16_224", "--model-args", small, "--menu", "4x4,2x2", "--batch", "16", "--quiet"]
    command += ["--device", "cpu", "--data", str(MADE["path"] / "images"), "--epochs", "4", "--save-every", "0"]
    return [*command, "--workers", "0", "--output", str(output / "run"), "--resume"]


def _label(output):
    command = ["label", str(MADE["path"] / "model.safetensors"), "--data", str(MADE["path"] / "images")]
    return [*command, "--dtype", "float32", "--quiet", "--output", str(output / "labels.parquet")]


def _evaluate(output):
    command = ["evaluate", str(MADE["path"] / "model.safetensors"), "--data", str(MADE["path"] / "images")]
    command += ["--split", "all", "--quiet", "--rounds", "1", "--limit", "12", "--timed", "6"]
    return [*command, "--output", str(output / "report")]


def _same_infer(one, other):
    assert (one / "answers.jsonl").read_bytes() == (other / "answers.jsonl").read_bytes(), "other records"
    assert not (one / "answers.jsonl.partial").exists(), "records of an unfinished run are left"


def _same_train(one, other):
    first, second = (load_file(folder / "run" / "model.safetensors") for folder in (one, other))
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first), "other weights"
    logs = [(folder / "run" / "log.csv").read_text().splitlines() for folder in (one, other)]
    assert [len(log) for log in logs] == [5, 5], "epochs are missing in the log, or twice there"


def _same_label(one, other):
    first, second = (Outcomes.load(folder / "labels.parquet") for folder in (one, other))
    assert first.keys == second.keys and (first.label == second.label).all() and (first.correct == second.correct).all()
    assert [path.name for path in one.iterdir()] == ["labels.parquet"], "shards are left"


def _same_evaluate(one, other):
    names = [sorted(path.name for path in (folder / "report").iterdir()) for folder in (one, other)]
    assert names[0] == names[1], names
    reports = [json.loads((folder / "report" / "report.json").read_text()) for folder in (one, other)]
    assert reports[0].keys() == reports[1].keys()


COMMANDS = {
    "infer": (_infer, _same_infer),
    "train": (_train, _same_train),
    "label": (_label, _same_label),
    "evaluate": (_evaluate, _same_evaluate),
}


def _begin(name: str, output: Path) -> int:
    """A process that runs the command, forked: nothing has to be imported anew."""
    output.mkdir(exist_ok=True)
    process = os.fork()
    if process:
        return process
    try:
        said = os.open(MADE["path"] / "said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(said, 1), os.dup2(said, 2)
        status = cli.main(COMMANDS[name][0](output))
        if output.name.startswith("whole"):
            ours = [name for name in list(sys.modules) if name.startswith("revit_kernels.")]
            (MADE["path"] / "modules").write_text(" ".join(ours))
        os._exit(status)
    except BaseException as error:
        os.write(2, repr(error).encode())
        os._exit(99)


def _used(process: int) -> int:
    """Nanoseconds of CPU of its first thread; 0 where it is gone."""
    try:
        return int(Path(f"/proc/{process}/schedstat").read_text().split()[0])
    except OSError:
        return 0


def _wait(process: int, seconds: float, moment: float = math.inf) -> int | None:
    """Its status once it has ended; None where it runs on after so long, or after so much CPU."""
    for _ in range(1 + round(seconds / PAUSE)):  # time in which this process is stopped does not count
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if _used(process) > moment:
            break
        time.sleep(PAUSE)
    return None


def attempt(seed: int) -> str:
    r = random.Random(seed)
    name = list(COMMANDS)[seed % len(COMMANDS)]
    output, whole = MADE["path"] / "killed", MADE["path"] / f"whole_{name}"
    shutil.rmtree(output, ignore_errors=True)
    killed = ""
    try:
        for _ in range(r.choice((1, 2))):
            first = r.choice((0, MADE["first"][name]))
            process = _begin(name, output)
            if _wait(process, PATIENCE, r.uniform(first, MADE["last"][name])) is None:
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)
                killed = "in its work" if any(output.iterdir()) else killed or "before its first file"
        if name == "infer" and (output / "answers.jsonl").exists():
            COMMANDS[name][1](output, whole)  # what has its name is whole
        status = _wait(process := _begin(name, output), PATIENCE)
        if status is None:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
        assert status == 0, f"{name} begun again ended with {status}: {(MADE['path'] / 'said').read_text()[-400:]}"
        COMMANDS[name][1](output, whole)
        left = [str(path.relative_to(output)) for path in output.rglob("*.tmp")]
        assert not left, f"{name} has left {left}"
        assert "Traceback" not in (MADE["path"] / "said").read_text()
    finally:
        shutil.rmtree(output, ignore_errors=True)
    return f"{name} killed {killed}" if killed else f"{name} was faster"
