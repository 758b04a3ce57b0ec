"""`revit evaluate`: its arithmetic, its honesty, and one report from end to end."""

import json

import numpy as np
import pytest
import torch
from tiny_revit import MENU, held_out, make_images, trained

from revit_kernels import cli
from revit_kernels.adaptive import evaluate as evaluation
from revit_kernels.adaptive import plots, report
from revit_kernels.adaptive.costs import Costs
from revit_kernels.adaptive.evaluate import Evaluation, Measured, at_equal_speed, evaluate
from revit_kernels.adaptive.policies import Cascade, Fixed, Random
from revit_kernels.models.checkpoints import save_checkpoint
from revit_kernels.training.assigner import AssignerRecipe, train_assigner


def measured(name, right, seconds, policy=None, budget=""):
    right = np.array(right, bool)
    zeros = np.zeros(len(right), int)
    return Measured(name, budget, policy or Fixed(0), right, zeros, zeros + 17, 1.0, list(seconds), 100)


def test_errors_and_ratios():
    full = measured("fixed", [1] * 80 + [0] * 20, [2.0, 4.0, 2.0])
    other = measured("cascade", [1] * 70 + [0] * 20 + [1] * 10, [1.0, 1.0, 1.0])
    assert full.accuracy == 0.8 and full.error == pytest.approx(np.sqrt(0.8 * 0.2 / 100))
    lost, error = other.lost(full)
    # ten lost, ten won: nothing lost, but twenty images differ
    assert lost == 0 and error == pytest.approx(np.sqrt(20 / 100) / 10)
    assert other.speed(full) == 2.0 and full.rate == 50.0


def test_equal_speed():
    points = [(1.0, 0.5), (2.0, 0.9), (3.0, 0.8), (4.0, 0.95)]
    assert at_equal_speed(points, 1.5) == pytest.approx(0.7)
    assert at_equal_speed(points, 2.0) == 0.9
    assert at_equal_speed(points, 3.0) == pytest.approx(0.925)  # a mix of the second and fourth, past the third
    assert at_equal_speed(points, 9.0) == 0.95 and at_equal_speed(points, 0.5) is None


def synthetic(cascade_right, cascade_seconds):
    static = [
        measured("fixed", [1] * n + [0] * (1000 - n), [s] * 3, Fixed(i))
        for i, (n, s) in enumerate([(950, 4.0), (900, 2.0), (800, 1.0)])
    ]
    policies = [
        measured(
            "cascade",
            [1] * cascade_right + [0] * (1000 - cascade_right),
            [cascade_seconds] * 3,
            Cascade((2, 0), (0.5,)),
            "2x",
        ),
        measured("random", [1] * 900 + [0] * 100, [2.0] * 3, Random((0.0, 1.0, 0.0)), "2x"),
    ]
    _, outcomes = held_out()
    return Evaluation(
        MENU, static, policies, outcomes, None, Costs(MENU, (4.0, 2.0, 1.0)), 1.0, 0.0, 1.0, "x", ("a", "b", "c"), {}
    )


def test_verdict_either_way():
    better = " ".join(report.verdict(synthetic(949, 2.0)))
    assert "**2.00x the images a second of full length, +0.10 points lost**" in better
    assert "4.90 points above the static lengths" in better and "4.90 points above random" in better
    worse = " ".join(report.verdict(synthetic(890, 2.0)))
    assert "No policy stays within 0.3 points" in worse and "loses 6.00 at 2.00x" in worse
    assert "1.00 points below the static lengths" in worse and "1.00 points below random" in worse


def test_budgets_are_not_solved_from_test_images():
    images, outcomes = held_out()
    with pytest.raises(ValueError, match="200 of the test images are among those"):
        evaluate(trained(), images, held_out=outcomes)


def test_report_from_end_to_end(tmp_path, monkeypatch, capsys):
    images, outcomes = held_out()
    assigner = train_assigner(trained(), outcomes, images, "pixels", AssignerRecipe(epochs=2, folds=2))
    save_checkpoint(trained(), tmp_path / "model.safetensors")
    assigner.save(tmp_path / "assigner.safetensors")
    test = make_images(90, seed=2, name="test")
    monkeypatch.setattr("revit_kernels.data.datasets.open_set", lambda *args, **kwargs: test)
    monkeypatch.setattr(evaluation, "measure_costs", lambda *a, **k: Costs(MENU, (4.0, 2.0, 1.0), 0.05, 0.01))
    command = ["evaluate", str(tmp_path / "model.safetensors"), "--assigner", str(tmp_path / "assigner.safetensors")]
    command += ["--data", "test", "--output", str(tmp_path / "report"), "--budgets", "1.5x,99x", "--rounds", "2"]
    assert cli.main([*command, "--timed", "30", "--dtype", "float32", "--quiet"]) == 0
    said = capsys.readouterr()
    assert "cannot meet the budget 99x" in said.err and "the report is" in said.out
    found = json.loads((tmp_path / "report" / "report.json").read_text())
    assert [one["policy"] for one in found["policies"]] == [
        "random",
        "assigner",
        "cascade",
        "assigner+cascade",
        "oracle",
    ]
    text = (tmp_path / "report" / "report.md").read_text()
    for title in ("## Lengths", "## Accuracy by label", "## The assigner", "## Policies", "not attainable"):
        assert title in text
    assert "images.png" in text and (tmp_path / "report" / "images.png").exists()
    assert (tmp_path / "report" / "accuracy_speed.png").exists() == plots.available()
    assert not [p for p in (tmp_path / "report").iterdir() if p.name.startswith(".")]
    # what is reported is what the model says
    x = torch.from_numpy(test.array)
    with torch.inference_mode():
        right = (trained()(x, grids=[MENU[1]] * 90, channels_last=True).argmax(-1).numpy() == test.targets).mean()
    assert found["static"][1]["accuracy"] == pytest.approx(right)
    oracle = found["policies"][-1]
    assert oracle["accuracy"] >= max(one["accuracy"] for one in found["static"]) and oracle["mix"] == found["labels"]
    assert found["static"][0]["speed"] == 1.0 and len(found["static"][0]["seconds"]) == 2


def test_wrong_use(tmp_path, monkeypatch, capsys):
    save_checkpoint(trained(), tmp_path / "model.safetensors")
    test = make_images(9, name="test")
    test.classes = ("a", "b")
    monkeypatch.setattr("revit_kernels.data.datasets.open_set", lambda *args, **kwargs: test)
    command = ["evaluate", str(tmp_path / "model.safetensors"), "--data", "test", "--output", str(tmp_path)]
    assert cli.main(command) == 2
    assert "has 3 classes, tiny has 2" in capsys.readouterr().err.replace("test has", "tiny has")
    assert cli.main(["evaluate", str(tmp_path / "gone.safetensors"), *command[2:]]) == 2
    assert "there is no checkpoint" in capsys.readouterr().err
