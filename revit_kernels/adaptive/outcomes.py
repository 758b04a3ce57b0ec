"""What a ReViT said of images at every length: the input of labels, calibration, budgets and reports."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from revit_kernels.files import write_whole
from revit_kernels.grids import Grid
from revit_kernels.models.checkpoints import fingerprint
from revit_kernels.modules.lengths import cells, check_menu

METADATA = b"revit_kernels"
UNSOLVED = ("smallest", "largest", "drop")
RULES = ("first_correct", "stable")
ROWS = 16384  # images of a row group
SUMMARY = ("correct", "predicted", "confidence", "margin", "entropy")
COLUMNS = {  # of the file, beside the images' names
    "target": np.int32,
    "label": np.int16,
    "correct": np.bool_,
    "predicted": np.int32,
    "confidence": np.float32,
    "margin": np.float32,
    "entropy": np.float32,
    "probabilities": np.float32,
    "assigner": np.float32,
    "mixed": np.float32,
    "alone": np.float32,
    "held_out": np.bool_,
}


def label_of(correct: np.ndarray, unsolved: str = "smallest", rule: str = "first_correct") -> np.ndarray:
    """The token-length label of each image: the menu row of the shortest length that answers right.

    correct:  (images, lengths) bool, longest length first
    unsolved: for an image that no length answers right: the "smallest" length (it costs least), the "largest", or
              "drop" (label -1)
    rule:     "first_correct": the shortest that is right; "stable": the shortest from which on every longer one is too

    Returns (images,) int64. Raises ValueError for an option that is none.
    """
    if unsolved not in UNSOLVED or rule not in RULES:
        raise ValueError(f"unsolved must be one of {UNSOLVED} and rule of {RULES}, got {unsolved!r} and {rule!r}")
    correct = np.asarray(correct, bool)
    if rule == "first_correct":
        label = correct.shape[1] - 1 - correct[:, ::-1].argmax(1)
        solved = correct.any(1)
    else:
        run = np.logical_and.accumulate(correct, axis=1).sum(1)  # how many are right in a row, from the longest on
        label, solved = run - 1, run > 0
    other = {"smallest": correct.shape[1] - 1, "largest": 0, "drop": -1}[unsolved]
    return np.where(solved, label, other).astype(np.int64)


def name_of(key: str) -> str:
    """An image's name as every file can hold it: a file name of another encoding has escapes instead."""
    return str(key).encode("utf-8", "backslashreplace").decode()


