"""`revit infer` with a ReViT: a policy gives each image its length, and every record says what it cost."""

import csv
import json

import numpy as np
import pytest
from PIL import Image
from tiny_revit import CLASSES, MENU, labelled, make_images, trained

from revit_kernels import cli
from revit_kernels.adaptive.outcomes import Outcomes
from revit_kernels.models.checkpoints import save_checkpoint
from revit_kernels.models.registry import SHIPPED, SHIPPED_ASSIGNER
from revit_kernels.training.assigner import AssignerRecipe, train_assigner


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("revit")
    images, outcomes = labelled()
    save_checkpoint(trained(), folder / "model.safetensors")
    recipe = AssignerRecipe(epochs=2, folds=2)
    train_assigner(trained(), outcomes, images, "scout", recipe).save(folder / "assigner.safetensors")
    outcomes.save(folder / "labels.parquet")
    (folder / "images").mkdir()
    test = make_images(40, seed=5)
    for i in range(40):
        Image.fromarray(test.pixels(i)).save(folder / "images" / f"{i:02d}.png")
    (folder / "images" / "40.png").write_bytes(b"broken")
    return folder


def infer(files, *arguments):
    return cli.main(["infer", str(files / "images"), "--quiet", "--dtype", "float32", *map(str, arguments)])


@pytest.mark.parametrize("policy", [None, "fixed", "random", "assigner", "cascade", "assigner+cascade"])
def test_records_say_what_each_image_cost(files, tmp_path, policy):
    output = tmp_path / "out.jsonl"
    chosen = ["--policy", policy] if policy else []
    model = ["--model", files / "model.safetensors", "--assigner", files / "assigner.safetensors"]
    assert infer(files, *model, *chosen, "--budget", "full-50", "--output", output) == 1  # one image is broken
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(records) == 41 and "error" in records[40]
    lengths = {grid: 1 + grid[0] * grid[1] for grid in MENU}
    for record in records[:40]:
        assert tuple(record["grid"]) in lengths and record["classes"][0]["label"] in CLASSES
        assert record["share_of_full_pass"] >= round(lengths[tuple(record["grid"])] / 17, 4)


def test_quantized(files, tmp_path, capsys):
    model = ["--model", files / "model.safetensors", "--outcomes", files / "labels.parquet", "--policy", "fixed"]
    model += ["--output", tmp_path / "out.csv"]

    def answers(*options):
        done = infer(files, *model, *options)
        return done, [row["label_1"] for row in csv.DictReader(open(tmp_path / "out.csv"))][:40] if done < 2 else None

    _, plain = answers()
    done, quantized = answers("--quantize", "int8")
    if done == 2:  # a CPU without the instructions
        assert "--quantize int8: int8" in capsys.readouterr().err
    else:
        assert sum(a == b for a, b in zip(plain, quantized)) >= 36


def test_answers_are_those_of_the_model(files, tmp_path):
    model = ["--model", files / "model.safetensors", "--outcomes", files / "labels.parquet"]
    infer(files, *model, "--policy", "cascade", "--budget", "8tokens", "--output", tmp_path / "out.npz")
    found = np.load(tmp_path / "out.npz")
    assert (
        found["share_of_full_pass"].shape == (41,)
        and np.isnan(found["share_of_full_pass"][40])
        and (found["share_of_full_pass"][:40] > 0).all()
    )
    infer(files, *model, "--policy", "cascade", "--budget", "8tokens", "--output", tmp_path / "out.csv")
    rows = list(csv.DictReader(open(tmp_path / "out.csv")))
    assert [float(row["share_of_full_pass"]) for row in rows[:40]] == pytest.approx(
        found["share_of_full_pass"][:40], abs=1e-4
    )
    assert rows[40]["share_of_full_pass"] == "" and rows[40]["error"]


def test_without_a_policy_the_size_decides(files, tmp_path):
    infer(files, "--model", files / "model.safetensors", "--output", tmp_path / "out.jsonl")
    assert "share_of_full_pass" not in json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])


def test_wrong_use(files, tmp_path, capsys):
    model = ["--model", files / "model.safetensors"]
    cases = [
        ([*model, "--policy", "cascade"], "needs held-out outcomes"),
        ([*model, "--policy", "assigner", "--outcomes", files / "labels.parquet"], "needs an assigner"),
        ([*model, "--policy", "cascade", "--grids", "4x4"], "does not go with --grids"),
        ([*model, "--budget", "2x"], "go with a --policy"),
        ([*model, "--assigner", files / "gone.safetensors"], "there is no assigner"),
        (["--checkpoint", "weights.pth"], "are of a --model: name one"),
    ]
    for arguments, said in cases:
        assert infer(files, *arguments) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
    infer(files, *model, "--outcomes", files / "labels.parquet", "--budget", "90x", "--output", tmp_path / "out.csv")
    assert "warning: the policy 'cascade' cannot meet the budget 90x" in capsys.readouterr().err
    other = Outcomes.load(files / "labels.parquet")
    object.__setattr__(other, "fingerprint", "0" * 64)
    other.save(tmp_path / "other.parquet")
    assert infer(files, *model, "--outcomes", tmp_path / "other.parquet") == 2
    assert "taken from another model" in capsys.readouterr().err


def test_shipped_model(tmp_path, capsys):
    """Without --model: the package's own, adaptive, and small."""
    assert SHIPPED.stat().st_size + SHIPPED_ASSIGNER.stat().st_size < 4_000_000
    Image.fromarray(np.zeros((28, 28, 3), np.uint8)).save(tmp_path / "black.png")
    assert cli.main(["infer", str(tmp_path / "black.png")]) == 0
    said = capsys.readouterr()
    record = json.loads(said.out)
    assert 0 < record["share_of_full_pass"] and {"label", "probability"} <= set(record["classes"][0])
