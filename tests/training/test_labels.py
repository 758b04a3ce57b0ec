"""Token-length labels: the rules, extraction in one packed forward, resuming, files, and whose they are."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_revit import MENU, held_out, make_images, make_model, trained

from revit_kernels import cli
from revit_kernels.adaptive import outcomes as file_of_outcomes
from revit_kernels.adaptive.outcomes import Outcomes, label_of, name_of
from revit_kernels.cli.label import check_folds
from revit_kernels.data.division import folds, hold_out
from revit_kernels.models.checkpoints import save_checkpoint
from revit_kernels.training import labels
from revit_kernels.training.labels import collect, join

CORRECT = np.array([[1, 1, 1], [1, 1, 0], [1, 0, 0], [0, 0, 0], [1, 0, 1], [0, 1, 0]], bool)


@pytest.mark.parametrize(
    "unsolved, rule, expected",
    [
        ("smallest", "first_correct", [2, 1, 0, 2, 2, 1]),
        ("largest", "first_correct", [2, 1, 0, 0, 2, 1]),
        ("drop", "first_correct", [2, 1, 0, -1, 2, 1]),
        ("smallest", "stable", [2, 1, 0, 2, 0, 2]),
        ("drop", "stable", [2, 1, 0, -1, 0, -1]),
    ],
)
def test_rules(unsolved, rule, expected):
    assert label_of(CORRECT, unsolved, rule).tolist() == expected


def test_unknown_rules():
    with pytest.raises(ValueError, match="unsolved must be one of"):
        label_of(CORRECT, "middle")


def test_one_packed_forward_says_what_each_length_says():
    model, (images, outcomes) = trained(), held_out()
    x = torch.from_numpy(images.array)
    for row, grid in enumerate(MENU):
        with torch.inference_mode():
            p = model(x, grids=[grid] * len(x), channels_last=True).softmax(-1)
        assert np.array_equal(outcomes.predicted[:, row], p.argmax(-1).numpy())
        assert np.array_equal(outcomes.confidence[:, row], p.amax(-1).numpy())
        top = p.topk(2).values
        assert np.array_equal(outcomes.margin[:, row], (top[:, 0] - top[:, 1]).numpy())
        entropy = -(p.double() * p.double().log()).sum(-1)
        torch.testing.assert_close(torch.from_numpy(outcomes.entropy[:, row]), entropy.float())
    assert np.array_equal(outcomes.correct, outcomes.predicted == images.targets[:, None])
    assert np.array_equal(outcomes.label, label_of(outcomes.correct))


def test_against_the_full_length():
    images, _ = held_out()
    found = collect(trained(), images, against="full", probabilities=True)
    assert found.correct[:, 0].all() and np.array_equal(found.correct, found.predicted == found.predicted[:, :1])
    assert found.probabilities.shape == (200, 3, 3)
    assert collect(make_model(num_classes=5), images, against="full").correct[:, 0].all()  # needs no truth


def test_file_keeps_everything(tmp_path):
    _, outcomes = held_out()
    outcomes = replace(outcomes, label=label_of(outcomes.correct, "drop"))
    outcomes.save(tmp_path / "labels.parquet")
    again = Outcomes.load(tmp_path / "labels.parquet").require(trained())
    for name, value in vars(outcomes).items():
        other = getattr(again, name)
        same = np.array_equal(value, other) if isinstance(value, np.ndarray) else value == other
        assert same, name


def test_killed_extraction_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(labels, "SHARD", 64)
    model, (images, outcomes) = trained(), held_out()
    seen, ask = [], labels._ask

    def dies(model, images, members, *rest):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(members)
        return ask(model, images, members, *rest)

    monkeypatch.setattr(labels, "_ask", dies)
    with pytest.raises(KeyboardInterrupt):
        collect(model, images, partial=tmp_path / "partial")
    seen.append(None)  # now it lives on
    again = collect(model, images, partial=tmp_path / "partial")
    assert seen[3:] == [range(128, 192), range(192, 200)]
    assert np.array_equal(again.confidence, outcomes.confidence)
    (tmp_path / "partial" / "00001.npz").write_bytes(b"broken")  # that shard alone is asked for again
    assert np.array_equal(collect(model, images, partial=tmp_path / "partial").confidence, outcomes.confidence)
    assert seen[5:] == [range(64, 128)]
    with pytest.warns(UserWarning, match="are of another model: they begin anew"):
        other = collect(make_model(), images, partial=tmp_path / "partial")
    assert not np.array_equal(other.confidence, outcomes.confidence)


def test_killed_before_its_settings_had_their_name(tmp_path):
    (tmp_path / ".settings.json.4711.tmp").write_text("{")
    images, outcomes = held_out()
    assert np.array_equal(collect(trained(), images, partial=tmp_path).confidence, outcomes.confidence)


def test_partial_folder_of_something_else(tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds no labels that were begun"):
        collect(trained(), held_out()[0], partial=tmp_path)
    assert (tmp_path / "precious.txt").exists()


def test_labels_of_another_model():
    _, outcomes = held_out()
    with pytest.raises(ValueError, match="taken from another model"):
        outcomes.require(make_model())
    with pytest.raises(ValueError, match="of the menu"):
        model = make_model()
        model.menu = MENU[:2]
        outcomes.require(model)


def test_wrong_models_and_images():
    model = make_model(num_classes=4)
    with pytest.raises(ValueError, match="4 classes"):
        collect(model, make_images(4))
    model.menu = None
    with pytest.raises(ValueError, match="not resizable"):
        collect(model, make_images(4))


@pytest.mark.parametrize("content, match", [(b"PAR1 broken", "cannot be read"), (None, "no labels at")])
def test_broken_files(tmp_path, content, match):
    path = tmp_path / "labels.parquet"
    if content:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=match):
        Outcomes.load(path)


def test_file_is_a_table_of_images(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    images, _ = held_out()
    outcomes = collect(trained(), images, unsolved="drop", probabilities=True)
    outcomes = replace(outcomes, label=np.where(np.arange(200) % 7 == 0, -1, outcomes.label))
    outcomes.save(tmp_path / "labels.parquet")
    rows = pyarrow.parquet.read_table(tmp_path / "labels.parquet").to_pylist()
    tokens = [16, 9, 4, None]
    for i in (0, 1, 199):
        assert rows[i]["key"] == images.keys[i] and rows[i]["target"] == images.targets[i]
        assert rows[i]["label_tokens"] == tokens[outcomes.label[i]]
        assert rows[i]["correct"] == outcomes.correct[i].tolist()
        assert rows[i]["probabilities"] == outcomes.probabilities[i].tolist()
    assert np.array_equal(Outcomes.load(tmp_path / "labels.parquet").probabilities, outcomes.probabilities)


@pytest.mark.parametrize("groups", [3, 200])
def test_file_of_several_row_groups(tmp_path, monkeypatch, groups):
    monkeypatch.setattr(file_of_outcomes, "ROWS", 200 // groups)
    outcomes = collect(trained(), held_out()[0], probabilities=True)
    outcomes.save(tmp_path / "labels.parquet")
    again = Outcomes.load(tmp_path / "labels.parquet")
    assert again.keys == outcomes.keys and np.array_equal(again.probabilities, outcomes.probabilities)
    assert np.array_equal(again.confidence, outcomes.confidence)


@pytest.mark.parametrize("damage", ["column", "menu", "json", "gap"])
def test_files_that_lack_something(tmp_path, damage):
    pyarrow = pytest.importorskip("pyarrow")
    path = tmp_path / "labels.parquet"
    held_out()[1].save(path)
    table = pyarrow.parquet.read_table(path)
    head = table.schema.metadata[file_of_outcomes.METADATA]
    if damage == "column":
        table = table.drop_columns(["margin"])
    elif damage == "gap":
        gap = pyarrow.array([None] * len(table), pyarrow.int32())
        table = table.set_column(table.column_names.index("target"), "target", gap)
    head = {"menu": head.replace(b"[2, 2]", b"[2, 2], [1, 1]"), "json": head[:-4]}.get(damage, head)
    pyarrow.parquet.write_table(table.replace_schema_metadata({file_of_outcomes.METADATA: head}), path)
    with pytest.raises(ValueError, match="is no whole file of labels"):
        Outcomes.load(path)


def test_full_disk_keeps_the_file_of_before(tmp_path, monkeypatch):
    path, (_, outcomes) = tmp_path / "labels.parquet", held_out()
    outcomes.save(path)
    before = path.read_bytes()

    def full(table, file, **options):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pyarrow.parquet.write_table", full)
    with pytest.raises(RuntimeError, match="No space left on device"):
        outcomes.save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_names_of_another_encoding(tmp_path):
    images = make_images(4)
    images.keys = ["a.png", "caf\udce9.png", "c.png", "d.png"]  # what os.listdir says of a Latin-1 name
    collect(trained(), images).save(tmp_path / "labels.parquet")
    assert Outcomes.load(tmp_path / "labels.parquet").keys == tuple(map(name_of, images.keys))


def test_foreign_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    pyarrow.parquet.write_table(pyarrow.table({"key": ["a"]}), tmp_path / "labels.parquet")
    with pytest.raises(ValueError, match="holds no labels"):
        Outcomes.load(tmp_path / "labels.parquet")


def test_folds_are_joined():
    _, outcomes = held_out()
    halves = [outcomes.take(np.arange(0, 200, 2)), outcomes.take(np.arange(1, 200, 2))]
    joined = join(halves)
    assert len(joined) == 200 and joined.about["folds"] == [outcomes.fingerprint] * 2
    with pytest.warns(UserWarning, match="of models of folds"):
        joined.require(trained())
    with pytest.raises(ValueError, match="in two folds"):
        join([halves[0], halves[0]])


def test_division():
    targets = np.repeat([0, 1, 2], [60, 30, 10])
    rest, held = hold_out(targets, 20, 3)
    assert np.bincount(targets[held]).tolist() == [12, 6, 2] and len(np.intersect1d(rest, held)) == 0
    assert np.array_equal(held, hold_out(targets, 0.2, 3)[1]) and not np.array_equal(held, hold_out(targets, 20, 4)[1])
    of_fold = folds(targets, 5, 0)
    assert all(np.bincount(targets[of_fold == f]).tolist() == [12, 6, 2] for f in range(5))
    for count in (100, float("inf"), float("nan"), -3):
        with pytest.raises(ValueError, match="can be held out"):
            hold_out(targets, count, 0)
    few = folds(np.arange(30) // 3, 5, 0)  # three images of each class
    assert np.bincount(few).tolist() == [6] * 5
    with pytest.raises(ValueError, match="30 images cannot be divided into 31 folds"):
        folds(np.arange(30) // 3, 31, 0)


def test_models_of_folds_label_what_they_have_not_learnt(tmp_path):
    files = []
    for fold in ("1/2", "2/2"):
        folder = tmp_path / fold[0]
        folder.mkdir()
        (folder / "settings.json").write_text(json.dumps({"fold": fold, "seed": 0}))
        files.append(str(folder / "model.safetensors"))
    check_folds(files, 0)
    for wrong, seed, match in (
        (files[::-1], 0, r"model 1 of 2 must have left out fold 1/2 .* left out fold 2/2 with --seed 0"),
        (files[:1] * 2, 0, "model 2 of 2 must"),
        (files, 3, "with --seed 3, but"),
        ([*files, files[0]], 0, "model 1 of 3 must have left out fold 1/3"),
    ):
        with pytest.raises(ValueError, match=match):
            check_folds(wrong, seed)


def test_command(tmp_path, monkeypatch, capsys):
    save_checkpoint(trained(), tmp_path / "revit.safetensors")
    from revit_kernels.data import datasets

    images, outcomes = held_out()
    monkeypatch.setattr(datasets, "open_set", lambda *args, **kwargs: images)
    monkeypatch.setattr("revit_kernels.cli.clips.open_set", lambda *args, **kwargs: images)
    command = ["label", str(tmp_path / "revit.safetensors"), "--data", "held", "--dtype", "float32"]
    assert cli.main([*command, "--output", str(tmp_path / "labels.parquet")]) == 0
    assert "4x4 is right on" in capsys.readouterr().err
    assert np.array_equal(Outcomes.load(tmp_path / "labels.parquet").label, outcomes.label)
    assert cli.main([*command, "--output", str(tmp_path / "labels.csv")]) == 2
    assert "must end in .parquet" in capsys.readouterr().err