@dataclass(frozen=True)
class Outcomes:
    """What a model said of each image at each length of its menu.

    menu:       grids, longest first
    keys:       the images' names
    targets:    (images,) classes
    correct:    (images, lengths) bool: the answer is the truth, or with against="full" that of the longest length
    predicted:  (images, lengths) int32
    confidence: (images, lengths) float32, the softmax's largest value; margin: it less the second; entropy in nats
    label:      (images,) int64, row of the menu, -1 where dropped
    probabilities: (images, lengths, classes) float16, or None
    assigner:   (images, lengths) float32 logits of an assigner, of being right at each length, or None
    mixed:      (images, lengths, 4) float32, `evidence.mixed` of each length's answer, or None
    alone:      (images, 4) float32: confidence, margin and entropy of the assigner's class posterior, and 1 where its
                class is right, or None
    held_out:   (images,) bool: the model has not learnt from the image; None where that is so of all
    fingerprint: of the model
    about:      data set, split and options, for a person to read
    """

    menu: tuple[Grid, ...]
    keys: tuple[str, ...]
    targets: np.ndarray
    correct: np.ndarray
    predicted: np.ndarray
    confidence: np.ndarray
    margin: np.ndarray
    entropy: np.ndarray
    label: np.ndarray
    fingerprint: str
    probabilities: np.ndarray | None = None
    assigner: np.ndarray | None = None
    mixed: np.ndarray | None = None
    alone: np.ndarray | None = None
    held_out: np.ndarray | None = None
    about: dict = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def patches(self) -> np.ndarray:
        """(lengths,) int32"""
        return np.array([cells(grid) for grid in self.menu], np.int32)

    @property
    def truth(self) -> np.ndarray:
        """(images,) the classes that count as right: the true ones, or those of the longest length."""
        return self.predicted[:, 0] if self.about.get("against") == "full" else self.targets

    @property
    def right_alone(self) -> np.ndarray:
        """(images,) bool: the assigner's own class is right."""
        return self.alone[:, 3] > 0.5

    def require(self, model) -> Outcomes:
        """Raise ValueError unless they are of this model: of its menu and weights. Warns of those of folds' models."""
        if tuple(self.menu) != model.menu:
            raise ValueError(f"the labels are of the menu {self.menu}, the model's is {model.menu}")
        if self.fingerprint and self.fingerprint != fingerprint(model):
            raise ValueError("the labels were taken from another model, or from this one before it changed")
        if not self.fingerprint and "folds" in self.about:
            warnings.warn("these labels are of models of folds: that they are meant for this model is not checked")
        return self

    def take(self, indices) -> Outcomes:
        """The outcomes of some images."""
        indices = np.asarray(indices)
        arrays = {
            name: value[indices] for name, value in vars(self).items() if isinstance(value, np.ndarray) and len(value)
        }
        return replace(self, keys=tuple(self.keys[i] for i in indices), **arrays)

    def apart(self) -> tuple[Outcomes | None, Outcomes]:
        """Of the images that the model has learnt from, None where there are none, and of those held out."""
        if self.held_out is None:
            return None, self
        masks = (~self.held_out, self.held_out)
        learnt, rest = (replace(self.take(np.flatnonzero(mask)), held_out=None) for mask in masks)
        return learnt if len(learnt) else None, rest

    # ------------------------------------------------------------------ files

    def save(self, path) -> None:
        """Write a .parquet table, a row an image. The file appears whole or not at all."""
        pyarrow = _pyarrow()
        path = Path(path)
        if path.suffix != ".parquet":
            raise ValueError(f"labels are written to a .parquet file, got {path}")
        head = {"menu": self.menu, "fingerprint": self.fingerprint, "about": self.about}
        metadata = {METADATA: json.dumps(head).encode()}
        groups = [range(i, min(i + ROWS, len(self))) for i in range(0, len(self), ROWS)] or [range(0)]
        tables = [self._table(pyarrow, slice(rows.start, rows.stop)) for rows in groups]
        table = pyarrow.concat_tables(tables).replace_schema_metadata(metadata)
        write_whole(path, lambda temporary: pyarrow.parquet.write_table(table, temporary, row_group_size=ROWS))

    def _table(self, pyarrow, rows: slice):
        """The pyarrow table of some images."""
        label, lengths = self.label[rows], self.patches
        columns = {
            "key": pyarrow.array([name_of(key) for key in self.keys[rows]], pyarrow.string()),
            "target": self.targets[rows].astype(np.int32),
            "label": label.astype(np.int16),
            "label_tokens": pyarrow.array(lengths[label], mask=label < 0),
        }
        for name in (*SUMMARY, "probabilities", "assigner", "mixed", "alone"):
            values = getattr(self, name)
            if values is not None:  # older readers of Parquet know no float16
                columns[name] = _lists(pyarrow, values[rows].astype(COLUMNS[name]))
        if self.held_out is not None:
            columns["held_out"] = self.held_out[rows]
        return pyarrow.table(columns)

    @classmethod
    def load(cls, path) -> Outcomes:
        """What `save` wrote. Raises ValueError for a file that is missing, broken, or no labels."""
        pyarrow = _pyarrow()
        if not Path(path).is_file():
            raise ValueError(f"there are no labels at {path}")
        try:
            table = pyarrow.parquet.read_table(path)
        except Exception as error:  # pyarrow has many, and none names the file
            raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())[:200]}") from error
        head = (table.schema.metadata or {}).get(METADATA)
        if head is None:
            raise ValueError(f"{path} holds no labels that `revit label` wrote")
        try:
            head = json.loads(head)
            menu = check_menu(head["menu"])
            if not isinstance(head["fingerprint"], str) or not isinstance(head["about"], dict):
                raise ValueError("its fingerprint is no text, or what it is about no dictionary")
            arrays = {
                name: _array(table, name, 4 if name == "alone" else len(menu))
                for name in COLUMNS
                if name in table.column_names
            }
            if not ((arrays["label"] >= -1) & (arrays["label"] < len(menu))).all():
                raise ValueError(f"it has labels that are no rows of the menu of {len(menu)} lengths")
            return cls(
                menu=menu,
                keys=tuple(table["key"].to_pylist()),
                fingerprint=head["fingerprint"],
                about=head["about"],
                targets=arrays.pop("target"),
                **arrays,
            )
        except Exception as error:  # a column or an entry is missing, or of another shape or kind
            raise ValueError(f"{path} is no whole file of labels: {' '.join(str(error).split())[:200]}") from error


def _lists(pyarrow, values: np.ndarray):
    """(images, lengths, ...) as a column of lists."""
    column = pyarrow.array(values.reshape(-1))
    for axis in range(values.ndim - 1, 0, -1):
        length, lists = values.shape[axis], int(np.prod(values.shape[:axis]))
        column = pyarrow.ListArray.from_arrays(np.arange(lists + 1, dtype=np.int32) * np.int32(length), column)
    return column


def _array(table, name: str, lengths: int) -> np.ndarray:
    """A column as an array. Raises ValueError where an image lacks a value."""
    dtype = {"label": np.int64, "target": np.int64, "probabilities": np.float16}.get(name, COLUMNS[name])
    parts, axes = [], 0
    for chunk in table[name].chunks:
        axes = 0
        while hasattr(chunk.type, "value_type"):  # a list
            chunk, axes = chunk.flatten(), axes + 1
        if chunk.null_count:
            raise ValueError(f"its column {name} has gaps")
        parts.append(chunk.to_numpy(zero_copy_only=False).astype(dtype))
    values = np.concatenate(parts) if parts else np.empty(0, dtype)
    rows = table.num_rows
    shape = (rows, lengths, values.size // max(1, rows * lengths))[: 1 + axes]
    if values.size != np.prod(shape):
        raise ValueError(f"its column {name} has {values.size} values for {rows} images and {lengths} lengths")
    return values.reshape(shape)


def _pyarrow():
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError("labels are kept as .parquet, which needs pyarrow: pip install pyarrow") from None
    return pyarrow
