"""The recipes: the one of minutes is run whole, as a user would run it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from revit_kernels.models.eva import VarLenEva
from revit_kernels.models.registry import create_model

RECIPES = Path(__file__).parent.parent / "recipes"


def test_scripts_are_sound():
    for script in RECIPES.glob("*.sh"):
        subprocess.run(["bash", "-n", str(script)], check=True)
        assert os.access(script, os.X_OK), f"{script} cannot be run"


def test_digits_from_training_to_report(tmp_path):
    """train -> label -> assign -> evaluate -> infer on real images, each by its command."""
    pytest.importorskip("sklearn")
    from sklearn.datasets import load_digits

    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    run = tmp_path / "digits"
    done = subprocess.run(["bash", str(RECIPES / "digits.sh"), str(run)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((run / "report" / "report.json").read_text())
    best = max(one["accuracy"] for one in found["static"])
    assert best > 0.9, "the digits were not learnt"
    named = {one["policy"] for one in found["policies"] + found["fixed"]}
    assert named == {"random", "assigner", "cascade", "assigner+cascade", "oracle"}
    assert all(one["accuracy"] > best - 0.1 for one in found["policies"] if one["policy"] != "random")
    assert len((run / "log.csv").read_text().splitlines()) > 10

    from PIL import Image

    (tmp_path / "images").mkdir()
    digits = load_digits()
    for i in range(20):
        array = (digits.images[i] * (255 / 16)).astype("uint8")
        Image.fromarray(array).save(tmp_path / "images" / f"{i:02d}_{digits.target[i]}.png")
    command = ["revit", "infer", str(tmp_path / "images"), "--model", str(run / "model.safetensors")]
    command += ["--assigner", str(run / "assigner.safetensors"), "--quiet"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in done.stdout.splitlines()]
    right = [record["classes"][0]["label"] == record["path"][-5] for record in records]
    assert len(records) == 20 and sum(right) >= 16 and all(record["share_of_full_pass"] > 0 for record in records)


def test_digits_of_a_rotary_model(tmp_path):
    """The recipe's training, an epoch of it, with DINOv3 in place of its model, and answers of the run's model."""
    pytest.importorskip("sklearn")
    script = (RECIPES / "digits.sh").read_text().replace("\\\n", " ")
    train = next(line for line in script.splitlines() if line.startswith("revit train "))
    command = ["bash", "-c", f"set -eu; run={tmp_path}/run model=vit_small_patch16_dinov3 epochs=1; {train}"]
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    model = create_model(str(tmp_path / "run")).eval()
    assert isinstance(model, VarLenEva) and model.rope.kind == "dinov3" and model.menu == ((4, 4), (3, 3), (2, 2))
    digits = [torch.randint(256, (3, 8, 8), dtype=torch.uint8) for _ in model.menu]
    with torch.no_grad():
        together = model(digits, grids=model.menu)
        for image, grid, row in zip(digits, model.menu, together):
            assert row.isfinite().all() and torch.equal(model([image], grids=[grid])[0], row)
