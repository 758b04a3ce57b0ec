"""Files of labels and costs that somebody changed: one sentence, whatever stands in them."""

import json
import random
from argparse import Namespace

import numpy as np
import pyarrow
import pytest
from safetensors import safe_open
from safetensors.torch import save_file

from revit_kernels.adaptive import assigner as assigners
from revit_kernels.adaptive.costs import Costs
from revit_kernels.adaptive.outcomes import METADATA, Outcomes
from revit_kernels.adaptive.policies import Policy
from revit_kernels.cli import label, train
from revit_kernels.data import shards, tables, video_sets
from revit_kernels.data.class_names import read_class_names
from revit_kernels.models.registry import SHIPPED_ASSIGNER

VALUES = [None, True, -1, 0, 1, 2.5, 1 << 70, float("nan"), float("inf"), "", "x", [], {}, [[]], [1], [[1, 2, 3]]]
VALUES += [[[0, 4], [2, 2]], [[4, 4], [4, 4]], [[1 << 70, 1], [1, 1]], [["a", "b"]], {"a": {}}]


def changed(found, seed):
    """The dictionary with one entry replaced, gone, or one more."""
    chance = random.Random(seed)
    found = json.loads(json.dumps(found))
    name = chance.choice(list(found))
    kind = chance.choice(("replace", "replace", "replace", "delete", "add"))
    if kind == "delete":
        del found[name]
    elif kind == "add":
        found["unheard of"] = chance.choice(VALUES)
    elif isinstance(found[name], list) and chance.random() < 0.5:
        found[name][chance.randrange(len(found[name]))] = chance.choice(VALUES)
    else:
        found[name] = chance.choice(VALUES)
    return found


@pytest.fixture(scope="module")
def labels(tmp_path_factory):
    pytest.importorskip("pyarrow.parquet")
    rng = np.random.default_rng(0)
    real = {name: rng.random((6, 2), np.float32) for name in ("confidence", "margin", "entropy")}
    path = tmp_path_factory.mktemp("labels") / "labels.parquet"
    Outcomes(
        menu=((4, 4), (2, 2)),
        keys=tuple("abcdef"),
        targets=np.arange(6),
        correct=np.ones((6, 2), bool),
        predicted=np.zeros((6, 2), np.int32),
        label=np.array([0, 1, 0, 1, -1, 0]),
        fingerprint="f",
        about={"images": "some"},
        **real,
    ).save(path)
    return path


@pytest.mark.parametrize("seed", range(100))
def test_labels(labels, tmp_path, seed):
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(labels)
    head = changed(json.loads(table.schema.metadata[METADATA]), seed)
    path = tmp_path / "labels.parquet"
    pyarrow.parquet.write_table(table.replace_schema_metadata({METADATA: json.dumps(head).encode()}), path)
    try:
        found = Outcomes.load(path)
    except ValueError as error:
        assert "labels.parquet is no whole file of labels" in str(error) and "\n" not in str(error)
    else:
        assert len(found) == 6 and found.take([0, 5]).label.shape == (2,)
        assert len(found.menu) == found.correct.shape[1]


def test_labels_that_are_no_rows_of_the_menu(labels, tmp_path):
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(labels)
    place = table.column_names.index("label")
    column = pyarrow.array([0, 1, 0, 1, -1, 2], table["label"].type)
    pyarrow.parquet.write_table(table.set_column(place, "label", column), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="labels that are no rows of the menu of 2 lengths"):
        Outcomes.load(tmp_path / "x.parquet")


@pytest.mark.parametrize("seed", range(100))
def test_costs(seed):
    text = Costs(((4, 4), (2, 2)), (2.0, 1.0), 0.1, device="cpu", dtype="float32").to_json()
    try:
        found = Costs.from_json(json.dumps(changed(json.loads(text), seed)))
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        assert len(found.menu) == len(found.per_length)


@pytest.mark.parametrize("text", ["", "[]", "7", "{", "[" * 100_000])
def test_no_costs_at_all(text):
    with pytest.raises(ValueError, match="no JSON of costs"):
        Costs.from_json(text)


@pytest.mark.parametrize("part", ["config", "outcomes", "fitted", None])
@pytest.mark.parametrize("seed", range(25))
def test_assigners(tmp_path, seed, part):
    path = tmp_path / "assigner.safetensors"
    with safe_open(SHIPPED_ASSIGNER, "pt") as file:
        head = json.loads(file.metadata()[assigners.METADATA])
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    if part is None:
        head = changed(head, seed)
    else:
        head[part] = changed(head[part], seed)
    save_file(tensors, path, {assigners.METADATA: json.dumps(head)})
    try:
        found = assigners.TokenLengthAssigner.load(path)
    except ValueError as error:
        assert "assigner.safetensors is no whole assigner" in str(error) and "\n" not in str(error)
    else:
        assert len(found.menu) == 4 and found.fc3.out_features == 14


def test_an_assigner_that_describes_another_network_asks_for_no_memory(tmp_path):
    path = tmp_path / "assigner.safetensors"
    with safe_open(SHIPPED_ASSIGNER, "pt") as file:
        head = json.loads(file.metadata()[assigners.METADATA])
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    head["config"]["hidden"] = 1 << 30
    save_file(tensors, path, {assigners.METADATA: json.dumps(head)})
    with pytest.raises(ValueError, match="not those of the network that it describes"):
        assigners.TokenLengthAssigner.load(path)


@pytest.mark.parametrize(
    "text", ["[" * 10**5, '{"a": ' * 10**5, "1" * 5000, "1e999", "NaN", "null", "[1]", '"x"', '{"batch": "8"}']
)
def test_json_of_other_things(tmp_path, text):
    """Whatever reads a file of JSON takes it, or says in one sentence that it does not."""
    (tmp_path / "labels.json").write_text(f'{{"a": {text}}}')
    (tmp_path / "settings.json").write_text(text)
    run = Namespace(output=tmp_path, resume=True, batch=8, model=tmp_path / "a.pth", split="all", data="c")
    schema = pyarrow.schema([], metadata={b"huggingface": text.encode()})
    for read in (
        lambda: Costs.from_json(text),
        lambda: Policy.from_json(text),
        lambda: read_class_names(str(tmp_path / "settings.json"), 3),
        lambda: shards._label(text),
        lambda: tables._class_names(schema, "label"),
        lambda: video_sets._something(tmp_path / "a.json", text, "train", tmp_path, None),
        lambda: video_sets._something(tmp_path, "[]", "train", tmp_path, tmp_path / "labels.json"),
        lambda: train._share(run, 1),
        lambda: label.learnt(run),
    ):
        try:
            read()
        except ValueError as error:
            assert str(error) and "\n" not in str(error)
