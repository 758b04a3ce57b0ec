"""Labels, assigners, costs, class names, lists, tables and the records of an unfinished run, changed in bytes and in
what they say."""

import io
import json
import random
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
from safetensors import safe_open
from safetensors.torch import save

from revit_kernels.adaptive import assigner as assigners
from revit_kernels.adaptive.costs import Costs
from revit_kernels.adaptive.outcomes import METADATA, Outcomes
from revit_kernels.data.class_names import read_class_names
from revit_kernels.data.images import find_images
from revit_kernels.data.tables import csv_set
from revit_kernels.models.registry import SHIPPED_ASSIGNER
from revit_kernels.serving.journal import Journal, open_settings
from revit_kernels.serving.records import Answer
from revit_kernels.training.run_folder import RunFolder

from .checkpoints import another
from .images import changed

MADE = {}


def prepare():
    warnings.simplefilter("ignore")
    folder = MADE["folder"] = tempfile.TemporaryDirectory(prefix="revit_campaign_")
    path = MADE["path"] = Path(folder.name)
    rng = np.random.default_rng(0)
    real = {name: rng.random((6, 2), np.float32) for name in ("confidence", "margin", "entropy")}
    outcomes = Outcomes(
        menu=((4, 4), (2, 2)),
        keys=tuple("abcdef"),
        targets=np.arange(6),
        correct=np.ones((6, 2), bool),
        predicted=np.zeros((6, 2), np.int32),
        label=np.array([0, 1, 0, 1, -1, 0]),
        fingerprint="f",
        about={"images": "some"},
        **real,
    )
    outcomes.save(path / "labels.parquet")
    MADE["labels"] = (path / "labels.parquet").read_bytes()
    MADE["assigner"] = Path(SHIPPED_ASSIGNER).read_bytes()
    with safe_open(SHIPPED_ASSIGNER, "pt") as file:
        MADE["head"] = json.loads(file.metadata()[assigners.METADATA])
        MADE["tensors"] = {key: file.get_tensor(key) for key in file.keys()}
    MADE["costs"] = Costs(((4, 4), (2, 2)), (2.0, 1.0), 0.1, device="cpu", dtype="float32").to_json()
    MADE["answers"] = [
        Answer(f"image {i}.jpg", (20, 30), (4, 4), probabilities=rng.random(7, np.float32)) if i % 3 else
        Answer(f"image {i}.jpg", error="there is no such file")
        for i in range(9)
    ]  # fmt: skip
    journal = Journal(path / "run.partial", {"weights": "w"})
    for answer in MADE["answers"]:
        journal.write(answer)
    journal.close(remove=False)
    MADE["journal"] = (path / "run.partial").read_bytes()


def labels(r, path):
    data = MADE["labels"]
    if r.random() < 0.5:
        table = pyarrow.parquet.read_table(io.BytesIO(data))
        head = another(r, json.loads(table.schema.metadata[METADATA]))
        to = io.BytesIO()
        pyarrow.parquet.write_table(table.replace_schema_metadata({METADATA: json.dumps(head).encode()}), to)
        data = to.getvalue()
    else:
        data = changed(r, data)
    path = path / "x.parquet"
    path.write_bytes(data)
    found = Outcomes.load(path)
    assert len(found.take([0]).label) == 1 and found.correct.shape == (len(found), len(found.menu))


def assigner(r, path):
    if r.random() < 0.5:
        data = save(MADE["tensors"], {assigners.METADATA: json.dumps(another(r, MADE["head"]))})
    else:
        data = changed(r, MADE["assigner"][:6000]) + MADE["assigner"][6000:]
    path = path / "x.safetensors"
    path.write_bytes(data)
    assigners.TokenLengthAssigner.load(path)


def costs(r, path):
    text = MADE["costs"]
    text = json.dumps(another(r, json.loads(text))) if r.random() < 0.5 else changed(r, text.encode()).decode("latin-1")
    found = Costs.from_json(text)
    assert len(found.menu) == len(found.per_length)


NAMES = [
    ("json", json.dumps(["cat", "dog", "horse"])),
    ("json", json.dumps({"0": "cat", "1": "dog", "2": "horse"})),
    ("json", json.dumps({"id2label": {"0": ["n01440764", "cat"], "1": "dog", "2": "horse"}})),
    ("json", json.dumps([{"id": 0, "name": "cat"}, {"id": 1, "name": "dog"}, {"id": 2, "name": "horse"}])),
    ("csv", "class,name\n0,cat\n1,dog\n2,horse\n"),
    ("txt", "cat\ndog\nhorse\n"),
]


def class_names(r, path):
    suffix, text = r.choice(NAMES)
    if suffix == "json" and r.random() < 0.5:
        data = json.dumps(another(r, json.loads(text))).encode()
    else:
        data = changed(r, text.encode())
    path = path / f"x.{suffix}"
    path.write_bytes(data)
    found = read_class_names(str(path), 3)
    assert len(found) == 3 and all(isinstance(name, str) for name in found)


def image_list(r, path):
    path = path / "x.txt"
    path.write_bytes(changed(r, b"a.jpg\n# a comment\nfolder/b.png\r\nc[1].webp\n\ndata:image/png;base64,AAAA\n"))
    for found in find_images([f"@{path}"]).paths:
        assert isinstance(found, str)


def table(r, path):
    path = path / "x.csv"
    path.write_bytes(changed(r, b"path,label,split\na.png,cat,train\nb.png,dog,train\nc.png,cat,test\n"))
    found = csv_set(path, r.choice(("train", "test", "all")))
    assert len(found.targets) == len(found.keys)


def unfinished(r, path):
    """What is read of a damaged journal are its first records, as they were written; it goes on from there."""
    path = path / "x.partial"
    path.write_bytes(changed(r, MADE["journal"]))
    journal = Journal(path, {"weights": "w"})
    try:
        found = list(journal.answers())
        wanted = MADE["answers"]
        at = len(found)
        for one, other in zip(found, wanted):
            assert (one.path, one.size, one.grid, one.error) == (other.path, other.size, other.grid, other.error)
            assert (one.probabilities is None) == (other.probabilities is None)
            assert one.probabilities is None or np.array_equal(one.probabilities, other.probabilities)
        journal.write(wanted[0])
        again = list(journal.answers())
        assert len(again) == at + 1 and again[-1].path == wanted[0].path
    finally:
        journal.close(remove=True)


def settings(r, path):
    folder = path / "shards"
    folder.mkdir(exist_ok=True)
    good = {"weights": "w", "columns": [0, 3, 1, None, False], "shard_rows": 4, "epochs": 3}
    text = json.dumps(another(r, good)).encode() if r.random() < 0.5 else changed(r, json.dumps(good).encode())
    path = folder / "settings.json"
    for place in (path, folder / "_revit.json"):
        place.write_bytes(text)
    if r.random() < 0.5:
        RunFolder(folder, good, resume=True)
    else:
        open_settings(folder, good).close()


KINDS = (labels, assigner, costs, class_names, image_list, table, unfinished, settings)


def attempt(seed: int) -> str:
    r = random.Random(seed)
    kind = r.choice(KINDS)
    try:
        kind(r, MADE["path"])
    except ValueError as error:
        assert type(error) in (ValueError, json.JSONDecodeError) or kind is costs, f"{type(error).__name__}: {error}"
        assert str(error).strip() and "\n" not in str(error), f"{kind.__name__}: {error!r}"
        return f"{kind.__name__} refused"
    return f"{kind.__name__} read"
